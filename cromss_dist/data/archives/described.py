"""Reads an archive that a description fits: one `Sample` a location, or the reason why there is none."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cromss_dist.data.archives import geotiff
from cromss_dist.data.archives.inventory.entries import Entry
from cromss_dist.data.archives.inventory.inventory import Inventory
from cromss_dist.data.archives.layout.description import ArchiveDescription, dump
from cromss_dist.data.archives.layout.files import LOCATIONS_ROLE, Units
from cromss_dist.data.archives.layout.templates import pieces
from cromss_dist.data.archives.normalise import DTYPES, VALUE_DTYPES, ClassMap, Normaliser, Pixels
from cromss_dist.data.archives.seasons import Listed, Scene, Slots, file_of_season, pair, read_list, sort_files
from cromss_dist.data.sample import Json, NormalisedBy, Rejected, Sample, SampleSpec, Uint8Array, ValueSpec
from cromss_dist.errors import ArchiveEmptyError, UnreadableInputError
from cromss_dist.schema import IGNORE, LABEL_ARRAY, ArraySpec, Modality

NUM_PROBES = 16  # locations whose headers decide patch size and pixel type
MAX_METADATA_BYTES = 2**20
MAX_LIST_BYTES = 2**28  # a csv of locations; that of NoLDO-S12 has 16 MB
PHYSICAL_UNITS: dict[Modality, Units] = {"s1": "dB", "s2": "reflectance_x10000"}


@dataclass(frozen=True)
class DescribedArchive:
    """A `Source` over the files of an inventory, laid out as a description says; made by `open_described`.

    Inputs are the locations that the csv names and those that have a label.
    """

    description: ArchiveDescription
    inventory: Inventory
    spec: SampleSpec
    units: dict[Modality, Units]
    keys: tuple[str, ...]
    listed: Listed
    duplicates: Counter[str]
    asides: dict[str, int]
    fingerprint: str
    size_bytes: int

    def read(self, key: str) -> Sample:
        """Reads one location; see `Source.read`."""
        if key in self.listed.conflicts and self.description.locations is not None:
            path = self.description.locations.csv
            raise Rejected("conflicting_duplicate", path, f"location {key} is listed twice with different scenes")
        slots = sort_files(self.inventory.files(key))
        scenes = pair(self.description, key, slots, self.listed.scenes.get(key))
        notes: set[str] = set()
        arrays: dict[str, Uint8Array] = {}
        places: list[geotiff.Place] = []
        for modality, of_season in scenes.items():
            located = modality == self._located.modality
            specs = [spec for spec in self.spec.images if spec.modality == modality]
            arrays |= {spec.name: np.empty(self.spec.shape(spec.name), np.uint8) for spec in specs}
            for season, scene in enumerate(of_season):
                bands = {spec: arrays[spec.name][season] for spec in specs}
                self._read_scene(modality, key, scene, slots, notes, bands, places if located else None)
        for value in self.spec.values:
            of_season = scenes[self.description.values[value.name].scene_of]
            arrays[value.name] = np.stack([self._read_values(value, key, scene, slots, notes) for scene in of_season])
        return Sample(key, arrays, self._metadata(key, scenes, places), tuple(sorted(notes)))

    def _metadata(self, key: str, scenes: dict[Modality, list[Scene]], places: list[geotiff.Place]) -> Json:
        seasons = []
        for number, place in enumerate(places):
            season: Json = {}
            for modality in ("s1", "s2"):
                scene = scenes[modality][number] if modality in scenes else None
                named = scene is not None and "scene" in pieces(self.description.images[modality].path)
                season[f"{modality}_scene"] = scene.name if scene is not None and named else None
                season[f"{modality}_time"] = _clock(scene.time) if scene is not None else None
            step = self._located.scale
            a, b, c, d, e, f = place.transform or (math.nan,) * 6
            grid = None if place.transform is None else [a / step, b / step, c, d / step, e / step, f]
            seasons.append({**season, "crs": place.crs, "transform": grid})
        return {"key": key, "lon": places[0].lon, "lat": places[0].lat, "seasons": seasons}

    @cached_property
    def _located(self) -> ArraySpec:
        """The array whose first band says where a season lies: of the finest grid, of S2 where there is S2."""
        modality = "s2" if "s2" in self.description.images else "s1"
        return min((spec for spec in self.spec.images if spec.modality == modality), key=lambda spec: spec.scale)

    @cached_property
    def _normalisers(self) -> dict[Modality, Normaliser]:
        rules = {modality: files.offset for modality, files in self.description.images.items()}
        offsets = {modality: 0.0 if rule is None else rule.subtract for modality, rule in rules.items()}
        return {m: Normaliser(self.spec.normalisation[m], self.units[m], offsets[m]) for m in self.description.images}

    @cached_property
    def _class_maps(self) -> dict[str, ClassMap]:
        return {name: ClassMap(files) for name, files in self.description.values.items()}

    def _read_scene(
        self,
        modality: Modality,
        key: str,
        scene: Scene,
        slots: Slots,
        notes: set[str],
        arrays: dict[ArraySpec, Uint8Array],
        places: list[geotiff.Place] | None,
    ) -> None:
        """Fills the arrays of one modality in one season, shape (band, H / scale, W / scale); adds to `notes` and `places`."""
        has_offset = self._has_offset(modality, scene, slots, notes)
        files = self.description.images[modality]
        read: dict[str, tuple[geotiff.Raster, str, bytes]] = {}  # by name of the file's band; '' for all
        for spec, bands in arrays.items():
            for index, band in enumerate(spec.bands):
                in_file = band if files.one_file_a_band else ""
                if in_file not in read:
                    read = {in_file: self._decode(modality, key, scene, in_file, spec.scale, notes)}
                raster, path, data = read[in_file]
                if places is not None and spec == self._located and index == 0:
                    places.append(geotiff.place(data, path, places))
                number = files.stored[band]
                pixels = raster.pixels[0 if isinstance(number, str) else number - 1]
                self._check_band(modality, pixels, raster.nodata, path, band)
                bands[index] = self._normalisers[modality].to_uint8(pixels, band, has_offset)

    def _decode(
        self, modality: Modality, key: str, scene: Scene, band: str, scale: int, notes: set[str]
    ) -> tuple[geotiff.Raster, str, bytes]:
        files = self.description.images[modality]
        entry = scene.files.get(band)
        if entry is None:
            path = self.description.expected_path(modality, key, scene.name, band)
            if band == "B10" and "B9" in scene.files:
                raise Rejected("l2a", path, "the scene has no B10: it is an L2A product (12 bands); expected L1C (13 bands)")
            raise Rejected("missing_file", path, "the file is not there")
        data = self.inventory.read(entry)
        raster = geotiff.decode(data, entry.path, DTYPES[self.units[modality]], None, self.spec.patch_px // scale)
        found, wanted = len(raster.pixels), files.num_bands_in_file
        if found < wanted or (found > wanted and not files.picks_bands):
            if modality == "s2" and (found, wanted) == (12, 13):
                raise Rejected("l2a", entry.path, "it has 12 bands: it is an L2A product; expected L1C (13 bands)")
            raise Rejected("wrong_bands", entry.path, f"it has {found} bands in one file; expected {wanted}")
        if raster.cropped:
            notes.add("cropped")
        return raster, entry.path, data

    def _check_band(self, modality: Modality, pixels: Pixels, nodata: float | None, path: str, band: str) -> None:
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise Rejected("non_finite", path, f"{int((~np.isfinite(pixels)).sum())} pixels of {band} are NaN or infinite")
        if nodata is None and self.units[modality] != "uint8":
            nodata = 0
        if nodata is not None and pixels.flat[0] == nodata and (pixels == nodata).all():
            raise Rejected("nodata_only", path, f"every pixel of {band} is {nodata}")

    def _has_offset(self, modality: Modality, scene: Scene, slots: Slots, notes: set[str]) -> bool:
        """Whether the scene's digital numbers carry the offset, by its metadata file; kept uint8 values carry none."""
        rule = self.description.images[modality].offset
        if rule is None or self.units[modality] == "uint8":
            return False
        if rule.field is not None:
            entry = slots.get(f"meta.{modality}", {}).get(scene.name, {}).get("")
            if entry is None:
                notes.add("no_metadata")
                return False
            if not self._number(entry, rule.field) >= rule.since:
                return False
        notes.add("offset_removed")
        return True

    def _number(self, entry: Entry, name: str) -> float:
        """The number called `name` in a JSON file; 0 where it is not there."""
        try:
            if entry.size > MAX_METADATA_BYTES:
                raise ValueError(f"it has more than {MAX_METADATA_BYTES} bytes")
            return float(json.loads(self.inventory.read(entry)).get(name, 0))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Rejected("bad_metadata", entry.path, str(error)) from error

    def _read_values(self, spec: ValueSpec, key: str, scene: Scene, slots: Slots, notes: set[str]) -> Uint8Array:
        """One season of a value array, uint8 (H, W); 255 = ignore."""
        entry = file_of_season(self.description, spec.name, key, slots, scene)
        raster = geotiff.decode(self.inventory.read(entry), entry.path, VALUE_DTYPES, 1, None)
        values, wrong = self._class_maps[spec.name].apply(raster.pixels[0], raster.nodata)
        if wrong is not None:
            allowed = self.description.values[spec.name].map or f"0-{len(spec.values) - 1} and {IGNORE}"
            raise Rejected(f"{spec.name}_out_of_range", entry.path, f"it has the value {wrong}; allowed are {allowed}")
        if (values == IGNORE).all():
            raise Rejected(f"{spec.name}_empty", entry.path, f"every pixel is {IGNORE} (ignore)")
        size = self.spec.patch_px
        if values.shape == (size, size):
            return values
        if all(side in (size, size + 1) for side in values.shape):
            notes.add("cropped")
            return values[:size, :size]
        notes.add("label_resized")
        return _nearest(values, size)


def open_described(description: ArchiveDescription, inventory: Inventory) -> DescribedArchive:
    """What an inventory taken with `description.match` holds; probes a few headers for patch size and pixel type.

    Raises:
        ArchiveEmptyError: there is no location, or none with a label.
        UnreadableInputError: the list of locations is no csv, or no probed location says what the patch size is.
        Rejected: the list of locations cannot be read.
    """
    listed = Listed()
    if description.locations is not None:
        for entry in inventory.side_files(LOCATIONS_ROLE):
            listed = read_list(inventory.read(entry, MAX_LIST_BYTES), entry.path, description)
    keys = tuple(sorted({*inventory.keys(LABEL_ARRAY), *listed.scenes}))
    if not keys:
        raise ArchiveEmptyError(
            f"{inventory.root} holds no labelled location: there is no {description.values[LABEL_ARRAY].path}. Check that the "
            "archive is complete."
        )
    patch_px, units = _probe(description, inventory, keys)
    known = set(keys)
    unlabelled = {key for modality in description.images for key in inventory.keys(modality) if key not in known}
    values = [
        ValueSpec(name, files.names)
        for name, files in description.values.items()
        if not files.optional or next(inventory.keys(name), None) is not None
    ]
    by: dict[Modality, NormalisedBy] = {m: "archive" if units[m] == "uint8" else "converter" for m in description.images}
    repeated = Counter(dict.fromkeys(inventory.repeated.keys() & known, 1))
    return DescribedArchive(
        description=description,
        inventory=inventory,
        spec=SampleSpec(
            patch_px=patch_px,
            num_seasons=description.seasons,
            images=description.image_arrays,
            values=tuple(sorted(values, key=lambda value: value.name != LABEL_ARRAY)),
            normalisation={modality: description.contract(modality) for modality in description.images},
            normalised_by=by,
        ),
        units=units,
        keys=keys,
        listed=listed,
        duplicates=listed.duplicates + repeated,
        asides={"unlabelled": len(unlabelled), "strays": inventory.num_strays, **inventory.refused},
        fingerprint=hashlib.sha256(f"{inventory.fingerprint}\n{dump(description)}".encode()).hexdigest(),
        size_bytes=inventory.size_bytes,
    )


def _probe(description: ArchiveDescription, inventory: Inventory, keys: tuple[str, ...]) -> tuple[int, dict[Modality, Units]]:
    """Patch size and units: what most of the first readable locations have, where the description leaves it open."""
    finest = {m: min((a for a in description.image_arrays if a.modality == m), key=lambda a: a.scale) for m in description.images}
    sized: Modality = "s2" if "s2" in finest else "s1"
    multiple = math.lcm(*(array.scale for array in description.image_arrays))
    sides: Counter[int] = Counter()
    is_uint8: dict[Modality, Counter[bool]] = {modality: Counter() for modality in finest}
    problem = "it has no such file"
    for key in keys[: 4 * NUM_PROBES]:
        found = {(entry.role, entry.band): entry for entry in reversed(inventory.files(key))}
        for modality, array in finest.items():
            entry = found.get((modality, array.bands[0] if description.images[modality].one_file_a_band else ""))
            if entry is None:
                continue
            try:
                header = geotiff.header(inventory.read(entry), entry.path)
            except Rejected as error:
                problem = str(error)
                continue
            is_uint8[modality][header.dtype == "uint8"] += 1
            surplus = min(header.height, header.width) * array.scale % multiple  # one pixel more is a surplus row
            if modality == sized and surplus in (0, array.scale):
                sides[min(header.height, header.width) * array.scale - surplus] += 1
        if sides.total() == NUM_PROBES:
            break
    undecided = [m for m, files in description.images.items() if files.units == "auto" and not is_uint8[m]]
    if undecided or (description.patch_px is None and not sides):
        raise UnreadableInputError(
            f"None of the first {min(len(keys), 4 * NUM_PROBES)} locations shows the patch size and pixel type; last problem: "
            f"{problem}; check that the archive is complete."
        )
    units: dict[Modality, Units] = {}
    for modality, files in description.images.items():
        counts = is_uint8[modality]
        kept = files.units == "auto" and counts[True] > counts[False]
        units[modality] = "uint8" if kept else PHYSICAL_UNITS[modality] if files.units == "auto" else files.units
    return description.patch_px or max(sides, key=lambda side: (sides[side], -side)), units


def _clock(time: str) -> str | None:
    """A time as metadata has it, YYYYMMDDTHHMMSS; a day without a clock time stands for its midnight."""
    return (time if "T" in time else f"{time}T000000") if time else None


def _nearest(values: Uint8Array, size_px: int) -> Uint8Array:
    """Nearest-neighbour resize to a square: labels are names, and between two of them there is nothing."""
    rows, columns = (((np.arange(size_px) + 0.5) * side / size_px).astype(np.int64) for side in values.shape)
    return values[np.ix_(rows, columns)]

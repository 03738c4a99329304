"""Reads an SSL4EO-S12 tree with NoLDO-S12 labels: one `Sample` a location, or the reason why there is none.

Expected below the root: `s1/<id>/<scene>/{VV,VH}.tif`, `s2c/<id>/<scene>/{B1..B12,B8A}.tif` and `metadata.json`,
`dw_noisy_labels/<id>/<S2 scene>/label.tif`, `dw_complete_ids.csv` (optional, with or without a header line).
Synthetic archives add `reference_labels/<id>/<S2 scene>/label.tif` and `noise_kinds/<id>/<S2 scene>/kind.tif`.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cromss_dist.data.geotiff import gdal_environment, inside, read_header, read_place, read_raster
from cromss_dist.data.sample import NormalisedBy, Rejected, Sample, SampleSpec, Uint8Array, ValueSpec
from cromss_dist.data.scenes import S1_SCENE, S2_SCENE, acquisition_time, read_scenes, scene_names
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, UnreadableInputError
from cromss_dist.schema import (
    CLASS_NAMES,
    IGNORE,
    IMAGE_ARRAYS,
    KIND_ARRAY,
    LABEL_ARRAY,
    NOISE_KINDS,
    NORMALISATION,
    NUM_CLASSES,
    NUM_SEASONS,
    REFERENCE_ARRAY,
    ArraySpec,
    Modality,
)

IMAGE_FOLDERS: dict[Modality, str] = {"s1": "s1", "s2": "s2c"}
LABEL_FOLDER = "dw_noisy_labels"
SCENES_FILE = "dw_complete_ids.csv"
# Folder and file of the arrays that hold one class value a pixel, and how many values there are.
VALUE_ARRAYS = {
    LABEL_ARRAY: (LABEL_FOLDER, "label.tif", NUM_CLASSES),
    REFERENCE_ARRAY: ("reference_labels", "label.tif", NUM_CLASSES),
    KIND_ARRAY: ("noise_kinds", "kind.tif", len(NOISE_KINDS)),
}
PHYSICAL_DTYPES: dict[Modality, tuple[str, ...]] = {"s1": ("float32", "float64"), "s2": ("uint16", "float32")}
PROBED_BANDS: dict[Modality, str] = {"s1": "VV", "s2": "B2"}
NUM_PROBES = 16  # locations whose headers decide patch size and pixel type

# Sentinel-2 products from processing baseline 04.00 (25 January 2022) on carry an offset: ESA, PSD 14.9, RADIO_ADD_OFFSET.
OFFSET_BASELINE = 4.0
OFFSET_DN = 1000
MAX_METADATA_BYTES = 2**20

_KEY = re.compile(r"[0-9]{7}")


@dataclass(frozen=True)
class Archive:
    """What `open_archive` found.

    Args:
        root: Resolved path.
        locations: Keys (7 digits), sorted, each once.
        duplicates: How many csv lines repeat an earlier one, by key.
        conflicts: Keys that the csv names twice with different scenes.
        scenes: S2 scenes of a location as the csv names them; empty without a csv.
        unlabelled: Locations with images that have no label and are in no csv: no inputs, only counted.
        strays: Names in the folders that are no location, such as .DS_Store.
        patch_px: Side of the patch at 10 m.
        stored_uint8: For each modality whether the archive holds uint8 already; otherwise values are physical.
        value_arrays: 'label', and 'reference' and 'kind' where the archive has them.
    """

    root: Path
    locations: tuple[str, ...]
    duplicates: Counter[str]
    conflicts: frozenset[str]
    scenes: dict[str, tuple[str, ...]]
    unlabelled: int
    strays: int
    patch_px: int
    stored_uint8: dict[Modality, bool]
    value_arrays: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The inputs."""
        return self.locations

    @property
    def asides(self) -> dict[str, int]:
        """What is there and no input."""
        return {"unlabelled": self.unlabelled, "strays": self.strays}

    @property
    def spec(self) -> SampleSpec:
        """What its samples have in common."""
        kept: dict[bool, NormalisedBy] = {True: "archive", False: "converter"}
        names = {LABEL_ARRAY: CLASS_NAMES, REFERENCE_ARRAY: CLASS_NAMES, KIND_ARRAY: NOISE_KINDS}
        return SampleSpec(
            patch_px=self.patch_px,
            num_seasons=NUM_SEASONS,
            images=IMAGE_ARRAYS,
            values=tuple(ValueSpec(name, names[name]) for name in self.value_arrays),
            normalisation=NORMALISATION,
            normalised_by={modality: kept[stored] for modality, stored in self.stored_uint8.items()},
        )

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over names, sizes and times of all files."""
        return self._listing[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return self._listing[1]

    @cached_property
    def _listing(self) -> tuple[str, int]:
        files = [(path, path.lstat()) for path in sorted(self.root.rglob("*"))]
        told = [(str(path.relative_to(self.root)), stat.st_size, stat.st_mtime_ns) for path, stat in files]
        return hashlib.sha256(repr(told).encode()).hexdigest(), sum(stat.st_size for _, stat in files)

    def read(self, key: str) -> Sample:
        """Reads one location.

        Raises:
            Rejected: something is missing, damaged or not what it should be; says what, where and why.
        """
        if key in self.conflicts:
            raise Rejected("conflicting_duplicate", SCENES_FILE, f"location {key} is listed twice with different scenes")
        try:
            return self._read(key)
        except OSError as error:  # of the file system; what GDAL cannot read is rejected where it is read
            raise Rejected("unreadable", key, str(error)) from error

    def _read(self, key: str) -> Sample:
        with gdal_environment():
            s2_scenes, s1_scenes = self._pair(key)
            notes: set[str] = set()
            scenes: dict[Modality, list[str]] = {"s1": s1_scenes, "s2": s2_scenes}
            offsets = {
                "s1": [False] * NUM_SEASONS,
                "s2": [self._has_offset(f"{IMAGE_FOLDERS['s2']}/{key}/{scene}", notes) for scene in s2_scenes],
            }
            arrays: dict[str, Uint8Array] = {}
            for spec in IMAGE_ARRAYS:
                assert spec.modality is not None
                folder = f"{IMAGE_FOLDERS[spec.modality]}/{key}"
                seasons = [
                    self._read_image(spec, f"{folder}/{scene}", has_offset, notes)
                    for scene, has_offset in zip(scenes[spec.modality], offsets[spec.modality], strict=True)
                ]
                arrays[spec.name] = np.stack(seasons)
            for name in self.value_arrays:
                arrays[name] = np.stack([self._read_values(name, key, scene, notes) for scene in s2_scenes])
            places = [read_place(self.root, f"{IMAGE_FOLDERS['s2']}/{key}/{scene}/B2.tif") for scene in s2_scenes]
        sample_metadata = {
            "key": key,
            "lon": places[0].lon,
            "lat": places[0].lat,
            "seasons": [
                {
                    "s2_scene": s2,
                    "s2_time": acquisition_time(s2),
                    "s1_scene": s1,
                    "s1_time": acquisition_time(s1),
                    "crs": place.crs,
                }
                for s2, s1, place in zip(s2_scenes, s1_scenes, places, strict=True)
            ],
        }
        return Sample(key, arrays, sample_metadata, tuple(sorted(notes)))

    def _pair(self, key: str) -> tuple[list[str], list[str]]:
        """The S2 and S1 scenes of the four seasons, by acquisition time.

        Names of S1 scenes begin with the satellite, so their string order is not their order in time.
        """
        labels = f"{LABEL_FOLDER}/{key}"
        if not (self.root / labels).is_dir():
            raise Rejected("missing_label", labels, "the location has no label folder")
        listed = self.scenes.get(key)
        s2_scenes = scene_names(self.root / labels, S2_SCENE) if listed is None else [s for s in listed if S2_SCENE.fullmatch(s)]
        _require_seasons(
            s2_scenes, "missing_label" if listed is None else "missing_season", labels if listed is None else SCENES_FILE
        )
        for modality, folder in IMAGE_FOLDERS.items():
            if not (self.root / folder / key).is_dir():
                raise Rejected("missing_modality", f"{folder}/{key}", f"the location has no {modality} folder")
        for scene in s2_scenes:
            for folder, reason in ((IMAGE_FOLDERS["s2"], "missing_season"), (LABEL_FOLDER, "missing_label")):
                if not (self.root / folder / key / scene).is_dir():
                    raise Rejected(reason, f"{folder}/{key}/{scene}", "the scene's folder is not there")
        s1_folder = f"{IMAGE_FOLDERS['s1']}/{key}"
        s1_scenes = scene_names(self.root / s1_folder, S1_SCENE)
        _require_seasons(s1_scenes, "missing_season", s1_folder)
        return sorted(s2_scenes, key=acquisition_time), sorted(s1_scenes, key=acquisition_time)

    def _has_offset(self, folder: str, notes: set[str]) -> bool:
        """Whether the scene's digital numbers carry the offset, by the processing baseline in its metadata.json."""
        path = f"{folder}/metadata.json"
        if not (self.root / path).exists():
            notes.add("no_metadata")
            return False
        full = inside(self.root, path)
        try:
            if full.stat().st_size > MAX_METADATA_BYTES:
                raise ValueError(f"it has more than {MAX_METADATA_BYTES} bytes")
            found = json.loads(full.read_text(encoding="utf-8"))
            return float(found.get("PROCESSING_BASELINE", 0)) >= OFFSET_BASELINE
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Rejected("bad_metadata", path, str(error)) from error

    def _read_image(self, spec: ArraySpec, folder: str, has_offset: bool, notes: set[str]) -> Uint8Array:
        """One season of one image array as uint8, shape (band, H / scale, W / scale)."""
        assert spec.modality is not None
        kept = self.stored_uint8[spec.modality]
        size = self.patch_px // spec.scale
        bands = []
        for band in spec.bands:
            path = f"{folder}/{band}.tif"
            if band == "B10" and not (self.root / path).exists() and (self.root / folder / "B9.tif").exists():
                raise Rejected("l2a", path, "the scene has no B10: it is an L2A product (12 bands); expected L1C (13 bands)")
            raster = read_raster(self.root, path, ("uint8",) if kept else PHYSICAL_DTYPES[spec.modality], size)
            if raster.cropped:
                notes.add("cropped")
            if not np.isfinite(raster.pixels).all():
                raise Rejected("non_finite", path, f"{int((~np.isfinite(raster.pixels)).sum())} pixels are NaN or infinite")
            nodata = raster.nodata if raster.nodata is not None else (None if kept else 0)
            if nodata is not None and (raster.pixels == nodata).all():
                raise Rejected("nodata_only", path, f"every pixel is {nodata}")
            bands.append(raster.pixels)
        values = np.stack(bands)
        if kept:
            return values.astype(np.uint8, copy=False)
        if has_offset:
            notes.add("offset_removed")
            values = np.maximum(values.astype(np.float32) - OFFSET_DN, 0)
        return NORMALISATION[spec.modality].to_uint8(values, spec.bands)

    def _read_values(self, name: str, key: str, scene: str, notes: set[str]) -> Uint8Array:
        """One season of labels, reference labels or noise kinds, uint8 (H, W); 255 = ignore."""
        folder, file, num_values = VALUE_ARRAYS[name]
        path = f"{folder}/{key}/{scene}/{file}"
        raster = read_raster(self.root, path, ("uint8",), None)
        values = raster.pixels.astype(np.uint8, copy=False)
        if raster.nodata is not None and raster.nodata >= num_values:  # below that it would hide a class
            values = np.where(values == raster.nodata, np.uint8(IGNORE), values)
        wrong = (values >= num_values) & (values != IGNORE)
        if wrong.any():
            raise Rejected(
                f"{name}_out_of_range",
                path,
                f"it has the value {values[wrong].max()}; allowed are 0-{num_values - 1} and {IGNORE}",
            )
        if (values == IGNORE).all():
            raise Rejected(f"{name}_empty", path, f"every pixel is {IGNORE} (ignore)")
        if values.shape == (self.patch_px, self.patch_px):
            return values
        if all(side in (self.patch_px, self.patch_px + 1) for side in values.shape):
            notes.add("cropped")
            return values[: self.patch_px, : self.patch_px]
        notes.add("label_resized")
        return _nearest(values, self.patch_px)


def open_archive(root: str | Path) -> Archive:
    """Lists an archive and probes a few headers for patch size and pixel type.

    Inputs are the locations the csv names and those with labels on disk.

    Raises:
        ArchiveMissingError: the folder, or one of `s1`, `s2c`, `dw_noisy_labels` in it, is not there.
        ArchiveEmptyError: no location is on disk.
        UnreadableInputError: no probed location says what the patch size is.
    """
    path = Path(root).resolve()
    if not path.is_dir():
        raise ArchiveMissingError(f"{root} is not a folder; give the folder that holds s1/, s2c/ and {LABEL_FOLDER}/.")
    for folder in (*IMAGE_FOLDERS.values(), LABEL_FOLDER):
        if not (path / folder).is_dir():
            hint = (
                " (s2a/ is there: those are L2A products; L1C is needed)" if folder == "s2c" and (path / "s2a").is_dir() else ""
            )
            raise ArchiveMissingError(
                f"{root} has no folder {folder}/{hint}; an archive holds s1/, s2c/ and {LABEL_FOLDER}/, see docs/data-format.md."
            )
    names = {folder: {p.name for p in (path / folder).iterdir()} for folder in (*IMAGE_FOLDERS.values(), LABEL_FOLDER)}
    keys = {folder: {name for name in found if _KEY.fullmatch(name)} for folder, found in names.items()}
    listed, duplicates, conflicts = read_scenes(path / SCENES_FILE)
    with_images = set.union(*(keys[folder] for folder in IMAGE_FOLDERS.values()))
    if not with_images | keys[LABEL_FOLDER]:
        raise ArchiveEmptyError(
            f"{root} holds no location: its folders have no entry of 7 digits; check that the archive is unpacked."
        )
    locations = tuple(sorted(keys[LABEL_FOLDER] | listed.keys()))
    if not locations:
        raise ArchiveEmptyError(f"{root} holds no labelled location: {LABEL_FOLDER}/ is empty and there is no {SCENES_FILE}.")
    patch_px, stored_uint8 = _probe(path, locations)
    return Archive(
        root=path,
        locations=locations,
        duplicates=Counter(duplicates),
        conflicts=frozenset(conflicts),
        scenes=listed,
        unlabelled=len(with_images - set(locations)),
        strays=sum(len(names[folder] - keys[folder]) for folder in names),
        patch_px=patch_px,
        stored_uint8=stored_uint8,
        value_arrays=tuple(name for name, (folder, _, _) in VALUE_ARRAYS.items() if (path / folder).is_dir()),
    )


def _probe(root: Path, locations: tuple[str, ...]) -> tuple[int, dict[Modality, bool]]:
    """Patch size and pixel type of the archive: what most of the first readable locations have."""
    sizes: Counter[int] = Counter()
    is_uint8: dict[Modality, Counter[bool]] = {"s1": Counter(), "s2": Counter()}
    problem = "no B2.tif was found"
    with gdal_environment():
        for key in locations[: 4 * NUM_PROBES]:
            for modality, band in PROBED_BANDS.items():
                found = sorted((root / IMAGE_FOLDERS[modality] / key).glob(f"*/{band}.tif"))
                if not found:
                    continue
                try:
                    header = read_header(root, found[0].relative_to(root).as_posix())
                except Rejected as error:
                    problem = str(error)
                    continue
                is_uint8[modality][header.dtype == "uint8"] += 1
                side = min(header.height, header.width)
                if modality == "s2" and side % 6 in (0, 1):  # 60 m bands need a side of 6; one more is a surplus row
                    sizes[side - side % 6] += 1
            if sizes.total() == NUM_PROBES:
                break
    if not sizes or not is_uint8["s1"]:
        raise UnreadableInputError(
            f"None of the first {min(len(locations), 4 * NUM_PROBES)} locations shows the patch size; last problem: {problem}; "
            "check that the archive was unpacked completely."
        )
    return max(sizes, key=lambda size: (sizes[size], -size)), {m: counts[True] > counts[False] for m, counts in is_uint8.items()}


def _require_seasons(scenes: list[str], reason: str, path: str) -> None:
    if len(set(scenes)) != NUM_SEASONS or len(scenes) != NUM_SEASONS:
        raise Rejected(reason, path, f"it names {len(set(scenes))} scenes; expected {NUM_SEASONS}, one a season")


def _nearest(values: Uint8Array, size_px: int) -> Uint8Array:
    """Nearest-neighbour resize to a square: labels are names, and between two of them there is nothing."""
    rows, cols = (((np.arange(size_px) + 0.5) * side / size_px).astype(np.int64) for side in values.shape)
    return values[np.ix_(rows, cols)]

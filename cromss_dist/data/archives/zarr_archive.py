"""Reads SSL4EO-S12 v1.1 in its Zarr form with the labels of NoLDO-S12: one `Sample` a location, or why there is none.

Stores `S1GRD/*.zarr.zip` and `S2L1C/*.zarr.zip` anywhere below the root, 64 locations in each: `bands` (sample, time, band,
y, x), S1 in dB (float16), S2 digital numbers (int16) with all bands at 10 m; `sample` (the location's id), `band`, and per
location and time `file_id`, the name of the Sentinel product. Labels are those of NoLDO-S12, a folder or a zip file; a label
belongs to the S2 scene of its folder's name, so they are joined by location and scene.

Two traps of that release: S2 carries an offset of 1000 digital numbers, and S1 is in the order of file names, which is not that
of time where Sentinel-1A and 1B mix. Here the offset is measured in the cirrus band and subtracted, and the times in the names
order the seasons.

Reference: DLR-MF-DAS/SSL4EO-S12-v1.1: README.md for the layout (revision of March 2025) and for the order of S1 (news of
February 2026), zarr_dataset.py for the offset.
"""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cromss_dist.data.archives import geotiff
from cromss_dist.data.archives.inventory.entries import Entry
from cromss_dist.data.archives.inventory.inventory import Inventory, take_inventory
from cromss_dist.data.archives.layout.description import ArchiveDescription, load
from cromss_dist.data.archives.normalise import DTYPES, VALUE_DTYPES, ClassMap, Normaliser, Pixels
from cromss_dist.data.archives.zarr_zip import Store, ZarrZip, find_zarr_zip
from cromss_dist.data.sample import Json, Rejected, Sample, SampleSpec, Uint8Array, ValueSpec
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, UnreadableInputError
from cromss_dist.schema import BANDS, IGNORE, LABEL_ARRAY, MODALITIES, NORMALISATION, ArraySpec, Modality

SUFFIX = ".zarr.zip"
LABELS = "noldo_s12"  # the description whose label files are read
OFFSET_DN = 1000
CIRRUS = "B10"  # next to no light comes back in it: its usual value is the offset, about 20 DN without (SSL4EO-S12's mean is 22)
_FOLDERS: dict[Modality, tuple[str, ...]] = {"s1": ("s1grd", "s1"), "s2": ("s2l1c", "s2c")}
_DTYPES = {"s1": ("float16", *DTYPES["dB"]), "s2": DTYPES["reflectance_x10000"]}
_TIME = re.compile(r"\d{8}T\d{6}")


@dataclass(frozen=True)
class _Held:
    """Where a location lies: the number of a store and the row in it."""

    store: int
    row: int


@dataclass(frozen=True)
class ZarrArchive:
    """The stores of a release as a `Source`; made by `open_zarr_zips`.

    Args:
        spec: See `Source`; so are keys, duplicates, asides, fingerprint and size_bytes.
        keys: Ids of 7 digits of the labelled locations, and paths of stores that cannot be read.
        duplicates: See `Source`.
        asides: See `Source`.
        fingerprint: See `Source`.
        size_bytes: See `Source`.
        stores: All stores.
        held: For each modality where each location lies.
        bands: For each modality its bands in our names, in the order of the stores.
        offset: Digital numbers to be subtracted from S2.
        problems: Why a key cannot be read: a store that is damaged, or a location that two stores hold.
        labels: Files of the labels.
        layout: Description of the label files.
    """

    spec: SampleSpec
    keys: tuple[str, ...]
    duplicates: Counter[str]
    asides: dict[str, int]
    fingerprint: str
    size_bytes: int
    stores: tuple[ZarrZip, ...]
    held: dict[Modality, dict[str, _Held]]
    bands: dict[Modality, tuple[str, ...]]
    offset: int
    problems: dict[str, Rejected]
    labels: Inventory
    layout: ArchiveDescription

    def read(self, key: str) -> Sample:
        """Reads one location; see `Source.read`."""
        if key in self.problems:
            raise self.problems[key]
        notes = {"offset_removed"} if self.offset else set()
        arrays: dict[str, Uint8Array] = {}
        scenes: dict[Modality, list[str]] = {}
        for modality in MODALITIES:
            if key not in self.held[modality]:
                raise Rejected("missing_modality", key, f"no {_FOLDERS[modality][0].upper()} store holds the location")
            held = self.held[modality][key]
            with self.stores[held.store].open() as store:
                scenes[modality], arrays[modality] = self._read_images(modality, store, held.row, key)
                if modality == "s2":
                    place = _place(store, held.row)
        found = {entry.scene: entry for entry in self.labels.files(key) if entry.role == LABEL_ARRAY}
        arrays[LABEL_ARRAY] = np.stack([self._read_label(found.get(scene), key, scene) for scene in scenes["s2"]])
        seasons = [
            {
                f"{m}_{what}": scenes[m][t] if what == "scene" else _time(scenes[m][t])
                for m in MODALITIES
                for what in ("scene", "time")
            }
            | {name: place[name] for name in ("crs", "transform")}
            for t in range(self.spec.num_seasons)
        ]
        return Sample(
            key, arrays, {"key": key, "lon": place["lon"], "lat": place["lat"], "seasons": seasons}, tuple(sorted(notes))
        )

    def _read_images(self, modality: Modality, store: Store, row: int, key: str) -> tuple[list[str], Uint8Array]:
        """Scenes and pixels of the seasons of one location, in order of time."""
        path = f"{self.stores[self.held[modality][key].store].name}/{key}"
        (names,) = store.read("file_id", row, row + 1).astype(str).tolist()
        (pixels,) = store.read("bands", row, row + 1)
        expected = self.spec.shape(modality)
        if not (isinstance(names, list) and len(names) == len(pixels) and len(set(names)) == self.spec.num_seasons):
            raise Rejected("missing_season", path, f"its scenes are {names}; expected {self.spec.num_seasons}, one a season")
        if pixels.shape != expected:
            raise Rejected("wrong_size", path, f"its shape is {pixels.shape}; expected {expected}")
        order = sorted(range(len(names)), key=lambda season: (_time(names[season], path), names[season]))
        contract = self.spec.normalisation[modality]
        normaliser = Normaliser(contract, "dB" if modality == "s1" else "reflectance_x10000", self.offset)
        seasons = np.empty(expected, np.uint8)
        for into, season in enumerate(order):
            for index, band in enumerate(contract.bands):
                values = pixels[season, self.bands[modality].index(band)]
                _check(values, f"{path}, {names[season]}", band, self.offset if modality == "s2" else 0)
                seasons[into, index] = normaliser.to_uint8(values, band, modality == "s2" and self.offset != 0)
        return [names[season] for season in order], seasons

    def _read_label(self, entry: Entry | None, key: str, scene: str) -> Uint8Array:
        """The label of one scene, uint8 (H, W); 255 = ignore."""
        if entry is None:
            path = self.layout.expected_path(LABEL_ARRAY, key, scene)
            raise Rejected("missing_label", path, "the label's folder has other scenes than the S2 store")
        raster = geotiff.decode(self.labels.read(entry), entry.path, VALUE_DTYPES, 1, self.spec.patch_px)
        values, wrong = ClassMap(self.layout.values[LABEL_ARRAY]).apply(raster.pixels[0], raster.nodata)
        if wrong is not None:
            allowed = f"0-{len(self.spec.values[0].values) - 1} and {IGNORE}"
            raise Rejected("label_out_of_range", entry.path, f"it has the value {wrong}; allowed are {allowed}")
        if (values == IGNORE).all():
            raise Rejected("label_empty", entry.path, f"every pixel is {IGNORE} (ignore)")
        return values


def open_zarr_zips(root: str | Path, labels: str | Path | None = None, work: Path | None = None) -> ZarrArchive:
    """Lists stores and labels; inputs are the locations of the stores that have a label.

    Args:
        root: Folder with the stores, at any depth in folders S1GRD and S2L1C.
        labels: Folder with `dw_noisy_labels/`, packed or not; None: `root`.
        work: See `take_inventory`.

    Raises:
        ArchiveMissingError: there is no store of S1 or of S2 L1C.
        ArchiveEmptyError: no location of the stores has a label.
        UnreadableInputError: no store can be read, or the stores' bands or sizes differ.
    """
    root = Path(root).resolve()
    found = _find(root)
    problems: dict[str, Rejected] = {}
    held: dict[Modality, dict[str, _Held]] = {}
    repeated: list[tuple[Modality, str, _Held, _Held]] = []
    stores: list[ZarrZip] = []
    forms: dict[Modality, Counter[tuple[tuple[str, ...], int, int]]] = {"s1": Counter(), "s2": Counter()}
    for modality, files in found.items():
        held[modality] = {}
        for store in files:
            try:
                ids, form = _list_locations(modality, store)
            except Rejected as problem:
                problems[store.name] = problem
            else:
                forms[modality][form] += 1
                for row, key in enumerate(ids):
                    place = _Held(len(stores), row)
                    if (first := held[modality].setdefault(key, place)) != place:
                        repeated.append((modality, key, first, place))
            stores.append(store)
    for modality, counts in forms.items():
        if len(counts) != 1:
            seen = "; ".join(map(str, counts)) or next(str(p) for name, p in problems.items() if _modality(name) == modality)
            raise UnreadableInputError(
                f"The {modality} stores in {root} do not have one form (bands, seasons, size) in common: {seen}. Convert stores "
                "of one release at a time."
            )
    (s2_bands, num_seasons, patch_px), (s1_bands, s1_seasons, s1_px) = next(iter(forms["s2"])), next(iter(forms["s1"]))
    if (num_seasons, patch_px) != (s1_seasons, s1_px):
        raise UnreadableInputError(
            f"{root} has {s1_seasons} seasons of {s1_px} px of S1 and {num_seasons} of {patch_px} px of S2; they must agree."
        )
    duplicates: Counter[str] = Counter()
    for modality, key, first, second in repeated:
        if _same(stores, first, second):
            duplicates[key] += modality == "s2"
        else:
            names = f"{stores[first.store].name} and {stores[second.store].name}"
            problems[key] = Rejected("conflicting_duplicate", key, f"{names} both hold the location, with other pixels")
    layout = load(LABELS)
    label_root = root if labels is None else Path(labels).resolve()
    inventory = take_inventory(label_root, layout.match, work)
    labelled = set(inventory.keys(LABEL_ARRAY))
    there = held["s1"].keys() | held["s2"].keys()
    damaged = {name for name in problems if name.endswith(SUFFIX)}
    if not labelled & there:
        raise ArchiveEmptyError(
            f"None of the {len(there)} locations of the stores in {root} has a label in {label_root}: put dw_noisy_labels/ or "
            "ssl4eo_s12_nol.zip of NoLDO-S12 there (tools/download.py fetches it)."
        )
    bands: dict[Modality, tuple[str, ...]] = {"s1": s1_bands, "s2": s2_bands}
    contracts = {m: NORMALISATION[m].select([band for band in BANDS[m] if band in bands[m]]) for m in MODALITIES}
    digest = hashlib.sha256(inventory.fingerprint.encode())
    for store in stores:
        digest.update(f"{store.name}\0{store.size}\0{store.mtime_ns}\n".encode())
    return ZarrArchive(
        spec=SampleSpec(
            patch_px=patch_px,
            num_seasons=num_seasons,
            images=(ArraySpec("s1", contracts["s1"].bands, 1, "s1"), ArraySpec("s2", contracts["s2"].bands, 1, "s2")),
            values=(ValueSpec(LABEL_ARRAY, layout.values[LABEL_ARRAY].names),),
            normalisation=contracts,
            normalised_by={"s1": "converter", "s2": "converter"},
        ),
        keys=tuple(sorted((labelled & there) | damaged)),
        duplicates=duplicates,
        asides={"unlabelled": len(there - labelled), "strays": inventory.num_strays - (len(stores) if label_root == root else 0)},
        fingerprint=digest.hexdigest(),
        size_bytes=inventory.size_bytes + sum(store.size for store in stores),
        stores=tuple(stores),
        held=held,
        bands=bands,
        offset=_measure_offset(stores, held["s2"], s2_bands),
        problems=problems,
        labels=inventory,
        layout=layout,
    )


def _find(root: Path) -> dict[Modality, list[ZarrZip]]:
    """The stores of each modality, sorted by path."""
    found: dict[Modality, list[ZarrZip]] = {"s1": [], "s2": []}
    others: set[str] = set()
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            if file.endswith(SUFFIX):
                store = find_zarr_zip(Path(folder, file), root)
                modality = _modality(store.name)
                found[modality].append(store) if modality else others.add(Path(folder).name)
    for modality, stores in found.items():
        if not stores:
            hint = f" ({', '.join(sorted(others))} is not what is needed)" if others else ""
            raise ArchiveMissingError(
                f"{root} has no {SUFFIX} files in a folder {_FOLDERS[modality][0].upper()}{hint}; S1GRD and S2L1C of the Zarr "
                "form of SSL4EO-S12 v1.1 are both needed."
            )
    return found


def _modality(name: str) -> Modality | None:
    """The modality of a store by the name of the folder it is in."""
    folder = Path(name).parent.name.lower()
    return next((modality for modality, names in _FOLDERS.items() if folder in names), None)


def _list_locations(modality: Modality, file: ZarrZip) -> tuple[list[str], tuple[tuple[str, ...], int, int]]:
    """The ids in a store, in order of rows, and the form of its pixels: bands, seasons and side."""
    with file.open() as store:
        shape, dtype = store.shape("bands"), store.dtype("bands")
        ids = store.read("sample").astype(str).tolist()
        bands = tuple(_our_name(band) for band in store.read("band").astype(str).tolist())
        if len(shape) != 5 or shape[0] != len(ids) or shape[2] != len(bands) or shape[3] != shape[4]:
            raise Rejected("wrong_size", file.name, f"its shape is {shape}; expected ({len(ids)}, seasons, {len(bands)}, H, H)")
        if dtype.name not in _DTYPES[modality]:
            raise Rejected("wrong_dtype", file.name, f"its pixels are {dtype}; expected {' or '.join(_DTYPES[modality])}")
        if modality == "s2" and CIRRUS not in bands:
            raise Rejected("l2a", file.name, f"it has no {CIRRUS}: it is an L2A product; expected L1C (13 bands)")
        if len(set(bands)) != len(bands) or not set(bands) <= set(BANDS[modality]):
            raise Rejected("wrong_bands", file.name, f"its bands are {', '.join(bands)}; expected {', '.join(BANDS[modality])}")
        if any(re.fullmatch("[0-9]{7}", key) is None for key in ids) or len(set(ids)) != len(ids):
            raise Rejected("unreadable", file.name, "its samples are not named by distinct ids of 7 digits")
        return ids, (bands, shape[1], shape[3])


def _measure_offset(stores: list[ZarrZip], held: dict[str, _Held], bands: tuple[str, ...]) -> int:
    """OFFSET_DN where the cirrus band of the first location that can be read says so, else 0."""
    for place in held.values():
        try:
            with stores[place.store].open() as store:
                cirrus = store.read("bands", place.row, place.row + 1)[0, :, bands.index(CIRRUS)]
        except Rejected:
            continue  # it is counted when it is read
        return OFFSET_DN if np.median(cirrus) >= OFFSET_DN / 2 else 0
    return 0  # no location can be read


def _same(stores: list[ZarrZip], first: _Held, second: _Held) -> bool:
    """Whether two rows hold the same scenes and pixels."""
    try:
        with stores[first.store].open() as one, stores[second.store].open() as other:
            return all(
                np.array_equal(one.read(name, first.row, first.row + 1), other.read(name, second.row, second.row + 1))
                for name in ("file_id", "bands")
            )
    except Rejected:
        return False


def _check(values: Pixels, path: str, band: str, offset: int) -> None:
    """Raises Rejected for values that are none, and for bands that hold nothing but nodata (0)."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise Rejected("non_finite", path, f"{int((~np.isfinite(values)).sum())} pixels of {band} are NaN or infinite")
    if (values == 0).all() or (offset and (values == offset).all()):
        raise Rejected("nodata_only", path, f"every pixel of {band} is {values.flat[0]}")


def _place(store: Store, row: int) -> Json:
    """Where a location lies: crs, transform of the grid (pixel corners), and lon and lat of its centre (degrees)."""
    crs, lon, lat = (store.read(name, row, row + 1).item() for name in ("crs", "center_lon", "center_lat"))
    x, y = (store.read(name, row, row + 1)[0].astype(float) for name in ("x_", "y_"))
    step_x, step_y = float(x[1] - x[0]), float(y[1] - y[0])
    grid = [step_x, 0.0, float(x[0]) - step_x / 2, 0.0, step_y, float(y[0]) - step_y / 2]  # x and y are those of pixel centres
    known = all(map(np.isfinite, (*grid, lon, lat))) and abs(lon) <= 180 and abs(lat) <= 90
    if not known:
        return {"crs": None, "transform": None, "lon": None, "lat": None}
    return {"crs": f"EPSG:{int(crs)}", "transform": grid, "lon": round(lon, 6), "lat": round(lat, 6)}


def _our_name(band: str) -> str:
    """B01 is B1, vv is VV."""
    return re.sub(r"^B0", "B", band.upper())


def _time(scene: str, path: str = "") -> str:
    """Acquisition time in the name of a scene, YYYYMMDDTHHMMSS."""
    found = _TIME.search(scene)
    if found is None:
        raise Rejected("unreadable", path, f"the scene {scene!r} has no time in its name")
    return found.group()

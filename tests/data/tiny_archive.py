"""A tiny archive in the true layout, with satellites that do not sort by date, and what can go wrong with one."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio import Affine

from cromss_dist.schema import IMAGE_ARRAYS, NUM_CLASSES

PATCH_PX = 48
KEYS = ("0000003", "0000012", "0000200")
S2_TIMES = ("20200323T054639", "20200621T054640", "20200924T054641", "20201228T054642")
S2_SCENES = tuple(f"{time}_{time}_T43RCP" for time in S2_TIMES)
# In order of time. Sorted as text, the two of S1A come first.
S1_SCENES = (
    "S1A_IW_GRDH_1SDV_20200329T010800_20200329T010825_032904_03CFBA_D457",
    "S1B_IW_GRDH_1SDV_20200627T010800_20200627T010825_032904_03CFBA_D458",
    "S1B_IW_GRDH_1SDV_20200928T010800_20200928T010825_032904_03CFBA_D459",
    "S1A_IW_GRDH_1SDV_20201230T010800_20201230T010825_032904_03CFBA_D45A",
)
Pixels = npt.NDArray[np.generic]


def write_tif(path: Path, pixels: Pixels, nodata: float | None = None) -> None:
    """One band in EPSG:4326, uncompressed, as the archive has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": pixels.dtype.name, "crs": "EPSG:4326"}
    with rasterio.open(path, "w", **profile, nodata=nodata, transform=Affine(9e-5, 0, 73, 0, -9e-5, 30)) as dataset:
        dataset.write(pixels, 1)


def write_archive(root: Path, keys: tuple[str, ...] = KEYS, as_uint8: bool = False) -> Path:
    """Random pixels of plausible range; every location, season and band differs from every other."""
    rng = np.random.default_rng(7)
    for key in keys:
        for s1_scene, s2_scene in zip(S1_SCENES, S2_SCENES, strict=True):
            for spec in IMAGE_ARRAYS:
                folder = (
                    root / ("s1" if spec.modality == "s1" else "s2c") / key / (s1_scene if spec.modality == "s1" else s2_scene)
                )
                shape = (PATCH_PX // spec.scale, PATCH_PX // spec.scale)
                for band in spec.bands:
                    if as_uint8:
                        pixels: Pixels = rng.integers(1, 256, shape, dtype=np.uint8)
                    elif spec.modality == "s1":
                        pixels = rng.normal(-15, 5, shape).astype(np.float32)
                    else:
                        pixels = rng.integers(1, 5000, shape, dtype=np.uint16)
                    write_tif(folder / f"{band}.tif", pixels)
                (folder / "metadata.json").write_text(json.dumps({"PROCESSING_BASELINE": "02.09"}))
            for name, file, values in (
                ("dw_noisy_labels", "label", 9),
                ("reference_labels", "label", 9),
                ("noise_kinds", "kind", 5),
            ):
                coarse = rng.integers(0, values, (12, 12), dtype=np.uint8)
                write_tif(root / name / key / s2_scene / f"{file}.tif", np.repeat(np.repeat(coarse, 4, 0), 4, 1))
    with (root / "dw_complete_ids.csv").open("w", newline="") as table:
        csv.writer(table).writerows([["ids", "sub1", "sub2", "sub3", "sub4"], *([int(key), *S2_SCENES] for key in keys)])
    return root


Damage = Callable[[Path], object]
S2_FOLDER = f"s2c/0000012/{S2_SCENES[1]}"
S1_FOLDER = f"s1/0000012/{S1_SCENES[1]}"
LABEL = f"dw_noisy_labels/0000012/{S2_SCENES[1]}/label.tif"


def cut(path: Path, share: float) -> None:
    """Keeps the first `share` of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _edit(path: Path, change: Callable[[Pixels], Pixels], nodata: float | None = None) -> None:
    with rasterio.open(path) as dataset:
        pixels = dataset.read(1)
    write_tif(path, change(pixels), nodata)


def _put(value: float) -> Callable[[Pixels], Pixels]:
    def change(pixels: Pixels) -> Pixels:
        pixels[3, 4] = value
        return pixels

    return change


def _declare_400_mb(path: Path) -> None:
    profile = {"driver": "GTiff", "height": 20000, "width": 20000, "count": 1, "dtype": "uint8", "SPARSE_OK": True}
    with rasterio.open(path, "w", **profile, transform=Affine(9e-5, 0, 73, 0, -9e-5, 30)):
        pass


def _write_vrt(path: Path) -> None:
    """A VRT that is called .tif and shows the pixels of another file, which GDAL would read if it were let."""
    path.write_text(
        '<VRTDataset rasterXSize="48" rasterYSize="48"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{path.with_name('B2.tif')}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )


def _link_away(path: Path) -> None:
    target = path.parents[4] / "outside.tif"
    path.rename(target)
    path.symlink_to(target)


def _remove_everywhere(root: Path, key: str) -> None:
    for folder in root.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder / key)


def _copy_scene(folder: Path, date: str, other_date: str) -> None:
    shutil.copytree(folder, folder.with_name(folder.name.replace(date, other_date)))


def append_line(root: Path, *cells: str) -> None:
    """Adds a line to the csv."""
    with (root / "dw_complete_ids.csv").open("a") as table:
        table.write(",".join(cells) + "\n")


# What can go wrong with location 0000012, and the reason the ledger must give.
TRAPS: dict[str, tuple[str, Damage]] = {
    "file of 0 bytes": ("truncated", lambda r: cut(r / S2_FOLDER / "B3.tif", 0)),
    "file of 8 bytes": ("truncated", lambda r: (r / S1_FOLDER / "VH.tif").write_bytes(b"II*\0\x08\0\0\0")),
    "file cut in half": ("truncated", lambda r: cut(r / S2_FOLDER / "B3.tif", 0.5)),
    "label cut at 99 %": ("truncated", lambda r: cut(r / LABEL, 0.99)),
    "VRT called tif": ("unreadable", lambda r: _write_vrt(r / S2_FOLDER / "B3.tif")),
    "link out of the archive": ("path_escape", lambda r: _link_away(r / S2_FOLDER / "B3.tif")),
    "header of 400 MB": ("too_big", lambda r: _declare_400_mb(r / LABEL)),
    "band of another size": ("wrong_size", lambda r: _edit(r / S2_FOLDER / "B5.tif", lambda p: p[:-1])),
    "label as float": ("wrong_dtype", lambda r: _edit(r / LABEL, lambda p: p.astype(np.float32))),
    "uint8 among uint16": ("wrong_dtype", lambda r: _edit(r / S2_FOLDER / "B2.tif", lambda p: p.astype(np.uint8))),
    "NaN in radar": ("non_finite", lambda r: _edit(r / S1_FOLDER / "VV.tif", _put(np.nan))),
    "band of nodata": ("nodata_only", lambda r: _edit(r / S2_FOLDER / "B4.tif", np.zeros_like)),
    "class 9": ("label_out_of_range", lambda r: _edit(r / LABEL, _put(NUM_CLASSES))),
    "label all ignored": ("label_empty", lambda r: _edit(r / LABEL, lambda p: np.full_like(p, 255))),
    "label all nodata": ("label_empty", lambda r: _edit(r / LABEL, lambda p: np.full_like(p, 77), 77)),
    "no label file": ("missing_label", lambda r: (r / LABEL).unlink()),
    "no label scene": ("missing_label", lambda r: shutil.rmtree((r / LABEL).parent)),
    "no label folder": ("missing_label", lambda r: shutil.rmtree((r / LABEL).parents[1])),
    "no reference": ("missing_file", lambda r: shutil.rmtree(r / "reference_labels" / "0000012")),
    "no S1 season": ("missing_season", lambda r: shutil.rmtree(r / S1_FOLDER)),
    "no S2 season": ("missing_season", lambda r: shutil.rmtree(r / S2_FOLDER)),
    "no S1 at all": ("missing_modality", lambda r: shutil.rmtree(r / "s1" / "0000012")),
    "a fifth S1 scene": ("missing_season", lambda r: _copy_scene(r / S1_FOLDER, "20200627", "20200628")),
    "no B7": ("missing_file", lambda r: (r / S2_FOLDER / "B7.tif").unlink()),
    "L2A": ("l2a", lambda r: (r / S2_FOLDER / "B10.tif").unlink()),
    "broken metadata": ("bad_metadata", lambda r: (r / S2_FOLDER / "metadata.json").write_text("{")),
    "listed twice, differently": ("conflicting_duplicate", lambda r: append_line(r, "12", *S2_SCENES[::-1])),
    "listed, not on disk": ("missing_label", lambda r: _remove_everywhere(r, "0000012")),
}

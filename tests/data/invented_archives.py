"""Small archives of layouts that nobody here has seen, with what their description must come to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio import Affine

from cromss_dist.schema import IMAGE_ARRAYS, S2_BANDS

PX = 48
DAYS = ("20200323", "20200621", "20200924", "20201228")
Pixels = npt.NDArray[np.generic]


def write_tif(path: Path, pixels: Pixels) -> None:
    """(bands, H, W) in UTM at 10 m."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": bands, "dtype": pixels.dtype.name}
    with rasterio.open(path, "w", **profile, crs="EPSG:32632", transform=Affine(10, 0, 5e5, 0, -10, 5e6)) as dataset:
        dataset.write(pixels)


class Pixel:
    """Random pixels of plausible range, another draw at each call."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(5)

    def s1(self, bands: int = 1) -> npt.NDArray[np.float32]:
        return self._rng.normal(-14, 4, (bands, PX, PX)).astype(np.float32)

    def linear(self) -> npt.NDArray[np.float32]:
        return np.power(10, self.s1(2) / 10, dtype=np.float32)

    def s2(self, bands: int = 1, scale: int = 1) -> npt.NDArray[np.uint16]:
        return self._rng.integers(200, 6000, (bands, PX // scale, PX // scale)).astype(np.uint16)

    def reflectance(self) -> Pixels:
        return self._rng.uniform(0.01, 0.7, (1, PX, PX)).astype(np.float32)

    def label(self, values: tuple[int, ...]) -> Pixels:
        coarse = self._rng.choice(np.array(values, np.uint8), (6, 6))
        return np.repeat(np.repeat(coarse, 8, 0), 8, 1)[None]


NINE = tuple(range(9))
SCALE = {band: spec.scale for spec in IMAGE_ARRAYS for band in spec.bands}


def _date_folders(root: Path, pixel: Pixel) -> None:
    """A folder a tile and date, a file a band, ESA's band names; labels in another tree."""
    for tile in ("0012", "0013", "0207"):
        for day in DAYS:
            date = f"{day[:4]}-{day[4:6]}-{day[6:]}"
            for band in S2_BANDS:
                named = f"B{band[1:]:0>2}" if band != "B8A" else band
                write_tif(root / "tiles" / tile / date / f"S2_{named}.tif", pixel.s2(1, SCALE[band]))
            for band in ("VV", "VH"):
                write_tif(root / "tiles" / tile / date / f"S1_{band}.tif", pixel.s1())
            write_tif(root / "labels" / tile / f"{date}.tif", pixel.label(NINE))


def _stacks(root: Path, pixel: Pixel) -> None:
    """One file a modality and place; the classes are WorldCover's numbers."""
    for place in range(5, 12):
        write_tif(root / "sentinel2" / f"roi_{place}.tif", pixel.s2(13))
        write_tif(root / "sentinel1" / f"roi_{place}.tif", pixel.s1(2))
        write_tif(root / "landcover" / f"roi_{place}.tif", pixel.label((10, 20, 30, 50)))


def _towns(root: Path, pixel: Pixel) -> None:
    """A folder a town, names with dates that differ by modality, four bands."""
    for town in ("aachen", "bonn", "celle", "dresden"):
        for day, later in zip(DAYS, ("20200325", "20200622", "20200930", "20201229"), strict=True):
            write_tif(root / town / f"s2_{day}.tif", pixel.s2(4))
            write_tif(root / town / f"s1_{later}.tif", pixel.s1(2))
            write_tif(root / town / f"mask_{day}.tif", pixel.label((0, 1, 2)))


def _products(root: Path, pixel: Pixel) -> None:
    """Folders called as ESA calls products; one label for all seasons; radar in linear power."""
    for patch in range(3):
        for day in DAYS:
            s2 = f"S2A_MSIL1C_{day}T054639_N0209_R005_T43RCP_{day}T080000"
            for band in S2_BANDS:
                write_tif(root / f"patch_{patch:04}" / s2 / f"{band}.tif", pixel.s2(1, SCALE[band]))
            s1 = f"S1{'AB'[patch % 2]}_IW_GRDH_1SDV_{day}T010800_{day}T010825_032904_03CFBA_D457"
            write_tif(root / f"patch_{patch:04}" / f"{s1}.tif", pixel.linear())
        write_tif(root / f"patch_{patch:04}" / "label.tif", pixel.label(NINE))


def _colours(root: Path, pixel: Pixel) -> None:
    """Bands called by colours, reflectance as float, no radar, two splits."""
    for split, places in (("train", (1, 2, 3, 4)), ("test", (7, 8))):
        for place in places:
            for colour in ("red", "green", "blue", "nir"):
                write_tif(root / split / "optical" / f"{place:05}_{colour}.tif", pixel.reflectance())
            write_tif(root / split / "gt" / f"{place:05}.tif", pixel.label((0, 1)))


def _seasons(root: Path, pixel: Pixel) -> None:
    """As SEN12MS: region, season and number in folder and name, and a patch number."""
    for season, roi in (("spring", 1158), ("summer", 1868), ("fall", 1970), ("winter", 2017)):
        for scene in (3, 44):
            for patch in (30, 31, 107):
                for kind, pixels in (("s1", pixel.s1(2)), ("s2", pixel.s2(13)), ("lc", pixel.label(NINE))):
                    name = f"ROIs{roi}_{season}_{kind}_{scene}_p{patch}.tif"
                    write_tif(root / f"ROIs{roi}_{season}" / f"{kind}_{scene}" / name, pixels)


def _named_seasons(root: Path, pixel: Pixel) -> None:
    """A folder a season, in words; one label for all; towns with letters that are not ASCII."""
    for town in ("Köln", "Nîmes", "Zürich", "Łódź"):
        for season in ("summer", "winter"):
            write_tif(root / season / "s1" / f"{town}.tif", pixel.s1(2))
            write_tif(root / season / "s2" / f"{town}.tif", pixel.s2(4))
        write_tif(root / "label" / f"{town}.tif", pixel.label((0, 1, 2)))


def _scene_is_place(root: Path, pixel: Pixel) -> None:
    """As Planet names scenes: day, second, satellite; nothing but the scene names the place."""
    for number in range(4):
        scene = f"2020032{number}_05463{number}_{number}_0f1{number}"
        write_tif(root / "images" / f"{scene}_3B_AnalyticMS_SR.tif", pixel.s2(4))
        write_tif(root / "labels" / f"{scene}_mask.tif", pixel.label((0, 1)))


@dataclass(frozen=True)
class Invented:
    """An archive and what becomes of it.

    Args:
        write: Makes it.
        locations: It has.
        seasons: Of each.
        arrays: Names and channels of its images.
        classes: Of the label.
    """

    write: Callable[[Path, Pixel], None]
    locations: int
    seasons: int
    arrays: dict[str, int]
    classes: int


ALL = {"s1": 2, "s2_10m": 4, "s2_20m": 6, "s2_60m": 3}
INVENTED = {
    "date folders": Invented(_date_folders, 3, 4, ALL, 9),
    "stacks": Invented(_stacks, 7, 1, {"s1": 2, "s2": 13}, 4),
    "towns": Invented(_towns, 4, 4, {"s1": 2, "s2": 4}, 3),
    "products": Invented(_products, 3, 4, ALL, 9),
    "colours": Invented(_colours, 6, 1, {"s2": 4}, 2),
    "seasons": Invented(_seasons, 24, 1, {"s1": 2, "s2": 13}, 9),
    "named seasons": Invented(_named_seasons, 4, 2, {"s1": 2, "s2": 4}, 3),
    "scene is place": Invented(_scene_is_place, 4, 1, {"s2": 4}, 2),
}

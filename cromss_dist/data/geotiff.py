"""Reads one single-band GeoTIFF of an archive, and refuses what it cannot vouch for.

Only GDAL's GTiff driver is opened, whatever the file says it is, and no neighbour of a file is looked at: a VRT that
is called .tif could otherwise read any file or URL.
"""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform
from rasterio.windows import Window

from cromss_dist.data.sample import Rejected

MAX_RASTER_BYTES = 16 * 2**20  # of pixels a header may declare; an archive band has 0.3 MB


@dataclass(frozen=True)
class Raster:
    """The pixels of a single-band GeoTIFF, shape (H, W)."""

    pixels: npt.NDArray[np.generic]
    nodata: float | None
    cropped: bool  # a surplus last row or column was left out


@dataclass(frozen=True)
class Header:
    """Size and type of a single-band GeoTIFF."""

    height: int
    width: int
    dtype: str


@dataclass(frozen=True)
class Place:
    """Coordinate reference system and centre (degrees) of a GeoTIFF; None where there is none."""

    crs: str | None
    lon: float | None
    lat: float | None


@contextmanager
def gdal_environment() -> Iterator[None]:
    """GDAL without directory listings, sidecar files and growing caches; hold it open around many reads."""
    with (
        rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO", GDAL_CACHEMAX=64),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pixels count here; a place without one is stored as null
        yield


def inside(root: Path, path: str) -> Path:
    """The full path of a regular file of the archive. Raises Rejected: missing_file, path_escape."""
    full = root / path
    if not Path(os.path.realpath(full)).is_relative_to(root):
        raise Rejected("path_escape", path, "it is a link that leaves the archive")
    if not full.is_file():
        raise Rejected("missing_file", path, "the file is not there")
    return full


@contextmanager
def _open(root: Path, path: str) -> Iterator[rasterio.DatasetReader]:
    full = inside(root, path)
    if os.path.getsize(full) < 16:  # smaller than any TIFF with a directory
        raise Rejected("truncated", path, f"it has {os.path.getsize(full)} bytes")
    try:
        with rasterio.open(full, driver="GTiff") as dataset:
            if dataset.count != 1:
                raise Rejected("wrong_bands", path, f"it has {dataset.count} bands in one file; expected 1")
            yield dataset
    except (RasterioError, CRSError) as error:
        raise Rejected("unreadable", path, f"GDAL's GTiff driver says: {error}") from error


def read_header(root: Path, path: str) -> Header:
    """Size and type without the pixels. Raises Rejected as `read_raster` does."""
    with _open(root, path) as dataset:
        return Header(dataset.height, dataset.width, dataset.dtypes[0])


def read_raster(root: Path, path: str, dtypes: tuple[str, ...], size_px: int | None) -> Raster:
    """Reads all pixels, after the header has been found plausible.

    Args:
        root: The archive, a resolved path that no file may leave.
        path: Relative to `root`.
        dtypes: Pixel types that are accepted.
        size_px: Nominal side: this or one more is accepted, and the surplus last row or column is not read.
            None accepts any size.

    Raises:
        Rejected: missing_file, path_escape, truncated, unreadable, wrong_bands, wrong_dtype, too_big or wrong_size.
    """
    with _open(root, path) as dataset:
        height, width, dtype = dataset.height, dataset.width, dataset.dtypes[0]
        declared = height * width * np.dtype(dtype).itemsize
        if declared > MAX_RASTER_BYTES:
            raise Rejected("too_big", path, f"its header declares {height} x {width} {dtype}, {declared} bytes of pixels")
        if dtype not in dtypes:
            raise Rejected("wrong_dtype", path, f"its pixels are {dtype}; expected {' or '.join(dtypes)}")
        if size_px is not None:
            if not (size_px <= height <= size_px + 1 and size_px <= width <= size_px + 1):
                raise Rejected("wrong_size", path, f"it has {height} x {width} px; expected {size_px} x {size_px}, or one more")
            height = width = size_px
        pixels = dataset.read(1, window=Window(0, 0, width, height))
        return Raster(pixels, dataset.nodata, pixels.shape != dataset.shape)


def read_place(root: Path, path: str) -> Place:
    """Where a raster lies; raises Rejected as `read_raster` does for what is no GeoTIFF."""
    with _open(root, path) as dataset:
        if dataset.crs is None:
            return Place(None, None, None)
        left, bottom, right, top = dataset.bounds
        x, y = (left + right) / 2, (bottom + top) / 2
        if dataset.crs.to_epsg() != 4326:
            try:
                (x,), (y,) = transform(dataset.crs, "EPSG:4326", [x], [y])
            except CPLE_BaseError:  # GDAL's own, which is no RasterioError: the point is not on Earth
                x = y = math.nan
        lon, lat = (round(float(degrees), 6) if math.isfinite(degrees) else None for degrees in (x, y))
        return Place(dataset.crs.to_string(), lon, lat)

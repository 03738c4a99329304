"""Decodes GeoTIFFs from bytes, and refuses what it cannot vouch for.

The header is read here, with every bound checked before a byte is decoded; libtiff (imagecodecs) decodes the pixels,
several times faster than GDAL opens a file; GDAL says only where a raster lies, and only its GTiff driver is asked,
whatever the data is called: a VRT named .tif could otherwise read any file or URL.
"""

import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import imagecodecs
import numpy as np
import numpy.typing as npt
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.warp import transform

from cromss_dist.data.archives.tiff_directory import TAG_BYTES, Directory, Header, Refused, Segments, directory_of
from cromss_dist.data.sample import Rejected

# What GDAL takes a place from: size; ModelPixelScale, IntergraphMatrix, ModelTiepoint, ModelTransformation, three tags of GeoTIFF
# keys; its own metadata; rational polynomials.
_PLACE_TAGS = (256, 257, 33550, 33920, 33922, 34264, 34735, 34736, 34737, 42112, 50844)
# Markers of a JPEG (ITU-T T.81, table B.1): of frames that are sequential and Huffman-coded; of its end; of tables and notes.
_SEQUENTIAL, _END, _NO_FRAME = (0xC0, 0xC1), 0xD9, {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}


@dataclass(frozen=True)
class Raster:
    """The pixels of a GeoTIFF, shape (bands, H, W)."""

    pixels: npt.NDArray[np.generic]
    nodata: float | None
    cropped: bool  # a surplus last row or column was left out


@dataclass(frozen=True)
class Place:
    """Coordinate reference system, centre (degrees) and affine transform (a, b, c, d, e, f); None where there is none."""

    crs: str | None
    lon: float | None
    lat: float | None
    transform: tuple[float, ...] | None
    stated: tuple[bytes, ...] = field(default=(), repr=False, compare=False)  # the tags that say so


def header(data: bytes, path: str) -> Header:
    """Size and type without the pixels. Raises Rejected: truncated, unreadable, wrong_dtype or too_big."""
    return directory_of(data, path).header


def decode(data: bytes, path: str, dtypes: tuple[str, ...], num_bands: int | None, size_px: int | None) -> Raster:
    """Decodes all pixels, after the header has been found plausible.

    Args:
        data: The whole file.
        path: What it is called in errors.
        dtypes: Pixel types that are accepted.
        num_bands: Bands that are expected; None accepts any number.
        size_px: Nominal side: this or one more is accepted, and the surplus last row or column is left out.
            None accepts any size.

    Raises:
        Rejected: truncated, unreadable, wrong_bands, wrong_dtype, too_big or wrong_size.
    """
    directory = directory_of(data, path)
    found = directory.header
    if found.dtype not in dtypes:
        raise Rejected("wrong_dtype", path, f"its pixels are {found.dtype}; expected {' or '.join(dtypes)}")
    if num_bands is not None and found.bands != num_bands:
        raise Rejected("wrong_bands", path, f"it has {found.bands} bands in one file; expected {num_bands}")
    height, width = found.height, found.width
    if size_px is not None:
        if not (size_px <= height <= size_px + 1 and size_px <= width <= size_px + 1):
            raise Rejected("wrong_size", path, f"it has {height} x {width} px; expected {size_px} x {size_px}, or one more")
        height = width = size_px
    try:
        pixels, nodata = _pixels(data, path, directory), directory.nodata
    except Refused as why:
        raise why.of(path) from why
    if pixels.shape[1:] == (height, width):
        return Raster(pixels, nodata, cropped=False)
    return Raster(pixels[:, :height, :width], nodata, cropped=True)


def _pixels(data: bytes, path: str, directory: Directory) -> npt.NDArray[np.generic]:
    """All pixels, shape (bands, H, W)."""
    found = directory.header
    segments = directory.segments
    if (stored := directory.stored) is not None:
        dtype, at = stored
        plain = np.frombuffer(data, dtype, found.height * found.width, at)
        return plain.astype(found.dtype, copy=False).reshape(1, found.height, found.width)
    if (tables := directory.jpeg_tables) is not None:
        grey = _decode_jpeg(data, data[tables], segments, (found.height, found.width))
        if grey is not None:
            return grey[None]
    try:
        pixels = imagecodecs.tiff_decode(data, index=0)
    except (imagecodecs.TiffError, ValueError, IndexError, RuntimeError, MemoryError) as error:
        raise Rejected("unreadable", path, f"libtiff says: {error}") from error
    if found.bands == 1:
        pixels = pixels.reshape(pixels.shape[-2:]) if pixels.size == found.height * found.width else pixels
        shape: tuple[int, ...] = (found.height, found.width)
    elif directory.is_interleaved:
        shape = (found.height, found.width, found.bands)
    else:
        shape = (found.bands, found.height, found.width)
    if pixels.shape != shape or pixels.dtype != np.dtype(found.dtype):
        raise Rejected("unreadable", path, f"libtiff decodes {pixels.dtype} {pixels.shape}; expected {found.dtype} {shape}")
    if found.bands == 1:
        return pixels[None]
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0)) if directory.is_interleaved else pixels


def _decode_jpeg(data: bytes, tables: bytes, segments: Segments, shape: tuple[int, int]) -> npt.NDArray[np.uint8] | None:
    """One grey band in strips of baseline JPEG, uint8 (H, W): libtiff's way to it, by four bytes a pixel, takes twice as long.

    None: they are not as expected, and libtiff may say how. Only it bounds the scans of a progressive JPEG, of which a small
    file can hold enough for hours.
    """
    if tables and _begins_with(tables, 0) != _END:
        return None
    out = np.empty(shape, np.uint8)
    top = 0
    for at, size in zip(segments.offsets, segments.sizes, strict=True):
        if _begins_with(data, at) not in _SEQUENTIAL:
            return None
        try:
            imagecodecs.jpeg8_decode(data[at : at + size], tables=tables or None, out=out[top : top + segments.rows])
        except (imagecodecs.Jpeg8Error, ValueError, RuntimeError, TypeError):
            return None
        top += segments.rows
    return out


def _begins_with(data: bytes, at: int) -> int | None:
    """The marker behind the tables of the JPEG at a byte, which says what kind of frame it is; None: it is no JPEG."""
    if data[at : at + 2] != b"\xff\xd8":
        return None
    at += 2
    while (head := data[at : at + 4])[:1] == b"\xff" and len(head) > 1:
        if head[1] not in _NO_FRAME:
            return head[1]
        at += 2 + int.from_bytes(head[2:], "big")
    return None


def place(data: bytes, path: str, known: Sequence[Place] = ()) -> Place:
    """Where a raster lies; of the `known` places the one that its tags state, since GDAL is slow to ask.

    Raises Rejected as `header` does, and unreadable for what GDAL refuses.
    """
    stated = tuple(
        struct.pack("<HHQ", tag, kind, count) + data[at : at + TAG_BYTES.get(kind, 1) * count]
        for tag, (kind, count, at) in directory_of(data, path).tags.items()
        if tag in _PLACE_TAGS
    )
    for other in known:
        if other.stated == stated:
            return other
    try:
        with (
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO", GDAL_CACHEMAX=64),
            warnings.catch_warnings(),
            MemoryFile(data) as file,
        ):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a raster without a place has None
            with file.open(driver="GTiff") as dataset:
                if dataset.crs is None:
                    return Place(None, None, None, None, stated)
                left, bottom, right, top = dataset.bounds
                x, y = (left + right) / 2, (bottom + top) / 2
                if dataset.crs.to_epsg() != 4326:
                    try:
                        (x,), (y,) = transform(dataset.crs, "EPSG:4326", [x], [y])
                    except CPLE_BaseError:  # GDAL's own, which is no RasterioError: the point is not on Earth
                        x = y = math.nan
                lon, lat = (round(float(degrees), 6) if math.isfinite(degrees) else None for degrees in (x, y))
                return Place(dataset.crs.to_string(), lon, lat, tuple(dataset.transform)[:6], stated)
    except (RasterioError, CRSError, CPLE_BaseError) as error:
        raise Rejected("unreadable", path, f"GDAL's GTiff driver says: {error}") from error

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
from itertools import cycle
from operator import add, lt
from typing import Literal

import imagecodecs
import numpy as np
import numpy.typing as npt
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.warp import transform

from cromss_dist.data.sample import Rejected

MAX_RASTER_BYTES = 32 * 2**20  # of pixels a header may declare; the largest tile of an archive (13 bands, 512 px) has 7 MB
MAX_TAGS = 256
MAX_SEGMENTS = 2**16  # strips or tiles

# Compressions (tag 259) that libtiff as built into imagecodecs decodes to the very pixels GDAL gives.
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "zstd"}

# Tags: TIFF 6.0 (Adobe, 1992); 42113 is GDAL's.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL_ORDER, _SAMPLES, _PLANAR = 256, 257, 258, 259, 266, 277, 284
_SAMPLE_FORMAT, _NODATA = 339, 42113
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # types of a tag's value
# What GDAL takes a place from: size; ModelPixelScale, IntergraphMatrix, ModelTiepoint, ModelTransformation, three tags of GeoTIFF
# keys; its own metadata; rational polynomials.
_PLACE_TAGS = (_WIDTH, _HEIGHT, 33550, 33920, 33922, 34264, 34735, 34736, 34737, 42112, 50844)
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # of a value, by type
_ASCII = 2
_SAMPLE_TYPES = {1: "uint", 2: "int", 3: "float"}


@dataclass(frozen=True)
class Raster:
    """The pixels of a GeoTIFF, shape (bands, H, W)."""

    pixels: npt.NDArray[np.generic]
    nodata: float | None
    cropped: bool  # a surplus last row or column was left out


@dataclass(frozen=True)
class Header:
    """Size and type of a GeoTIFF."""

    height: int
    width: int
    bands: int
    dtype: str


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
    return _Directory(data, path).header


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
    directory = _Directory(data, path)
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
    pixels = directory.pixels()
    cropped = pixels.shape[1:] != (height, width)
    return Raster(pixels[:, :height, :width], directory.nodata, cropped)


def place(data: bytes, path: str, known: Sequence[Place] = ()) -> Place:
    """Where a raster lies; of the `known` places the one that its tags state, since GDAL is slow to ask.

    Raises Rejected as `header` does, and unreadable for what GDAL refuses.
    """
    stated = _Directory(data, path).stated_place
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


class _Directory:
    """The first image file directory of a TIFF or BigTIFF, checked against the bytes that are there."""

    def __init__(self, data: bytes, path: str) -> None:
        self._data, self._path = data, path
        if len(data) < 16:  # smaller than any TIFF with a directory
            raise Rejected("truncated", path, f"it has {len(data)} bytes")
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        version = int.from_bytes(data[2:4], "big" if order == ">" else "little")
        if order is None or version not in (42, 43):
            raise Rejected("unreadable", path, f"it begins with {data[:4]!r}, as no TIFF does")
        self._order, self._big = order, version == 43
        self._integers: dict[int, tuple[int, ...]] = {}  # tags whose values were read
        self._tags = self._read_tags()
        self.header = self._check_header()

    @property
    def nodata(self) -> float | None:
        """GDAL's nodata value, None where there is none."""
        kind, count, at = self._tags.get(_NODATA, (_ASCII, 0, 0))
        if kind != _ASCII or not 0 < count <= 64:
            return None
        try:
            return float(self._bytes(at, count).rstrip(b"\0 "))
        except ValueError:
            return None

    @property
    def stated_place(self) -> tuple[bytes, ...]:
        """The tags that a place follows from: equal ones, equal places."""
        places = {tag: self._tags[tag] for tag in _PLACE_TAGS if tag in self._tags}
        return tuple(
            struct.pack("<HHQ", tag, kind, count) + self._data[at : at + _TAG_BYTES.get(kind, 1) * count]
            for tag, (kind, count, at) in places.items()
        )

    def pixels(self) -> npt.NDArray[np.generic]:
        """All pixels, shape (bands, H, W)."""
        found = self.header
        self._check_segments()
        if (stored := self._stored()) is not None:
            return stored
        try:
            pixels = imagecodecs.tiff_decode(self._data, index=0)
        except (imagecodecs.TiffError, ValueError, RuntimeError, MemoryError) as error:
            raise Rejected("unreadable", self._path, f"libtiff says: {error}") from error
        if found.bands == 1:
            pixels = pixels.reshape(pixels.shape[-2:]) if pixels.size == found.height * found.width else pixels
            shape: tuple[int, ...] = (found.height, found.width)
        elif self._one(_PLANAR, 1) == 1:
            shape = (found.height, found.width, found.bands)
        else:
            shape = (found.bands, found.height, found.width)
        if pixels.shape != shape or pixels.dtype != np.dtype(found.dtype):
            raise Rejected(
                "unreadable", self._path, f"libtiff decodes {pixels.dtype} {pixels.shape}; expected {found.dtype} {shape}"
            )
        if found.bands == 1:
            return pixels[None]
        return pixels if self._one(_PLANAR, 1) == 2 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))

    def _stored(self) -> npt.NDArray[np.generic] | None:
        """One uncompressed band whose strips lie one behind the other is there already, as most bands of an archive are.

        None: it is not so. What libtiff would make of these bytes is the same, at some fifteen times the cost.
        """
        found = self.header
        plain = {_COMPRESSION: 1, _SAMPLES: 1, _FILL_ORDER: 1}
        if _TILE_OFFSETS in self._tags or any(self._one(tag, value) != value for tag, value in plain.items()):
            return None
        offsets, sizes = self._values(_STRIP_OFFSETS), self._values(_STRIP_BYTES)
        dtype = np.dtype(self._order + np.dtype(found.dtype).str[1:])
        consecutive = tuple(map(add, offsets[:-1], sizes[:-1])) == offsets[1:]
        if not consecutive or sum(sizes) != found.height * found.width * dtype.itemsize:
            return None
        pixels = np.frombuffer(self._data, dtype, found.height * found.width, offsets[0])
        return pixels.astype(found.dtype, copy=False).reshape(1, found.height, found.width)

    def _read_tags(self) -> dict[int, tuple[int, int, int]]:
        """Type, count and place of the value of each tag."""
        width, entry = (8, struct.Struct(self._order + "HHQ8s")) if self._big else (4, struct.Struct(self._order + "HHI4s"))
        endian: Literal["little", "big"] = "little" if self._order == "<" else "big"
        at = self._integer(8, 8) if self._big else self._integer(4, 4)
        counted = 8 if self._big else 2
        number = self._integer(at, counted)
        if not 0 < number <= MAX_TAGS:
            raise Rejected("unreadable", self._path, f"its directory has {number} tags; 1 to {MAX_TAGS} are plausible")
        at += counted
        directory = self._bytes(at, number * entry.size)
        tags: dict[int, tuple[int, int, int]] = {}
        for index, (tag, kind, count, value) in enumerate(entry.iter_unpack(directory)):
            size = _TAG_BYTES.get(kind, 1)
            if size * count > width:
                tags[tag] = (kind, count, int.from_bytes(value, endian))
                continue
            tags[tag] = (kind, count, at + index * entry.size + entry.size - width)
            if count == 1 and kind in _INTEGERS:  # most tags; read at once, since that is most of the time a header takes
                self._integers[tag] = (int.from_bytes(value[:size], endian),)
        return tags

    def _check_header(self) -> Header:
        width, height, bands = self._one(_WIDTH), self._one(_HEIGHT), self._one(_SAMPLES, 1)
        bits, formats = set(self._values(_BITS, (1,))), set(self._values(_SAMPLE_FORMAT, (1,)))
        if not (width and height and bands):
            raise Rejected("unreadable", self._path, f"its header declares {bands} bands of {height} x {width} px")
        kind = _SAMPLE_TYPES.get(next(iter(formats)), "no number") if len(formats) == 1 else "mixed"
        dtype = f"{kind}{next(iter(bits)) if len(bits) == 1 else sorted(bits)}"
        try:
            itemsize = np.dtype(dtype).itemsize
        except TypeError as error:
            raise Rejected("wrong_dtype", self._path, f"its pixels are {dtype}") from error
        declared = width * height * bands * itemsize
        if declared > MAX_RASTER_BYTES:
            raise Rejected(
                "too_big", self._path, f"its header declares {bands} x {height} x {width} {dtype}, {declared} bytes of pixels"
            )
        return Header(height, width, bands, dtype)

    def _check_segments(self) -> None:
        """Every strip or tile must lie inside the file: decoders differ in what they make of one that does not."""
        found = self.header
        compression = self._one(_COMPRESSION, 1)
        if compression not in COMPRESSIONS:
            raise Rejected(
                "unreadable",
                self._path,
                f"its compression is number {compression}; known are {sorted(set(COMPRESSIONS.values()))}",
            )
        planar = self._one(_PLANAR, 1)
        if planar not in (1, 2):
            raise Rejected("unreadable", self._path, f"its planar configuration is {planar}")
        if _TILE_OFFSETS in self._tags:
            offsets, sizes = self._values(_TILE_OFFSETS), self._values(_TILE_BYTES)
            rows, columns = self._one(_TILE_HEIGHT), self._one(_TILE_WIDTH)
        else:
            offsets, sizes = self._values(_STRIP_OFFSETS), self._values(_STRIP_BYTES)
            rows, columns = min(self._one(_ROWS_PER_STRIP, found.height), found.height), found.width
        itemsize = np.dtype(found.dtype).itemsize * (found.bands if planar == 1 else 1)
        if not (rows and columns) or rows * columns * itemsize > MAX_RASTER_BYTES:
            raise Rejected("unreadable", self._path, f"its segments have {rows} x {columns} px")
        segments = math.ceil(found.height / rows) * math.ceil(found.width / columns) * (found.bands if planar == 2 else 1)
        if not len(offsets) == len(sizes) == segments:
            raise Rejected(
                "unreadable", self._path, f"it has {len(offsets)} offsets and {len(sizes)} sizes of {segments} strips or tiles"
            )
        ends = list(map(add, offsets, sizes))
        if min(sizes) <= 0 or max(ends) > len(self._data):
            raise Rejected(
                "truncated", self._path, f"a strip or tile ends at byte {max(ends)} of {len(self._data)}, or has no bytes"
            )
        if compression == 1:
            full, down = rows * columns * itemsize, math.ceil(found.height / rows)
            rest = full if _TILE_OFFSETS in self._tags else (found.height - (down - 1) * rows) * columns * itemsize
            if any(map(lt, sizes, cycle([full] * (down - 1) + [rest]))):  # the last strip of a band has the rows that are left
                raise Rejected("truncated", self._path, f"a strip or tile has {min(sizes)} bytes, too few for its pixels")

    def _one(self, tag: int, default: int | None = None) -> int:
        if (read := self._integers.get(tag)) is not None:
            return read[0]
        values = self._values(tag, None if default is None else (default,))
        if not values:
            raise Rejected("unreadable", self._path, f"its tag {tag} has no value")
        return values[0]

    def _values(self, tag: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if (read := self._integers.get(tag)) is not None:
            return read
        if tag not in self._tags:
            if default is None:
                raise Rejected("unreadable", self._path, f"it has no tag {tag}")
            return default
        kind, count, at = self._tags[tag]
        if kind not in _INTEGERS or count > MAX_SEGMENTS:
            raise Rejected("unreadable", self._path, f"its tag {tag} has {count} values of type {kind}")
        form = f"{self._order}{count}{_INTEGERS[kind]}"
        self._integers[tag] = read = struct.unpack(form, self._bytes(at, _TAG_BYTES[kind] * count))
        return read

    def _integer(self, at: int, size: int) -> int:
        return int.from_bytes(self._bytes(at, size), "little" if self._order == "<" else "big")

    def _bytes(self, at: int, size: int) -> bytes:
        if at + size > len(self._data):
            raise Rejected("truncated", self._path, f"its directory needs byte {at + size} of {len(self._data)}")
        return self._data[at : at + size]

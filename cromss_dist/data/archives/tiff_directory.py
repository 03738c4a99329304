"""The directory of a TIFF: read from bytes, with every bound checked before a byte of pixels is touched.

Most files of an archive have a directory in common, so that one is parsed once.
"""

import math
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import cycle
from operator import add, lt
from typing import Literal, NamedTuple

import numpy as np

from cromss_dist.data.sample import Rejected

MAX_RASTER_BYTES = 32 * 2**20  # of pixels a header may declare; the largest tile of an archive (13 bands, 512 px) has 7 MB
MAX_TAGS = 256
MAX_SEGMENTS = 2**16  # strips or tiles
MAX_KEPT_BYTES = 4096  # of a directory that is kept for the next file that has an equal one

# Compressions (tag 259) that libtiff as built into imagecodecs decodes to the very pixels GDAL gives.
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "zstd"}

# Tags: TIFF 6.0 (Adobe, 1992); 42113 is GDAL's.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL_ORDER, _SAMPLES, _PLANAR = 256, 257, 258, 259, 266, 277, 284
_SAMPLE_FORMAT, _NODATA = 339, 42113
_PHOTOMETRIC, _JPEG_TABLES = 262, 347
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # types of a tag's value
_KNOWN_TAGS = {  # what a `Directory` reads
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR, _SAMPLE_FORMAT, _NODATA),
    *(_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES),
}
TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # of a value, by type
_ASCII, _UNDEFINED = 2, 7
_SAMPLE_TYPES = {1: "uint", 2: "int", 3: "float"}
_ORDERS: dict[bytes, Literal["<", ">"]] = {b"II": "<", b"MM": ">"}
# An entry of a directory: tag, type, count, and the value or where it is.
_ENTRIES = {
    (order, is_big): struct.Struct(order + ("HHQ8s" if is_big else "HHI4s")) for order in "<>" for is_big in (False, True)
}


@dataclass(frozen=True)
class Header:
    """Size and type of a GeoTIFF."""

    height: int
    width: int
    bands: int
    dtype: str


class Refused(Exception):  # noqa: N818 - becomes a Rejected, which names the file
    """A directory that is not plausible."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def of(self, path: str) -> Rejected:
        """The same of the file at `path`."""
        return Rejected(self.reason, path, self.detail)


class _Form(NamedTuple):
    """How a TIFF states numbers ('<' or '>'), whether it is a BigTIFF, and where the entries of its directory begin."""

    order: Literal["<", ">"]
    is_big: bool
    at: int


class Segments(NamedTuple):
    """Strips or tiles: rows of each, and where they are."""

    rows: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Directory:
    """The first image file directory of a TIFF or BigTIFF, checked against the size of the file.

    It knows no pixels and no places, so that most files of an archive have one in common; from `directory_of`.
    """

    def __init__(self, form: _Form, entries: bytes, size: int, outlying: tuple[bytes, ...]) -> None:
        self._order, self._size = form.order, size
        self.tags, spans = _read_tags(form, entries)
        self._outlying = dict(zip(spans, outlying, strict=True))
        self._at, self._entries = form.at, entries
        self._integers: dict[int, tuple[int, ...]] = {}  # tags whose values were read
        self.header = self._check_header()

    @cached_property
    def nodata(self) -> float | None:
        """GDAL's nodata value, None where there is none."""
        kind, count, _ = self.tags.get(_NODATA, (_ASCII, 0, 0))
        if kind != _ASCII or not 0 < count <= 64:
            return None
        try:
            return float(self._bytes(_NODATA, count).rstrip(b"\0 "))
        except ValueError:
            return None

    @cached_property
    def is_interleaved(self) -> bool:
        """Whether the bands of a pixel lie one beside the other."""
        return self._one(_PLANAR, 1) == 1

    @cached_property
    def segments(self) -> Segments:
        """Its strips or tiles, each inside the file: decoders differ in what they make of one that is not."""
        found = self.header
        compression = self._one(_COMPRESSION, 1)
        if compression not in COMPRESSIONS:
            raise Refused(
                "unreadable", f"its compression is number {compression}; known are {sorted(set(COMPRESSIONS.values()))}"
            )
        planar = self._one(_PLANAR, 1)
        if planar not in (1, 2):
            raise Refused("unreadable", f"its planar configuration is {planar}")
        are_tiles = _TILE_OFFSETS in self.tags
        if are_tiles:
            offsets, sizes = self._values(_TILE_OFFSETS), self._values(_TILE_BYTES)
            rows, columns = self._one(_TILE_HEIGHT), self._one(_TILE_WIDTH)
        else:
            offsets, sizes = self._values(_STRIP_OFFSETS), self._values(_STRIP_BYTES)
            rows, columns = min(self._one(_ROWS_PER_STRIP, found.height), found.height), found.width
        itemsize = np.dtype(found.dtype).itemsize * (found.bands if planar == 1 else 1)
        if not (rows and columns) or rows * columns * itemsize > MAX_RASTER_BYTES:
            raise Refused("unreadable", f"its segments have {rows} x {columns} px")
        segments = math.ceil(found.height / rows) * math.ceil(found.width / columns) * (found.bands if planar == 2 else 1)
        if not len(offsets) == len(sizes) == segments:
            raise Refused("unreadable", f"it has {len(offsets)} offsets and {len(sizes)} sizes of {segments} strips or tiles")
        ends = list(map(add, offsets, sizes))
        if min(sizes) <= 0 or max(ends) > self._size:
            raise Refused("truncated", f"a strip or tile ends at byte {max(ends)} of {self._size}, or has no bytes")
        if compression == 1:
            full, down = rows * columns * itemsize, math.ceil(found.height / rows)
            rest = full if are_tiles else (found.height - (down - 1) * rows) * columns * itemsize
            if any(map(lt, sizes, cycle([full] * (down - 1) + [rest]))):  # the last strip of a band has the rows that are left
                raise Refused("truncated", f"a strip or tile has {min(sizes)} bytes, too few for its pixels")
        return Segments(rows, offsets, sizes)

    @cached_property
    def stored(self) -> tuple[np.dtype[np.generic], int] | None:
        """Type and first byte of the pixels of one uncompressed band whose strips lie one behind the other; None: it is not so.

        Most bands of an archive are stored that way. What libtiff would make of these bytes is the same, at some fifteen times
        the cost.
        """
        if not self._is_plain(1):
            return None
        found, (_, offsets, sizes) = self.header, self.segments
        dtype = np.dtype(self._order + np.dtype(found.dtype).str[1:])
        consecutive = tuple(map(add, offsets[:-1], sizes[:-1])) == offsets[1:]
        return (dtype, offsets[0]) if consecutive and sum(sizes) == found.height * found.width * dtype.itemsize else None

    @cached_property
    def jpeg_tables(self) -> slice | None:
        """Where the tables that JPEG strips of one grey band share are, maybe none; None: there are no such strips."""
        try:
            is_grey = self._is_plain(7) and self.header.dtype == "uint8" and self._one(_PHOTOMETRIC) == 1
        except Refused:  # what an odd tag means is for libtiff to say
            return None
        if not is_grey:
            return None
        kind, count, at = self.tags.get(_JPEG_TABLES, (_UNDEFINED, 0, 0))
        return slice(at, at + count) if kind == _UNDEFINED and at + count <= self._size else None

    def _is_plain(self, compression: int) -> bool:
        """Whether it has one band, in strips, packed like this."""
        plain = {_COMPRESSION: compression, _SAMPLES: 1, _FILL_ORDER: 1}
        return _TILE_OFFSETS not in self.tags and all(self._one(tag, 1) == value for tag, value in plain.items())

    def _check_header(self) -> Header:
        width, height, bands = self._one(_WIDTH), self._one(_HEIGHT), self._one(_SAMPLES, 1)
        bits, formats = set(self._values(_BITS, (1,))), set(self._values(_SAMPLE_FORMAT, (1,)))
        if not (width and height and bands):
            raise Refused("unreadable", f"its header declares {bands} bands of {height} x {width} px")
        kind = _SAMPLE_TYPES.get(next(iter(formats)), "no number") if len(formats) == 1 else "mixed"
        dtype = f"{kind}{next(iter(bits)) if len(bits) == 1 else sorted(bits)}"
        try:
            itemsize = np.dtype(dtype).itemsize
        except TypeError as error:
            raise Refused("wrong_dtype", f"its pixels are {dtype}") from error
        declared = width * height * bands * itemsize
        if declared > MAX_RASTER_BYTES:
            raise Refused("too_big", f"its header declares {bands} x {height} x {width} {dtype}, {declared} bytes of pixels")
        return Header(height, width, bands, dtype)

    def _one(self, tag: int, default: int | None = None) -> int:
        values = self._values(tag, None if default is None else (default,))
        if not values:
            raise Refused("unreadable", f"its tag {tag} has no value")
        return values[0]

    def _values(self, tag: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if (read := self._integers.get(tag)) is not None:
            return read
        if tag not in self.tags:
            if default is None:
                raise Refused("unreadable", f"it has no tag {tag}")
            return default
        kind, count, _ = self.tags[tag]
        if kind not in _INTEGERS or count > MAX_SEGMENTS:
            raise Refused("unreadable", f"its tag {tag} has {count} values of type {kind}")
        self._integers[tag] = read = struct.unpack(
            f"{self._order}{count}{_INTEGERS[kind]}", self._bytes(tag, TAG_BYTES[kind] * count)
        )
        return read

    def _bytes(self, tag: int, size: int) -> bytes:
        """The value of a tag: in its entry, or where that points to."""
        at = self.tags[tag][2]
        if at + size > self._size:
            raise Refused("truncated", f"its directory needs byte {at + size} of {self._size}")
        return self._outlying[tag] if tag in self._outlying else self._entries[at - self._at :][:size]


_known_directory = lru_cache(maxsize=256)(Directory)


def directory_of(data: bytes, path: str) -> Directory:
    """The directory of a file; one that is equal to an earlier one in all that a `Directory` knows is taken from there."""
    try:
        form, number = _read_form(data)
        entries = data[form.at : form.at + number * _ENTRIES[form.order, form.is_big].size]
        outlying = tuple([data[span] for span in _read_tags(form, entries)[1].values()])
        known = _known_directory if sum(map(len, outlying)) <= MAX_KEPT_BYTES else Directory
        return known(form, entries, len(data), outlying)
    except Refused as why:
        raise why.of(path) from why


def _read_form(data: bytes) -> tuple[_Form, int]:
    """The form of a TIFF and the number of its directory's entries, which are there."""
    if len(data) < 16:  # smaller than any TIFF with a directory
        raise Refused("truncated", f"it has {len(data)} bytes")
    order: Literal["<", ">"] | None = _ORDERS.get(data[:2])
    endian: Literal["little", "big"] = "big" if order == ">" else "little"
    version = int.from_bytes(data[2:4], endian)
    if order is None or version not in (42, 43):
        raise Refused("unreadable", f"it begins with {data[:4]!r}, as no TIFF does")
    is_big = version == 43
    if is_big and (int.from_bytes(data[4:6], endian), data[6:8]) != (8, b"\0\0"):
        raise Refused("unreadable", f"it begins with {data[:8]!r}, as no BigTIFF does")
    counted = 8 if is_big else 2
    at = int.from_bytes(data[8:16] if is_big else data[4:8], endian)
    if at + counted > len(data):
        raise Refused("truncated", f"its directory needs byte {at + counted} of {len(data)}")
    number = int.from_bytes(data[at : at + counted], endian)
    if not 0 < number <= MAX_TAGS:
        raise Refused("unreadable", f"its directory has {number} tags; 1 to {MAX_TAGS} are plausible")
    at += counted
    end = at + number * _ENTRIES[order, is_big].size
    if end > len(data):
        raise Refused("truncated", f"its directory needs byte {end} of {len(data)}")
    return _Form(order, is_big, at), number


@lru_cache(maxsize=256)
def _read_tags(form: _Form, entries: bytes) -> tuple[dict[int, tuple[int, int, int]], dict[int, slice]]:
    """Type, count and place of the value of each tag, and where of those that a `Directory` knows and that are elsewhere."""
    entry = _ENTRIES[form.order, form.is_big]
    width = 8 if form.is_big else 4
    endian: Literal["little", "big"] = "big" if form.order == ">" else "little"
    tags: dict[int, tuple[int, int, int]] = {}
    spans: dict[int, slice] = {}
    for index, (tag, kind, count, value) in enumerate(entry.iter_unpack(entries)):
        if tag in tags:
            continue  # as libtiff does: of a tag that is repeated the first entry counts
        size = TAG_BYTES.get(kind, 1) * count
        at = int.from_bytes(value, endian) if size > width else form.at + (index + 1) * entry.size - width
        tags[tag] = (kind, count, at)
        if size > width and tag in _KNOWN_TAGS and size <= 8 * MAX_SEGMENTS:
            spans[tag] = slice(at, at + size)
    return tags, spans

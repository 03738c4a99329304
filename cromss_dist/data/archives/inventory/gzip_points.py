"""Reads a gzip stream from points in its middle, which were found when it was listed.

A point is a bit between two blocks of the stream, with its window: the 32 KiB of data before it, that later data may repeat.
The file of an index has the points as rapidgzip exports them, windows compressed, and after them a table to search. A
reader looks up what it needs in that file, so that it holds neither table nor windows, however large the stream.

Reference: RFC 1951 (deflate); the index file format of gztool, version 0.
"""

import os
import struct
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cromss_dist.data.archives.inventory.tar import Damaged

WINDOW = 2**15
_PACKED, _INFLATED = 2**16, 2**16  # bytes read, and inflated, at a time

_MAGIC = bytes(8) + b"gzipindx"
_HEADER = struct.Struct(">16s2Q")  # magic, number of points, that again
_POINT = struct.Struct(">2Q2I")  # byte inflated, first whole byte packed, bits before that, bytes of the window; the window
_ROW = struct.Struct("<4Q")  # byte inflated, bit packed, where the window is in the index, its bytes there
_COUNT = struct.Struct("<Q")

# Deflate blocks without data, as bits (the first one lowest) and their number: with fixed codes 10, which is 2 modulo 8; and
# with codes of their own 93, which is 5, so that one or none of these and some of those come to any number modulo 8.
_EVEN = (0x2, 10)
_ODD = (0x5AFFF90000000000901C004, 93)


def append_table(index: BinaryIO) -> None:
    """Appends the table of its points, and their number, to an index that was just exported."""
    index.seek(0)
    magic, number, _ = _HEADER.unpack(index.read(_HEADER.size))
    assert magic == _MAGIC
    at, rows = _HEADER.size, bytearray()
    for _ in range(number):
        index.seek(at)
        inflated, packed, bits, window = _POINT.unpack(index.read(_POINT.size))
        at += _POINT.size
        rows += _ROW.pack(inflated, packed * 8 - bits, at, window)
        at += window
    index.seek(0, os.SEEK_END)
    index.write(rows + _COUNT.pack(number))


class GzipReader:
    """Reads a gzip stream by offset of the inflated data. Not for several threads at once.

    Args:
        pread: Gives so many bytes of the stream from an offset on, fewer at its end.
        index: What `append_table` made.
    """

    def __init__(self, pread: Callable[[int, int], bytes], index: Path) -> None:
        self._pread = pread
        self._index = os.open(index, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._index)
        end = os.fstat(self._index).st_size - _COUNT.size
        (self._number,) = _COUNT.unpack(os.pread(self._index, _COUNT.size, end))
        self._table = end - self._number * _ROW.size
        # Where inflating goes on: members that follow each other are inflated once.
        self._inflater: Any = None
        self._position = 0  # inflated so far
        self._next = 0  # byte of the stream to read next
        self._packed = b""  # read, and not inflated yet

    def read(self, offset: int, size: int) -> bytes:
        """The inflated bytes from `offset` on; fewer than `size` at the end.

        Raises:
            Damaged: they cannot be inflated.
        """
        if size == 0:
            return b""
        point = bisect_right(range(self._number), offset, key=lambda number: self._row(number)[0]) - 1
        try:
            if self._inflater is None or not self._row(point)[0] <= self._position <= offset:
                self._begin(point)
            for _ in self._inflate(offset - self._position):
                pass
            return b"".join(self._inflate(size))
        except zlib.error as error:
            self._inflater = None
            raise Damaged(f"zlib says: {error}") from error

    def _row(self, number: int) -> tuple[int, int, int, int]:
        inflated, bit, at, window = _ROW.unpack(os.pread(self._index, _ROW.size, self._table + number * _ROW.size))
        return inflated, bit, at, window

    def _begin(self, point: int) -> None:
        self._position, bit, at, size = self._row(point)
        self._next, shift = divmod(bit, 8)
        self._packed = _led_in(self._more(1), shift) if shift else b""
        window = zlib.decompressobj().decompress(os.pread(self._index, size, at), WINDOW) if size else b""
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=window)

    def _inflate(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces, fewer where the stream ends."""
        while size and not self._inflater.eof:
            packed = self._packed or self._more(_PACKED)
            data = self._inflater.decompress(packed, min(size, _INFLATED))
            if not data and not packed:
                return
            self._packed = self._inflater.unconsumed_tail
            self._position += len(data)
            size -= len(data)
            yield data

    def _more(self, size: int) -> bytes:
        data = self._pread(self._next, size)
        self._next += len(data)
        return data


def _led_in(byte: bytes, shift: int) -> bytes:
    """A byte without its lower `shift` bits, behind empty blocks that make it whole bytes again.

    zlib begins at the first bit of a byte. To shift all that follows a point, instead, takes a tenth of the time of a read.
    """
    stream = length = 0
    for block, bits in [_ODD] * (shift % 2) + [_EVEN] * 4:
        if length % 8 != shift:
            stream |= block << length
            length += bits
    stream |= (byte[0] >> shift << length) if byte else 0
    return stream.to_bytes((length + 8 - shift) // 8, "little")

"""Reads an LMDB file page by page with plain `pread`: where every value lies, and then the values.

Not with the lmdb package: it maps the file, and what is cut or damaged may end the process by a signal (15 of 60 damaged files
did, by a bus error) where a converter must count rejected inputs and go on. Here every offset is checked against the file's
size before it is used, nothing is written beside the file, and the size of the address space does not matter.

Reference: OpenLDAP LMDB 0.9, libraries/liblmdb/mdb.c: MDB_meta, MDB_page, MDB_node (64 bit, little endian).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cromss_dist.errors import InputChangedError, UnreadableInputError

DATA_FILE = "data.mdb"  # of an environment that is a folder
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE_HEADER = struct.Struct("<QHHHH")  # number, pad, flags, lower, upper
_NODE_HEADER = struct.Struct("<HHHH")  # low and high half of the value's size, flags, size of the key
_META = struct.Struct("<II16x I44x IHHQQQQQ QQ")  # of the page behind its header: magic, version, free and main database
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_BIG_VALUE = 0x01  # the value lies on pages of its own
_NO_ROOT = 2**64 - 1
MAX_PAGES_IN_TREE = 10**7  # of branches and leaves; an archive of 10^6 rows has 10^4


@dataclass(frozen=True)
class Value:
    """Where a value lies in the file."""

    key: bytes
    offset: int
    size: int


@dataclass(frozen=True)
class LmdbFile:
    """An LMDB file as it was when it was opened.

    Args:
        path: The file itself.
        size: Bytes.
        mtime_ns: Time of the last change.
    """

    path: Path
    size: int
    mtime_ns: int

    def read(self, offset: int, size: int) -> bytes:
        """A part of the file, shorter only at its end.

        Raises:
            InputChangedError: the file is not the one that was opened.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns):
                    return os.pread(file.fileno(), size, offset)
        except FileNotFoundError as error:
            raise InputChangedError(f"{self.path} is gone since the archive was opened; put it back and run it again.") from error
        raise InputChangedError(
            f"{self.path} changed since the archive was opened: {found.st_size} bytes instead of {self.size}, or another time of "
            "change; leave the archive alone while it is converted, and begin again with --restart."
        )

    def values(self) -> Iterator[Value]:
        """Every value of the main database, in the order of the keys' bytes.

        Raises:
            UnreadableInputError: the file is cut or damaged, or no LMDB file that this reader knows.
        """
        with open(self.path, "rb", buffering=0) as file:
            try:
                yield from _Tree(file.fileno(), self.size).values()
            except (struct.error, IndexError, ValueError) as error:
                raise UnreadableInputError(
                    f"{self.path} is damaged or no LMDB file: {error}; copy or download it again."
                ) from error


def open_lmdb_file(path: Path) -> LmdbFile:
    """The LMDB file at `path`, which may be the folder of one."""
    file = path / DATA_FILE if path.is_dir() else path
    found = file.stat()
    return LmdbFile(file, found.st_size, found.st_mtime_ns)


class _Tree:
    """The B+ tree of a file's main database. ValueError says what is wrong with it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        metas = []
        page_size = 4096  # of the first meta page; it says the true size
        for number in (0, 1):
            data = os.pread(descriptor, _PAGE_HEADER.size + _META.size, number * page_size)
            fields = _META.unpack_from(data, _PAGE_HEADER.size)
            magic, version, page_size, _, flags, _, _, _, _, num_values, root, last_page, transaction = fields
            if magic != _MAGIC or version != _VERSION:
                raise ValueError(f"its meta page {number} has magic {magic:#x}, version {version}")
            if page_size not in (512 << shift for shift in range(8)):
                raise ValueError(f"its pages have {page_size} bytes")
            metas.append((transaction, flags, num_values, root, last_page))
        self._page_size = page_size
        _, flags, self._num_values, self._root, last_page = max(metas)
        if flags:
            raise ValueError(f"its main database has the flags {flags:#x}; a plain one is expected")
        if (last_page + 1) * page_size > size:
            raise ValueError(f"it is cut: {size} bytes of {(last_page + 1) * page_size}")

    def values(self) -> Iterator[Value]:
        pages = [] if self._root == _NO_ROOT else [self._root]
        num_pages = num_values = 0
        last_key: bytes | None = None
        while pages:
            num_pages += 1
            if num_pages > MAX_PAGES_IN_TREE or num_pages > self._size // self._page_size:
                raise ValueError("its pages form a circle")
            start = pages.pop() * self._page_size
            page = self._page(start)
            _, _, flags, lower, _ = _PAGE_HEADER.unpack_from(page)
            nodes = struct.unpack_from(f"<{(lower - _PAGE_HEADER.size) // 2}H", page, _PAGE_HEADER.size)
            if flags & _BRANCH:
                children = []
                for node in nodes:
                    low, high, top, _ = _NODE_HEADER.unpack_from(page, node)
                    children.append(low | high << 16 | top << 32)
                pages.extend(reversed(children))
            elif flags & _LEAF:
                num_values += len(nodes)
                if num_values > self._num_values:
                    break
                for node in nodes:
                    value = self._value(page, node, start)
                    if last_key is not None and value.key <= last_key:  # a page that is reached twice would repeat its values
                        raise ValueError(f"value {value.key!r:.40} is out of order")
                    last_key = value.key
                    yield value
            else:
                raise ValueError(f"page at byte {start} is neither branch nor leaf (flags {flags:#x})")
        if num_values != self._num_values:
            raise ValueError(f"its pages hold another number of values than the {self._num_values} it says")

    def _page(self, start: int) -> bytes:
        if not 0 <= start <= self._size - self._page_size:
            raise ValueError(f"a page would lie at byte {start} of {self._size}")
        return os.pread(self._descriptor, self._page_size, start)

    def _value(self, page: bytes, node: int, start: int) -> Value:
        low, high, flags, key_size = _NODE_HEADER.unpack_from(page, node)
        size, begin = low | high << 16, node + _NODE_HEADER.size
        key, begin = page[begin : begin + key_size], begin + key_size
        if flags & ~_BIG_VALUE:
            raise ValueError(f"value {key!r:.40} has the flags {flags:#x}; a plain one is expected")
        if flags & _BIG_VALUE:
            first = struct.unpack_from("<Q", page, begin)[0] * self._page_size
            _, _, kind, _, _ = _PAGE_HEADER.unpack_from(self._page(first))
            if not kind & _OVERFLOW:
                raise ValueError(f"value {key!r:.40} lies on page {first // self._page_size}, which is none of a value")
            offset, end = first + _PAGE_HEADER.size, self._size
        else:
            offset, end = start + begin, start + self._page_size
        if offset + size > end:
            raise ValueError(f"value {key!r:.40} would have {size} bytes at byte {offset}, beyond its end at {end}")
        return Value(key, offset, size)

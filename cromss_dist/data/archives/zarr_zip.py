"""Reads arrays of a Zarr v2 store in a zip file, as SSL4EO-S12 v1.1 has them, without handing the store to a Zarr library.

Metadata is checked against a list of what is known (zarr_metadata.py), and a chunk is decoded into a buffer of the size that
the metadata says: nothing in the file names code to run, and nothing can grow beyond its declared size. A chunk that is
missing is an error; Zarr libraries would return fill values.

Reference: Zarr storage specification version 2.
"""

import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numcodecs import blosc, lz4, zstd

from cromss_dist.data import zarr_metadata
from cromss_dist.data.archives.inventory.tar import Cut, Damaged
from cromss_dist.data.archives.inventory.zip import find_directory
from cromss_dist.data.sample import Json, Rejected
from cromss_dist.errors import InputChangedError

MAX_MEMBERS = 100_000
MAX_DIRECTORY_BYTES = 2**24
MAX_PACKED_BYTES = 2 * zarr_metadata.MAX_CHUNK_BYTES  # of one member of the zip; incompressible chunks grow a little
_SCALING = ("scale_factor", "add_offset")  # CF attributes that change values; none are expected


class _Codec(Protocol):
    def decompress(self, source: bytes) -> bytes: ...


_CODECS: dict[str, _Codec] = {"blosc": blosc, "zstd": zstd, "lz4": lz4}
_WINDOW_BITS = {"zlib": zlib.MAX_WBITS, "gzip": 16 + zlib.MAX_WBITS}


@dataclass(frozen=True)
class ZarrZip:
    """A store as it was when it was found.

    Args:
        path: The zip file.
        name: Its path in the archive, for messages.
        size: Bytes.
        mtime_ns: Time of the last change.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int

    @contextmanager
    def open(self) -> Iterator["Store"]:
        """The store, to read arrays from.

        Raises:
            Rejected: unreadable, too_big or missing_file, here and while it is read.
            InputChangedError: the file is not the one that was found.
        """
        try:
            found = self.path.stat()
            if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
                raise InputChangedError(
                    f"{self.name} changed since the archive was opened; leave the archive alone while it is converted, and begin "
                    "again with --restart."
                )
            with open(self.path, "rb") as raw:  # zipfile makes an object of every 46 bytes of the directory
                if find_directory(raw, self.size)[1] > MAX_DIRECTORY_BYTES:
                    raise Rejected("too_big", self.name, f"its directory has more than {MAX_DIRECTORY_BYTES} bytes")
            with zipfile.ZipFile(self.path) as file:
                if len(file.namelist()) > MAX_MEMBERS:
                    raise Rejected("too_big", self.name, f"it has more than {MAX_MEMBERS} members")
                yield Store(file, self.name)
        except FileNotFoundError as error:
            raise InputChangedError(f"{self.name} is gone since the archive was opened; put it back and run it again.") from error
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            EOFError,
            UnicodeDecodeError,
            struct.error,
            zlib.error,
            OSError,
            Cut,
            Damaged,
        ) as error:
            raise Rejected("unreadable", self.name, f"as a zip file: {error}") from error


class Store:
    """An open store."""

    def __init__(self, file: zipfile.ZipFile, name: str) -> None:
        self._file = file
        self._name = name
        self._arrays: dict[str, tuple[zarr_metadata.ArrayMetadata, Json]] = {}

    def shape(self, array: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self._metadata(array)[0].shape

    def dtype(self, array: str) -> np.dtype[Any]:
        """Type of an array's values."""
        return np.dtype(self._metadata(array)[0].dtype)

    def read(self, array: str, start: int | None = None, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of the first dimension of an array, all without them."""
        metadata, node = self._metadata(array)
        rows = range(*slice(start, stop).indices(metadata.shape[0]))
        out_shape = (len(rows), *metadata.shape[1:])
        dtype = np.dtype(metadata.dtype)
        if math.prod(out_shape) * dtype.itemsize > zarr_metadata.MAX_CHUNK_BYTES:
            raise Rejected("too_big", self._path(array), f"{out_shape} of {dtype} are too many bytes to read at once")
        out = np.empty(out_shape, dtype)
        chunk_shape = metadata.chunk_shape
        first = range(rows.start // chunk_shape[0], -(-rows.stop // chunk_shape[0]) if rows else 0)
        others = (range(-(-side // chunk)) for side, chunk in zip(metadata.shape[1:], chunk_shape[1:], strict=True))
        for index in itertools.product(first, *others):
            chunk = self._chunk(array, index, metadata, str(node.get("dimension_separator", ".")))
            begin = [i * side for i, side in zip(index, chunk_shape, strict=True)]
            low, high = max(begin[0], rows.start), min(begin[0] + chunk_shape[0], rows.stop)
            into = (
                slice(low - rows.start, high - rows.start),
                *(slice(b, b + side) for b, side in zip(begin[1:], chunk_shape[1:], strict=True)),
            )
            of = (slice(low - begin[0], high - begin[0]), *(slice(0, n) for n in out[into].shape[1:]))
            out[into] = chunk[of]
        return out

    def _chunk(
        self, array: str, index: tuple[int, ...], metadata: zarr_metadata.ArrayMetadata, separator: str
    ) -> npt.NDArray[Any]:
        name = f"{array}/{separator.join(map(str, index))}"
        data = self._member(name, MAX_PACKED_BYTES)
        dtype = np.dtype(metadata.dtype)
        size = math.prod(metadata.chunk_shape) * dtype.itemsize
        try:
            decoded = _decode(data, metadata.codecs, size)
        except (RuntimeError, ValueError, zlib.error) as error:
            raise Rejected("unreadable", self._path(name), f"the chunk cannot be decoded: {error}") from error
        if len(decoded) != size:
            raise Rejected("truncated", self._path(name), f"the chunk has {len(decoded)} bytes; {size} are expected")
        return np.frombuffer(decoded, dtype).reshape(metadata.chunk_shape)

    def _metadata(self, array: str) -> tuple[zarr_metadata.ArrayMetadata, Json]:
        if array not in self._arrays:
            path = self._path(f"{array}/.zarray")
            node = zarr_metadata.parse(self._member(f"{array}/.zarray", zarr_metadata.MAX_METADATA_BYTES), path)
            metadata = zarr_metadata.check_v2_array(node, path)
            if not metadata.shape or node["order"] != "C" or metadata.dtype == "|O":
                raise Rejected(
                    "unreadable", path, "only arrays of numbers and short texts, in C order, with a dimension, are read"
                )
            if f"{array}/.zattrs" in self._file.NameToInfo:
                data = self._member(f"{array}/.zattrs", zarr_metadata.MAX_METADATA_BYTES)
                if scaled := set(zarr_metadata.parse(data, self._path(f"{array}/.zattrs"))) & set(_SCALING):
                    raise Rejected(
                        "unreadable", path, f"its values are scaled ({', '.join(sorted(scaled))}); plain ones are expected"
                    )
            self._arrays[array] = metadata, node
        return self._arrays[array]

    def _member(self, name: str, max_bytes: int) -> bytes:
        """A file of the store; the last one where a name is repeated, as rewriting a store in a zip file leaves it."""
        found = self._file.NameToInfo.get(name)
        if found is None:
            raise Rejected("missing_file", self._path(name), "the store does not hold it")
        if found.file_size > max_bytes:
            raise Rejected("too_big", self._path(name), f"it has {found.file_size} bytes; at most {max_bytes} are read")
        if found.flag_bits & 1 or found.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Rejected("unreadable", self._path(name), "it is encrypted, or packed by another method than deflate")
        with self._file.open(found) as member:  # ZipFile.read would inflate it whole before it looks at its size
            return member.read(found.file_size)

    def _path(self, name: str) -> str:
        return f"{self._name}/{name}"


def find_zarr_zip(path: Path, root: Path) -> ZarrZip:
    """The store at `path`, a file below `root`."""
    found = path.stat()
    return ZarrZip(path, path.relative_to(root).as_posix(), found.st_size, found.st_mtime_ns)


def _decode(data: bytes, codecs: tuple[str, ...], size: int) -> bytes:
    """A decoded chunk; it is decoded only if it says that it holds `size` bytes, or is stopped after them."""
    if not codecs:
        return data
    (codec,) = codecs
    if codec in _WINDOW_BITS:
        return zlib.decompressobj(_WINDOW_BITS[codec]).decompress(data, size + 1)
    declared = _zstd_size(data) if codec == "zstd" else int.from_bytes(data[4:8] if codec == "blosc" else data[:4], "little")
    if declared != size:
        raise ValueError(f"it says that it holds {declared} bytes; {size} are expected")
    if codec == "blosc" and int.from_bytes(data[12:16], "little") != len(data):  # the library believes it, and reads beyond
        raise ValueError(f"it says that it has {int.from_bytes(data[12:16], 'little')} bytes packed, and has {len(data)}")
    return bytes(_CODECS[codec].decompress(data))


def _zstd_size(data: bytes) -> int | None:
    """Size of the content of a Zstandard frame, None where it does not say. Reference: RFC 8878, section 3.1.1.1."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 14:
        raise ValueError("it is no Zstandard frame")
    descriptor = data[4]
    single = descriptor >> 5 & 1
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    num_bytes = (single, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(data[start : start + num_bytes], "little")
    return (size + 256 if num_bytes == 2 else size) if num_bytes else None

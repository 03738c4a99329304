"""Tars, compressed or not, whole or split, and zips: listed once, read by offset ever after, never extracted.

A compressed tar cannot be sought. rapidgzip decompresses it on all cores, once, and leaves an index of points to inflate
from; readers need zlib only. Each member's CRC-32 is taken on the way, so that what is read later is what was listed.
"""

import hashlib
import io
import os
import re
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import rapidgzip

from cromss_dist.data.archives.inventory.gzip_points import GzipReader, append_table
from cromss_dist.data.archives.inventory.tar import Cut, Damaged, Member, tar_members
from cromss_dist.data.archives.inventory.zip import local_bytes, unzip, zip_members
from cromss_dist.errors import InputChangedError, StorageError, UnreadableInputError

# A gzip stream is given up once it has inflated to this many bytes, and to more than so many times its size.
BOMB_BYTES = 2**29
BOMB_RATIO = 200

# Packed bytes between two points of an index, at most. To read a member out of order, half of that is inflated in vain; each
# point takes 3-7 KB of memory while the stream is listed, and then of disk. rapidgzip holds many chunks of that size, each
# inflated to up to 20 times its size: smaller ones in small files bound what a bomb takes (460 MB at 8 threads).
MAX_SPACING = 2**21

_KEPT = 2  # version of listings and indexes: those of another one are not taken for these

_KINDS = {"tar": "tar", "tar.gz": "tar.gz", "tgz": "tar.gz", "zip": "zip"}
# s2c.tar.gz; s2c.tar.gz.partaa, .part-000, .aa, .000 as split(1) names them
_NAME = re.compile(
    r"(?P<stem>.+\.(?P<kind>tar\.gz|tar|tgz|zip))(?:\.part[-_.]?(?P<part>[a-z]+|[0-9]+)|\.(?P<bare>(?![bglx]z)[a-z]{2}|[0-9]{2,3}))?"
)


@dataclass(frozen=True)
class Part:
    """A file on disk that is a container, or a piece of one."""

    path: str  # relative to the archive
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Container:
    """A container as it was found: `kind` is 'tar', 'tar.gz' or 'zip'; `path` is without the suffix of its parts."""

    path: str
    kind: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(part.size for part in self.parts)

    @property
    def digest(self) -> str:
        """Names what is kept about it; another one once a part has another size or time."""
        return hashlib.sha256(f"{_KEPT} {self!r}".encode()).hexdigest()[:32]


def container_name(name: str) -> tuple[str, str] | None:
    """The name without the suffix of a part, and that suffix; None for a file that is no container by its name."""
    found = _NAME.fullmatch(name)
    if found is None or name.startswith(".") or name.endswith(".zarr.zip"):  # a zarr store is read as it is
        return None
    return found["stem"], found["part"] or found["bare"] or ""


def assemble(path: str, parts: dict[str, Part]) -> Container:
    """The container made of these parts, by their suffixes.

    Raises:
        UnreadableInputError: a part is missing.
    """
    found = _NAME.fullmatch(path)
    assert found is not None
    kind = _KINDS[found["kind"]]
    if "" in parts:
        return Container(path, kind, (parts[""],))
    suffixes = sorted(parts)
    first = 1 if suffixes[0].isdigit() and int(suffixes[0]) == 1 else 0
    for number, suffix in enumerate(suffixes, start=first):
        expected = _suffix(number, suffixes[0])
        if suffix != expected:
            raise UnreadableInputError(
                f"{path} is split and its parts are not complete: after {number - first} of them comes {suffix!r}, expected "
                f"{expected!r}; fetch the missing part."
            )
    return Container(path, kind, tuple(parts[suffix] for suffix in suffixes))


def members(container: Container, root: Path, index: Path, progress: Callable[[int], None] | None = None) -> Iterator[Member]:
    """Lists a container; that of a compressed tar leaves its seek index at `index`.

    Args:
        container: What to list.
        root: The archive.
        index: Written for 'tar.gz' only, at the end.
        progress: Called now and then with the bytes of the container that are done.

    Raises:
        Cut: it ends too early; what was yielded until then is whole, and the index is written.
        Damaged: it cannot be decoded, or would inflate without end.
        InputChangedError: it is not what it was.
        StorageError: the disk does not take the index.
    """
    with _Parts(container, root) as parts:
        if container.kind == "tar.gz":
            yield from _gzip_members(container, parts, index, progress)
        else:
            stream = io.BufferedReader(parts, 2**13)  # small: of a tar only the headers are read
            listed = zip_members if container.kind == "zip" else tar_members
            for member in listed(cast(BinaryIO, stream), container.size):
                if progress is not None:
                    progress(min(member.offset, container.size))
                yield member
        parts.check_unchanged()


class ContainerReader:
    """Reads members of one container by offset. Not for several threads at once."""

    def __init__(self, container: Container, root: Path, index: Path) -> None:
        self._container = container
        self._parts = _Parts(container, root)
        self._gzip = GzipReader(self._parts.pread, index) if container.kind == "tar.gz" else None

    def close(self) -> None:
        """Closes its files."""
        if self._gzip is not None:
            self._gzip.close()
        self._parts.close()

    def read(self, offset: int, size: int, packed: int, check: int) -> bytes:
        """The data of a member.

        Raises:
            Damaged: it is not what was listed.
            InputChangedError: the container is not what it was.
        """
        self._parts.check_unchanged()
        if self._container.kind == "zip":
            data = unzip(self._parts.pread(offset, local_bytes(packed)), size, packed)
        elif self._gzip is not None:
            data = self._gzip.read(offset, size)
        else:
            data = self._parts.pread(offset, size)
        if len(data) != size:
            raise Damaged(f"{len(data)} of its {size} bytes could be read")
        if check >= 0 and zlib.crc32(data) != check:
            raise Damaged("its bytes do not have the CRC-32 that was listed")
        return data


class _Parts(io.RawIOBase):
    """The parts of a container as one read-only file."""

    def __init__(self, container: Container, root: Path) -> None:
        super().__init__()
        self._container = container
        self._descriptors: list[int] = []
        self._position = 0
        for part in container.parts:
            try:
                self._descriptors.append(os.open(root / part.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            except FileNotFoundError as error:
                self.close()
                raise InputChangedError(changed(part.path, "is gone")) from error
        self.check_unchanged()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        super().close()

    def check_unchanged(self) -> None:
        """Raises InputChangedError where a part has another size or time than when it was found."""
        for part, descriptor in zip(self._container.parts, self._descriptors, strict=True):
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (part.size, part.mtime_ns):
                raise InputChangedError(changed(part.path, f"had {part.size} bytes and now has {now.st_size}, or a new time"))

    def pread(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on; fewer than `size` at the end."""
        pieces: list[bytes] = []
        start = 0
        for part, descriptor in zip(self._container.parts, self._descriptors, strict=True):
            while size and start <= offset < start + part.size:
                piece = os.pread(descriptor, min(size, start + part.size - offset), offset - start)
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)
                offset += len(piece)
                size -= len(piece)
            start += part.size
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._container.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.pread(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _Inflating(io.RawIOBase):
    """A gzip stream that is given up when it turns out to be a bomb."""

    def __init__(self, file: Any, progress: Callable[[int], None] | None) -> None:
        super().__init__()
        self._file, self._progress = file, progress
        self.inflated = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _decoding():
            data = self._file.read(len(buffer))
            consumed = self._file.tell_compressed() // 8  # it counts bits
        buffer[: len(data)] = data
        self.inflated += len(data)
        if self.inflated > max(BOMB_BYTES, BOMB_RATIO * consumed):
            raise Damaged(f"its first {consumed} bytes inflate to {self.inflated}, as a decompression bomb does")
        if self._progress is not None:
            self._progress(consumed)
        return len(data)


class _Gzip:
    """A gzip stream inflated on all cores. It must be closed before Python ends: rapidgzip's threads abort the process else."""

    def __init__(self, parts: _Parts, num_bytes: int) -> None:
        threads = min(os.cpu_count() or 1, 8)
        spacing = min(max(num_bytes // 256, 2**18), MAX_SPACING)
        with _decoding():
            self.file = rapidgzip.RapidgzipFile(parts, parallelization=threads, chunk_size=spacing)
        self.close = weakref.finalize(self, self.file.close)


class _IndexFile(io.FileIO):
    """Where rapidgzip writes its index. A write that fails ends the process there, so it is kept and raised at the end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._path = path
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left and self._failure is None:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self._failure = error
        return size

    def close(self) -> None:
        if not self.closed and self._failure is None:
            try:
                os.fsync(self.fileno())
            except OSError as error:
                self._failure = error
        super().close()
        self.check()

    def check(self) -> None:
        """Raises StorageError, once, for the first write that failed."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise StorageError.of(OSError(failure.errno, failure.strerror, str(self._path))) from failure


def _gzip_members(container: Container, parts: _Parts, index: Path, progress: Callable[[int], None] | None) -> Iterator[Member]:
    gzip = _Gzip(parts, container.size)
    try:
        inflating = _Inflating(gzip.file, progress)
        stream = io.BufferedReader(inflating, 2**20)
        cut: Cut | None = None
        try:
            yield from tar_members(cast(BinaryIO, stream), None)
            while stream.read(2**20):  # to the end: there rapidgzip compares the CRC-32 of the whole
                pass
        except Cut as end:
            cut = end
        told = int.from_bytes(parts.pread(container.size - 4, 4), "little")
        if cut is None and told != inflating.inflated % 2**32:  # rapidgzip takes the end of a cut file for the end of the stream
            cut = Cut(
                f"it inflates to {inflating.inflated} bytes and its last four bytes say {told} (modulo 2**32): it is cut, or "
                "several gzip streams in one file, which must be packed again as one"
            )
        with _IndexFile(index) as out:
            with _decoding():  # this reads to the end: not for a bomb
                gzip.file.export_index(out, rapidgzip.IndexFormat.GZTOOL)  # the format that compresses its windows
            out.check()
            append_table(cast(BinaryIO, out))
        if cut is not None:
            raise cut
    finally:
        gzip.close()


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, EOFError) as error:
        raise Damaged(f"rapidgzip says: {error}") from error


def _suffix(number: int, like: str) -> str:
    """The suffix of the part with this number, as split(1) counts: aa, ab, ... or 000, 001, ..."""
    if like.isdigit():
        return str(number).zfill(len(like))
    letters = []
    for _ in like:
        number, letter = divmod(number, 26)
        letters.append(chr(ord("a") + letter))
    return "".join(reversed(letters))


def changed(path: str, how: str) -> str:
    """What an InputChangedError says."""
    return f"{path} {how} since the archive was opened; leave the archive alone while it is converted, and begin again."

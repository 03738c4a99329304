"""The shard format: WebDataset tars, a commit record beside each, one manifest beside all of them. Its only home.

A shard is a plain USTAR file that any WebDataset reader opens. What a tar lacks, the commit record adds: where each
member's bytes are and their checksums, a season at a time, so that one season is one `pread` and no flipped bit goes
unseen. Members come in a fixed order under fixed headers: equal samples give equal bytes. See docs/data-format.md.
"""

import hashlib
import io
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeAlias
from urllib.parse import quote

import google_crc32c
import numpy as np

from cromss_dist.data.sample import Json, Sample, SampleSpec, Uint8Array
from cromss_dist.data.staging import atomic_file, write_atomically
from cromss_dist.data.store.manifest import MANIFEST, ShardEntry, canonical, parse_object
from cromss_dist.errors import ShardError
from cromss_dist.failpoint import failpoint

BLOCK_BYTES = 512  # a tar pads headers and payloads to this
NO_PIXELS: Uint8Array = np.empty(0, np.uint8)
MAX_MEMBER_KEY = 60  # bytes; a USTAR name has 100, and the array's name follows

Checksums: TypeAlias = dict[str, tuple[int, ...]]
"""CRC-32C of each season's pixels, by array."""


@dataclass(frozen=True)
class Member:
    """One file in a shard: `size` payload bytes at `offset` of the tar, with their CRC-32C.

    Arrays also have one CRC-32C a season; the pixels, seasons one after another, are the payload's last bytes.
    """

    name: str
    offset: int
    size: int
    crc32c: int
    season_crc32c: tuple[int, ...] = ()


Samples: TypeAlias = list[tuple[str, tuple[Member, ...]]]
"""A commit record: key and members of each sample."""


def block_bytes(spec: Json) -> int:
    """Bytes of one season of an array."""
    return int(np.prod(spec["shape"][1:], dtype=np.int64)) * np.dtype(spec["dtype"]).itemsize


def sample_bytes(spec: SampleSpec) -> int:
    """Bytes that one sample takes in a tar, to within the length of its metadata."""
    payloads = [4096, *(len(npy_header(spec.shape(name))) + math.prod(spec.shape(name)) for name in spec.names)]
    return sum(BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES for size in payloads)


def member_key(key: str) -> str:
    """The key as it begins the names of a tar's members: WebDataset takes what is before the first dot for the key.

    Letters, digits, `_`, `-` and `~` stay, other bytes of the UTF-8 text become %XX; of a long one the first 25 characters
    and a digest stay, so that names fit into a USTAR header. Different keys have different member keys.
    """
    quoted = quote(key, safe="", errors="surrogatepass").replace(".", "%2E")
    if len(quoted) <= MAX_MEMBER_KEY:
        return quoted
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:32]
    return f"{quoted[: MAX_MEMBER_KEY - 35]}%--{digest}"  # no quoted text has %-


def season_checksums(arrays: Mapping[str, Uint8Array]) -> Checksums:
    """CRC-32C of each season's pixels of each array of a sample."""
    return {name: tuple(google_crc32c.value(season) for season in np.ascontiguousarray(array)) for name, array in arrays.items()}


def sample_digest(checksums: Checksums) -> str:
    """Names the pixels of a sample, 32 hex digits: equal pixels have equal ones, wherever and under whatever key."""
    return hashlib.sha256(canonical(checksums)).hexdigest()[:32]


def write_shard(folder: Path, name: str, samples: Iterable[tuple[Sample, Checksums]]) -> ShardEntry | None:
    """Writes the tar `name` and its commit record `<stem>.json`, each on disk and read back before it gets its name.

    Samples are written as they come; no more than one is held.

    Returns:
        The manifest's entry, or None, and no file, when there was no sample.

    Raises:
        ShardError: what was read back is not what was written.
    """
    iterator = iter(samples)
    if (first := next(iterator, None)) is None:
        return None
    members: Samples = []

    with atomic_file(folder / name, check=lambda path: _check_written(path, file, members)) as raw:
        file = _HashingFile(raw)
        members.append((first[0].key, _write_sample(file, *first)))
        failpoint("mid_write")
        members.extend((sample.key, _write_sample(file, sample, checksums)) for sample, checksums in iterator)
        file.write(bytes(-(file.size + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE + 2 * BLOCK_BYTES))  # end of archive
    sha256 = file.sha256.hexdigest()
    told = [{"key": key, "members": [vars(member) for member in of_key]} for key, of_key in members]
    record = canonical({"shard": name, "size": file.size, "sha256": sha256, "samples": told})
    written = ShardEntry(name, len(members), file.size, sha256, hashlib.sha256(record).hexdigest())
    write_atomically(folder / written.record, record)
    return written


def read_record(folder: Path, entry: ShardEntry) -> Samples:
    """Key and members of each sample of a shard, from its commit record.

    Raises:
        ShardError: the record is missing or not the one the manifest was made with.
    """
    path = folder / entry.record
    if not path.is_file():
        raise ShardError(f"{path} is missing: {entry.name} has no commit record. Restore it or shard the archive again.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.record_sha256:
        raise ShardError(f"{path} is not the record that {MANIFEST} was made with. Restore it or shard the archive again.")
    return [
        (sample["key"], tuple(Member(**{**m, "season_crc32c": tuple(m["season_crc32c"])}) for m in sample["members"]))
        for sample in parse_object(path, data)["samples"]
    ]


def file_problems(folder: Path, entries: Sequence[ShardEntry], first_keys: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the tars of a dataset by names, sizes and the first header of each; pixels are not read.

    Args:
        folder: Of the dataset.
        entries: The manifest's.
        first_keys: Of the tars, by name, the key of the first sample, where it can be believed.

    Yields:
        A kind ('missing', 'of another size', 'swapped', 'damaged at the beginning', 'surplus'), a file name, and what was found.
    """
    first = {_first_member(key): name for name, key in first_keys.items()}
    for entry in entries:
        path = folder / entry.name
        if not path.is_file():
            yield "missing", entry.name, "is missing"
            continue
        if (size := path.stat().st_size) != entry.size:
            yield "of another size", entry.name, f"has {size} bytes; {MANIFEST} states {entry.size}"
        begins = _begins_with(path)
        if entry.name in first_keys and begins != (begin := _first_member(first_keys[entry.name])):
            where = f"; so should {first[begins]}, the files may have changed places" if begins in first else ""
            kind = "swapped" if begins in first else "damaged at the beginning"
            yield kind, entry.name, f"begins with member {begins!r}, its record with {begin!r}{where}"
    named = {name for entry in entries for name in (entry.name, entry.record)}
    for path in sorted(folder.iterdir()):
        ours = path.suffix in (".tar", ".tmp") or (path.suffix == ".json" and path.name.startswith("shard-"))
        if ours and path.name not in named:
            yield "surplus", path.name, f"is surplus: {MANIFEST} does not name it"


def _check_written(path: Path, written: "_HashingFile", samples: Samples) -> None:
    """Compares a tar with what was just written, by one CRC-32C of the whole: a second sha256 would double the work."""
    crc32c = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc32c = google_crc32c.extend(crc32c, block)
        if (file.tell(), crc32c) != (written.size, written.crc32c):
            raise ShardError(f"{path}: what was read back is not what was written. Check the disk and run it again.")
    if tar_listing(path) != stated_listing(samples):
        raise ShardError(f"{path}: the tar's members are not those of its commit record.")


def stated_listing(record: Samples) -> list[tuple[str, int, int]]:
    """Name, offset and size of the members that a tar should have, by its record."""
    return [(f"{member_key(key)}.{member.name}", member.offset, member.size) for key, members in record for member in members]


def tar_listing(path: Path) -> list[tuple[str, int, int]]:
    """The same as tarfile, which knows no record, finds them. Raises what tarfile raises."""
    with tarfile.open(path, "r:") as tar:
        return [(info.name, info.offset_data, info.size) for info in tar]


class _HashingFile:
    """A file open for writing that knows the size, sha256 and CRC-32C of what went through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.crc32c = 0

    def write(self, data: bytes | Uint8Array) -> None:
        view = data if isinstance(data, bytes) else data.data
        self.size += len(data) if isinstance(data, bytes) else data.nbytes
        self.sha256.update(view)
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        self.raw.write(view)


def _write_sample(file: _HashingFile, sample: Sample, checksums: Checksums) -> tuple[Member, ...]:
    name = member_key(sample.key)
    members = [_write_member(file, name, "json", canonical(sample.metadata))]
    for array, pixels in sample.arrays.items():
        members.append(_write_member(file, name, f"{array}.npy", npy_header(pixels.shape), pixels, checksums[array]))
    return tuple(members)


def _write_member(
    file: _HashingFile, key: str, name: str, data: bytes, pixels: Uint8Array = NO_PIXELS, seasons: tuple[int, ...] = ()
) -> Member:
    """Writes a member: `data`, then `pixels`, which are not copied on the way."""
    pixels = np.ascontiguousarray(pixels)
    info = tarfile.TarInfo(f"{key}.{name}")  # mtime, uid and gid 0 and no names, by default
    info.size, info.mode = len(data) + pixels.nbytes, 0o444
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.size
    file.write(data)
    file.write(pixels)
    file.write(bytes(-info.size % BLOCK_BYTES))
    return Member(name, offset, info.size, google_crc32c.extend(google_crc32c.value(data), pixels), seasons)


def _first_member(key: str) -> str:
    """The name with which the tar begins whose first sample has this key."""
    return f"{member_key(key)}.json"


def _begins_with(tar: Path) -> str:
    """The name in the first header of a tar."""
    with tar.open("rb") as file:
        return file.read(100).rstrip(b"\0").decode(errors="replace")


@lru_cache
def npy_header(shape: tuple[int, ...]) -> bytes:
    """What precedes the pixels of a uint8 array in a .npy file."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(np.uint8))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()

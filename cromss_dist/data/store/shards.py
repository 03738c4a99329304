"""The shard format: WebDataset tars, a commit record beside each, one manifest beside all of them. Its only home.

A shard is a plain USTAR file that any WebDataset reader opens. What a tar lacks, the commit record adds: where each
member's bytes are and their checksums, a season at a time, so that one season is one `pread` and no flipped bit goes
unseen. Members come in a fixed order under fixed headers: equal samples give equal bytes. See docs/data-format.md.
"""

import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias
from urllib.parse import quote

import google_crc32c
import numpy as np

from cromss_dist.data.sample import Json, Sample, SampleSpec
from cromss_dist.data.staging import atomic_file, write_atomically
from cromss_dist.errors import ShardError
from cromss_dist.failpoint import failpoint

FORMAT = "cromss-shards"
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
LEDGER = "ledger.jsonl"
BLOCK_BYTES = 512  # a tar pads headers and payloads to this
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


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard."""

    name: str
    samples: int
    size: int
    sha256: str
    record_sha256: str

    @property
    def record(self) -> str:
        """File name of its commit record."""
        return self.name.removesuffix(".tar") + ".json"

    def to_json(self) -> Json:
        """As the manifest has it."""
        return asdict(self)


def block_bytes(spec: Json) -> int:
    """Bytes of one season of an array."""
    return int(np.prod(spec["shape"][1:], dtype=np.int64)) * np.dtype(spec["dtype"]).itemsize


def sample_bytes(spec: SampleSpec) -> int:
    """Bytes that one sample takes in a tar, to within the length of its metadata."""
    payloads = [4096, *(len(npy_header(spec.shape(name))) + math.prod(spec.shape(name)) for name in spec.names)]
    return sum(BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES for size in payloads)


def canonical(content: Json) -> bytes:
    """The JSON text whose sha256 is a digest: sorted keys, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


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


def season_checksums(sample: Sample) -> Checksums:
    """CRC-32C of each season's pixels of each array."""
    return {name: tuple(google_crc32c.value(season.tobytes()) for season in array) for name, array in sample.arrays.items()}


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
    members: list[tuple[str, tuple[Member, ...]]] = []

    def entry() -> ShardEntry:
        return ShardEntry(name, len(members), file.size, file.sha256.hexdigest(), hashlib.sha256(record()).hexdigest())

    def record() -> bytes:
        told = [{"key": key, "members": [asdict(member) for member in of_key]} for key, of_key in members]
        return canonical({"shard": name, "size": file.size, "sha256": file.sha256.hexdigest(), "samples": told})

    with atomic_file(folder / name, check=lambda path: _check_written(path, file, members)) as raw:
        file = _HashingFile(raw)
        members.append((first[0].key, _write_sample(file, *first)))
        failpoint("mid_write")
        members.extend((sample.key, _write_sample(file, sample, checksums)) for sample, checksums in iterator)
        file.write(bytes(-(file.size + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE + 2 * BLOCK_BYTES))  # end of archive
    written = entry()
    write_atomically(folder / written.record, record())
    return written


def write_manifest(folder: Path, content: Json) -> str:
    """Writes `manifest.json` with its own digest, and returns the digest."""
    digest = hashlib.sha256(canonical(content)).hexdigest()
    write_atomically(folder / MANIFEST, json.dumps({**content, "digest": digest}, indent=1).encode())
    return digest


def read_manifest(folder: Path) -> Json:
    """Reads the manifest and checks that it is ours, whole and of a version we know.

    Raises:
        ShardError: it is not.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ShardError(f"{folder} has no {MANIFEST}; give a folder that tools/shard.py has written.")
    manifest = _parse(path, path.read_bytes())
    if manifest.get("format") != FORMAT or manifest.get("schema_version") != SCHEMA_VERSION:
        raise ShardError(
            f"{path} is format {manifest.get('format')!r} version {manifest.get('schema_version')!r}; this code reads {FORMAT!r} "
            f"version {SCHEMA_VERSION}. Shard the archive again with this version."
        )
    content = {name: value for name, value in manifest.items() if name != "digest"}
    found = hashlib.sha256(canonical(content)).hexdigest()
    if found != manifest.get("digest"):
        raise ShardError(
            f"{path} is damaged or was edited: its digest is {found}, it states {manifest.get('digest')}. Restore it."
        )
    return manifest


def manifest_entries(folder: Path, manifest: Json) -> list[ShardEntry]:
    """The manifest's shards, their names checked to be plain file names inside the folder."""
    entries = [ShardEntry(**entry) for entry in manifest["shards"]]
    for entry in entries:
        if not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", entry.name):
            raise ShardError(
                f"{folder / MANIFEST} names the shard {entry.name!r}; allowed are plain names such as shard-000000.tar."
            )
    return entries


def read_record(folder: Path, entry: ShardEntry) -> list[tuple[str, tuple[Member, ...]]]:
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
        for sample in _parse(path, data)["samples"]
    ]


def verify_shard(folder: Path, entry: ShardEntry) -> None:
    """Reads every byte of a shard back and compares it with record and manifest.

    Raises:
        ShardError: a byte of the tar or of its record changed, names what.
    """
    path = folder / entry.name
    samples = read_record(folder, entry)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if file.tell() != entry.size or digest != entry.sha256:
            raise ShardError(
                f"{path} has {file.tell()} bytes of sha256 {digest}; {MANIFEST} states {entry.size} of {entry.sha256}."
            )
        for key, members in samples:
            for member in members:
                file.seek(member.offset)
                if google_crc32c.value(file.read(member.size)) != member.crc32c:
                    raise ShardError(f"{path}: sample {key}, member {member.name}: the bytes do not match their CRC-32C.")
    _check_members(path, samples)


def _check_written(path: Path, written: "_HashingFile", samples: list[tuple[str, tuple[Member, ...]]]) -> None:
    """Compares a tar with what was just written, by one CRC-32C of the whole: a second sha256 would double the work."""
    crc32c = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc32c = google_crc32c.extend(crc32c, block)
        if (file.tell(), crc32c) != (written.size, written.crc32c):
            raise ShardError(f"{path}: what was read back is not what was written. Check the disk and run it again.")
    _check_members(path, samples)


def _check_members(path: Path, samples: list[tuple[str, tuple[Member, ...]]]) -> None:
    with tarfile.open(path, "r:") as tar:
        found = [(info.name, info.offset_data, info.size) for info in tar]
    if found != [(f"{member_key(key)}.{m.name}", m.offset, m.size) for key, members in samples for m in members]:
        raise ShardError(f"{path}: the tar's members are not those of its commit record.")


class _HashingFile:
    """A file open for writing that knows the size, sha256 and CRC-32C of what went through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.crc32c = 0

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self.sha256.update(data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        self.raw.write(data)


def _write_sample(file: _HashingFile, sample: Sample, checksums: Checksums) -> tuple[Member, ...]:
    name = member_key(sample.key)
    members = [_write_member(file, name, "json", canonical(sample.metadata))]
    for array, pixels in sample.arrays.items():
        payload = npy_header(pixels.shape) + pixels.tobytes()
        members.append(_write_member(file, name, f"{array}.npy", payload, checksums[array]))
    return tuple(members)


def _write_member(file: _HashingFile, key: str, name: str, data: bytes, seasons: tuple[int, ...] = ()) -> Member:
    info = tarfile.TarInfo(f"{key}.{name}")  # mtime, uid and gid 0 and no names, by default
    info.size, info.mode = len(data), 0o444
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.size
    file.write(data)
    file.write(bytes(-len(data) % BLOCK_BYTES))
    return Member(name, offset, len(data), google_crc32c.value(data), seasons)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What precedes the pixels of a uint8 array in a .npy file."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(np.uint8))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _parse(path: Path, data: bytes) -> Json:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is no JSON: {error}. Restore it or shard the archive again.") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path} is no JSON object. Restore it or shard the archive again.")
    return content

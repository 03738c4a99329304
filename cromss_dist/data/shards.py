"""The shard format: WebDataset tars, a commit record beside each, one manifest beside all of them. Its only home.

A shard is a plain USTAR file that any WebDataset reader opens. What a tar lacks, the commit record adds: where each
member's bytes are and their checksums, a season at a time, so that one season is one `pread` and no flipped bit goes
unseen. Members come in a fixed order under fixed headers: equal samples give equal bytes. See docs/data-format.md.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np

from cromss_dist.data.archive import Sample
from cromss_dist.errors import ShardError
from cromss_dist.schema import (
    CLASS_NAMES,
    IGNORE,
    IMAGE_ARRAYS,
    KIND_ARRAY,
    LABEL_ARRAY,
    NOISE_KINDS,
    NORMALISATION,
    NUM_SEASONS,
    REFERENCE_ARRAY,
)

FORMAT = "cromss-shards"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LEDGER = "ledger.jsonl"
BLOCK_BYTES = 512  # a tar pads headers and payloads to this

Json: TypeAlias = dict[str, Any]


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


def array_specs(patch_px: int, value_arrays: Iterable[str]) -> dict[str, Json]:
    """Type, shape and meaning of each array of a dataset, in the order in which members are written."""
    specs: dict[str, Json] = {}
    for spec in IMAGE_ARRAYS:
        side = patch_px // spec.scale
        shape = [NUM_SEASONS, len(spec.bands), side, side]
        specs[spec.name] = {
            "dtype": "uint8",
            "shape": shape,
            "modality": spec.modality,
            "bands": list(spec.bands),
            "gsd_m": 10 * spec.scale,
        }
    names = {LABEL_ARRAY: CLASS_NAMES, REFERENCE_ARRAY: CLASS_NAMES, KIND_ARRAY: NOISE_KINDS}
    for name in value_arrays:
        shape = [NUM_SEASONS, patch_px, patch_px]
        specs[name] = {"dtype": "uint8", "shape": shape, "values": list(names[name]), "ignore": IGNORE, "gsd_m": 10}
    return specs


def normalisation_contracts() -> dict[str, Json]:
    """How the stored uint8 came from physical values, with the digest of each contract."""
    return {modality: {**asdict(contract), "digest": contract.digest} for modality, contract in NORMALISATION.items()}


def block_bytes(spec: Json) -> int:
    """Bytes of one season of an array."""
    return int(np.prod(spec["shape"][1:], dtype=np.int64)) * np.dtype(spec["dtype"]).itemsize


def sample_bytes(specs: dict[str, Json]) -> int:
    """Bytes that one sample takes in a tar, to within the length of its metadata."""
    payloads = [4096, *(_header_bytes(spec) + int(np.prod(spec["shape"])) for spec in specs.values())]
    return sum(BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES for size in payloads)


def canonical(content: Json) -> bytes:
    """The JSON text whose sha256 is a digest: sorted keys, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardEntry | None:
    """Writes one tar and its commit record `<stem>.json`, both synced to disk.

    Returns:
        The manifest's entry, or None, and no file, when there was no sample.
    """
    with path.open("xb") as raw:
        file = _HashingFile(raw)
        records = [{"key": s.key, "members": [asdict(member) for member in _write_sample(file, s)]} for s in samples]
        file.write(bytes(-(file.size + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE + 2 * BLOCK_BYTES))  # end of archive
        raw.flush()
        os.fsync(raw.fileno())
    if not records:
        path.unlink()
        return None
    record = canonical({"shard": path.name, "size": file.size, "sha256": file.sha256.hexdigest(), "samples": records})
    write_synced(path.with_suffix(".json"), record)
    return ShardEntry(path.name, len(records), file.size, file.sha256.hexdigest(), hashlib.sha256(record).hexdigest())


def write_manifest(folder: Path, content: Json) -> str:
    """Writes `manifest.json` with its own digest, and returns the digest."""
    digest = hashlib.sha256(canonical(content)).hexdigest()
    write_synced(folder / MANIFEST, json.dumps({**content, "digest": digest}, indent=1).encode())
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
    path = (folder / entry.name).with_suffix(".json")
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
    with tarfile.open(path, "r:") as tar:
        found = [(info.name, info.offset_data, info.size) for info in tar]
    if found != [(f"{key}.{m.name}", m.offset, m.size) for key, members in samples for m in members]:
        raise ShardError(f"{path}: the tar's members are not those of its commit record.")


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class _HashingFile:
    """A file open for writing that knows the size and sha256 of what went through it."""

    def __init__(self, raw: io.BufferedWriter) -> None:
        self.raw = raw
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self.sha256.update(data)
        self.raw.write(data)


def _write_sample(file: _HashingFile, sample: Sample) -> list[Member]:
    members = [_write_member(file, sample.key, "json", canonical(sample.metadata))]
    for name, array in sample.arrays.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        seasons = tuple(google_crc32c.value(season.tobytes()) for season in array)
        members.append(_write_member(file, sample.key, f"{name}.npy", buffer.getvalue(), seasons))
    return members


def _write_member(file: _HashingFile, key: str, name: str, data: bytes, seasons: tuple[int, ...] = ()) -> Member:
    info = tarfile.TarInfo(f"{key}.{name}")  # mtime, uid and gid 0 and no names, by default
    info.size, info.mode = len(data), 0o444
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.size
    file.write(data + bytes(-len(data) % BLOCK_BYTES))
    return Member(name, offset, len(data), google_crc32c.value(data), seasons)


def _header_bytes(spec: Json) -> int:
    buffer = io.BytesIO()
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(spec["dtype"])),
        "fortran_order": False,
        "shape": tuple(spec["shape"]),
    }
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.tell()


def _parse(path: Path, data: bytes) -> Json:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is no JSON: {error}. Restore it or shard the archive again.") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path} is no JSON object. Restore it or shard the archive again.")
    return content

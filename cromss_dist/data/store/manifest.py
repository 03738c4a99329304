"""The manifest: one JSON file that states all of a dataset under a digest, which names it. See docs/data-format.md."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from cromss_dist.data.sample import Json
from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import ShardError

FORMAT = "cromss-shards"
SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
LEDGER = "ledger.jsonl"


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


def canonical(content: Json) -> bytes:
    """The JSON text whose sha256 is a digest: sorted keys, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def write_manifest(folder: Path, content: Json) -> str:
    """Writes `manifest.json` with its own digest, and returns the digest."""
    digest = hashlib.sha256(canonical(content)).hexdigest()
    write_atomically(folder / MANIFEST, json.dumps({**content, "digest": digest}, indent=1).encode())
    return digest


def read_manifest(folder: Path) -> Json:
    """The manifest of a folder; see `parse_manifest`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ShardError(f"{folder} has no {MANIFEST}; give a folder that tools/shard.py has written.")
    return parse_manifest(str(path), path.read_bytes())


def parse_manifest(where: str, data: bytes) -> Json:
    """The manifest in `data`, after checking that it is ours, whole and of a version we know.

    Raises:
        ShardError: it is not.
    """
    manifest = parse_object(where, data)
    if manifest.get("format") != FORMAT or manifest.get("schema_version") != SCHEMA_VERSION:
        raise ShardError(
            f"{where} is format {manifest.get('format')!r} version {manifest.get('schema_version')!r}; this code reads "
            f"{FORMAT!r} version {SCHEMA_VERSION}. Shard the archive again with this version."
        )
    content = {name: value for name, value in manifest.items() if name != "digest"}
    found = hashlib.sha256(canonical(content)).hexdigest()
    if found != manifest.get("digest"):
        raise ShardError(
            f"{where} is damaged or was edited: its digest is {found}, it states {manifest.get('digest')}. Restore it."
        )
    return manifest


def manifest_entries(origin: str | Path, manifest: Json) -> list[ShardEntry]:
    """The manifest's shards, their names checked to be plain file names inside the folder."""
    entries = [ShardEntry(**entry) for entry in manifest["shards"]]
    for entry in entries:
        if (type(entry.samples), type(entry.size), type(entry.sha256)) != (int, int, str) or min(entry.samples, entry.size) < 0:
            raise TypeError(f"{entry}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", entry.name):
            raise ShardError(
                f"{origin}/{MANIFEST} names the shard {entry.name!r}; allowed are plain names such as shard-000000.tar."
            )
    return entries


def parse_object(path: str | Path, data: bytes) -> Json:
    """The JSON object that a file, or a member of it, holds. Raises ShardError where it holds none."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is no JSON: {error}. Restore it or shard the archive again.") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path} is no JSON object. Restore it or shard the archive again.")
    return content

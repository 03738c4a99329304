"""Random access to a folder of shards: one `pread` an array, and no byte that does not match its checksum.

The tars are not parsed: where everything is comes from the commit records, into arrays of offsets.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.shards import (
    MANIFEST,
    Samples,
    ShardEntry,
    block_bytes,
    file_problems,
    manifest_entries,
    parse_object,
    read_manifest,
    read_record,
)
from cromss_dist.errors import ShardError
from cromss_dist.schema import LABEL_ARRAY, ArraySpec, Modality, Normalisation

NUM_NAMES_SHOWN = 5
MAX_SEASONS = 1000


@dataclass(frozen=True)
class ShardIndex:
    """Where each location's arrays are.

    Args:
        folder: Of the shards.
        manifest: Its content, see docs/data-format.md.
        locations: N keys, in the order of the manifest: shard by shard.
        arrays: Names of the stored arrays, A of them.
        shard_names: File name of each shard.
        shard_of: int32 (N,): index into `shard_names`.
        offsets: int64 (N, A): where the first season's pixels start in the tar, bytes.
        checksums: uint32 (N, A, S): CRC-32C of each of the S seasons' pixels.
        metadata_spans: int64 (N, 3): offset, size and CRC-32C of the sample's JSON in the tar.
    """

    folder: Path
    manifest: Json
    locations: tuple[str, ...]
    arrays: tuple[str, ...]
    shard_names: tuple[str, ...]
    shard_of: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32]
    metadata_spans: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the manifest states: names the dataset."""
        return str(self.manifest["digest"])

    @property
    def patch_px(self) -> int:
        """Side of the patches at 10 m, px."""
        return int(self.manifest["patch_px"])

    @property
    def num_seasons(self) -> int:
        """Scenes a location has in each modality, and labels."""
        return int(self.manifest["arrays"][LABEL_ARRAY]["shape"][0])

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The stored image arrays."""
        return tuple(
            ArraySpec(name, tuple(spec["bands"]), int(spec["gsd_m"]) // 10, spec["modality"])
            for name, spec in self.manifest["arrays"].items()
            if spec.get("modality")
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels' values 0, 1, ... mean."""
        return tuple(self.manifest["arrays"][LABEL_ARRAY]["values"])

    def normalisation(self, modality: Modality) -> Normalisation:
        """The contract by which the stored values of a modality came from physical ones."""
        stated = dict(self.manifest["normalisation"][modality])
        digest = stated.pop("digest")
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
        contract = Normalisation(**fields)
        if contract.digest != digest:
            raise ShardError(
                f"{self.folder / MANIFEST} states digest {digest} for the normalisation of {modality}, which has "
                f"{contract.digest}; shard the archive again."
            )
        return contract

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array as `read` returns it."""
        shape = tuple(self.manifest["arrays"][name]["shape"])
        return shape if name == LABEL_ARRAY else shape[1:]

    def read(self, sample_id: int, season: int, arrays: Sequence[str]) -> dict[str, Uint8Array]:
        """Reads one season of `arrays` of one location; of the noisy labels all seasons, since the prior needs them.

        Args:
            sample_id: Index into `locations`.
            season: 0 to num_seasons - 1.
            arrays: Names out of `self.arrays`.

        Returns:
            uint8 (band, H / scale, W / scale) for images, (S, H, W) for 'label', (H, W) for the others. Read-only.

        Raises:
            ShardError: bytes are missing or do not match their checksum.
        """
        path = self.folder / self.shard_names[self.shard_of[sample_id]]
        # Opened anew each time: no limit on shards, nothing to close or to share between threads, and microseconds.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return {name: self._read_array(descriptor, path, sample_id, season, name) for name in arrays}
        finally:
            os.close(descriptor)

    def metadata(self, sample_id: int) -> Json:
        """Where and when a location was taken: the JSON member of its sample, see `data.sample.Sample`.

        Raises:
            ShardError: bytes are missing or do not match their checksum, or are no JSON object.
        """
        path = self.folder / self.shard_names[self.shard_of[sample_id]]
        offset, size, checksum = (int(number) for number in self.metadata_spans[sample_id])
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if google_crc32c.value(data) != checksum:
            raise ShardError(
                f"{path}: sample {self.locations[sample_id]}, member json: the bytes do not match their CRC-32C. The file was "
                "damaged after it was written; restore it or shard the archive again."
            )
        return parse_object(path, data)

    def _read_array(self, descriptor: int, path: Path, sample_id: int, season: int, name: str) -> Uint8Array:
        array = self.arrays.index(name)
        size = block_bytes(self.manifest["arrays"][name])
        seasons = range(self.num_seasons) if name == LABEL_ARRAY else range(season, season + 1)
        data = os.pread(descriptor, size * len(seasons), int(self.offsets[sample_id, array]) + size * seasons.start)
        for i, stored_season in enumerate(seasons):
            if google_crc32c.value(data[i * size : (i + 1) * size]) != self.checksums[sample_id, array, stored_season]:
                raise ShardError(
                    f"{path}: sample {self.locations[sample_id]}, member {name}.npy, season {stored_season}: the bytes do not "
                    "match their CRC-32C. The file was damaged after it was written; restore it or shard the archive again."
                )
        return np.frombuffer(data, np.uint8).reshape(self.shape(name))


def open_shards(folder: str | Path) -> ShardIndex:
    """Opens a folder of shards after checking that it is complete: digests of manifest and records, names and sizes of tars.

    Pixels are not read here; `ShardIndex.read` checks those it reads. What is wrong is listed, not only the first of it.

    Raises:
        ShardError: the folder is none of ours, or something in it is missing, surplus or changed.
    """
    path = Path(folder)
    if "://" in str(folder) or not path.is_dir():
        raise ShardError(f"{folder} is not a folder; give a local folder that tools/shard.py has written (URLs are not opened).")
    try:
        return _build_index(path)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        # digests hold, yet the content is not ours
        raise ShardError(f"{folder}: manifest or a commit record is malformed: {error!r}. Shard the archive again.") from error


def _read_records(path: Path, entries: Sequence[ShardEntry]) -> dict[str, Samples]:
    """The commit records, once everything is there. Raises ShardError that says what is not, a few names of each kind."""
    records: dict[str, Samples] = {}
    wrong: defaultdict[str, list[str]] = defaultdict(list)
    for entry in entries:
        try:
            records[entry.name] = read_record(path, entry)
        except ShardError:
            kind = "not the manifest's" if (path / entry.record).is_file() else "missing"
            wrong[kind].append(entry.record)
    for kind, name, _ in file_problems(path, entries, records):
        wrong[kind].append(name)
    if wrong:
        told = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:NUM_NAMES_SHOWN])}{', ...' if len(names) > NUM_NAMES_SHOWN else ''})"
            for kind, names in wrong.items()
        )
        raise ShardError(
            f"{path} is not as {MANIFEST} states: {told}. tools/verify.py says more. Restore them, move what is surplus "
            "elsewhere, or shard the archive again."
        )
    return records


def _build_index(path: Path) -> ShardIndex:
    manifest = read_manifest(path)
    entries = manifest_entries(path, manifest)
    records = _read_records(path, entries)
    names = tuple(manifest["arrays"])
    for entry in entries:  # before anything is sized by what the manifest says
        if len(records[entry.name]) != entry.samples:
            raise ValueError(f"{entry.name} has {len(records[entry.name])} samples in its record, {entry.samples} in {MANIFEST}")
    total = sum(entry.samples for entry in entries)
    keys: list[str] = []
    shard_of = np.repeat(np.arange(len(entries), dtype=np.int32), [entry.samples for entry in entries])
    offsets = np.zeros((total, len(names)), np.int64)
    num_seasons = int(manifest["arrays"][LABEL_ARRAY]["shape"][0])
    if not 0 < num_seasons <= MAX_SEASONS:
        raise ValueError(f"{MANIFEST} states {num_seasons} seasons")
    checksums = np.zeros((total, len(names), num_seasons), np.uint32)
    metadata_spans = np.zeros((total, 3), np.int64)
    for entry in entries:
        for key, members in records[entry.name]:
            by_name = {member.name: member for member in members}
            for array, (name, spec) in enumerate(manifest["arrays"].items()):
                member, pixels = by_name[f"{name}.npy"], num_seasons * block_bytes(spec)
                if not 0 <= pixels <= member.size <= member.offset + member.size <= entry.size:
                    raise ValueError(f"{entry.name}: sample {key}: {member.name} does not lie inside the tar")
                offsets[len(keys), array] = member.offset + member.size - pixels
                checksums[len(keys), array] = member.season_crc32c
            metadata = by_name["json"]
            if not 0 <= metadata.size <= metadata.offset + metadata.size <= entry.size:
                raise ValueError(f"{entry.name}: sample {key}: its metadata does not lie inside the tar")
            metadata_spans[len(keys)] = metadata.offset, metadata.size, metadata.crc32c
            keys.append(key)
    return ShardIndex(
        folder=path,
        manifest=manifest,
        locations=tuple(keys),
        arrays=names,
        shard_names=tuple(entry.name for entry in entries),
        shard_of=shard_of,
        offsets=offsets,
        checksums=checksums,
        metadata_spans=metadata_spans,
    )

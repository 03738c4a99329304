"""Reads every byte of a shard and says of which sample, array and season one is not what the commit record states."""

import hashlib
import json
import math
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.manifest import MANIFEST, ShardEntry
from cromss_dist.data.store.shards import Member, Samples, npy_header, stated_listing, tar_listing

MAX_JSON_BYTES = 2**20  # of a sample's metadata


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be.

    Args:
        file: Relative to the dataset.
        what: What was found, and what should be.
        key: The location, where it concerns one.
        array: The array, where it concerns one.
        season: From 0, where it concerns one.
    """

    file: str
    what: str
    key: str | None = None
    array: str | None = None
    season: int | None = None

    def __str__(self) -> str:
        named = (("sample", self.key), ("array", self.array), ("season", self.season))
        return ", ".join([self.file, *(f"{name} {value}" for name, value in named if value is not None)]) + f": {self.what}"


def check_tar(
    folder: Path, entry: ShardEntry, record: Samples, arrays: dict[str, tuple[int, ...]], problems: list[Problem]
) -> Iterator[tuple[str, Json | None, dict[str, Uint8Array]]]:
    """Compares a tar with its record and the manifest, and adds to `problems` what is not as they state.

    Args:
        folder: Of the dataset.
        entry: The manifest's, of the tar, which is there.
        record: The tar's commit record; empty where it cannot be believed.
        arrays: Name and shape of each array of a sample.
        problems: To add to.

    Yields:
        Key, metadata and arrays of each sample; None, or no array, where the bytes changed.
    """
    num_before = len(problems)
    tar = _OpenTar(entry, arrays, problems)
    with (folder / entry.name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        for key, members in record:
            yield key, *tar.read_sample(file.fileno(), key, members)
    if record and (listed := _listing(folder / entry.name)) != stated_listing(record):
        what = listed if isinstance(listed, str) else "the tar's members are not those of its commit record"
        problems.append(Problem(entry.name, what))
    if digest != entry.sha256 and len(problems) == num_before:
        problems.append(Problem(entry.name, f"has sha256 {digest}, {MANIFEST} states {entry.sha256}; no member is touched"))


@dataclass(frozen=True)
class _OpenTar:
    """What is to be known for reading a tar's members."""

    entry: ShardEntry
    arrays: dict[str, tuple[int, ...]]
    problems: list[Problem]

    def read_sample(self, descriptor: int, key: str, members: tuple[Member, ...]) -> tuple[Json | None, dict[str, Uint8Array]]:
        metadata: Json | None = None
        arrays = {}
        if [member.name for member in members] != ["json", *(f"{name}.npy" for name in self.arrays)]:
            self.add(f"its record has the members {[member.name for member in members]}", key)
            return None, {}
        for member in members:
            name = member.name.removesuffix(".npy")
            header = npy_header(self.arrays[name]) if name in self.arrays else b""
            data = self.read_member(descriptor, key, name, member, header)
            if data is None:
                continue
            if name in self.arrays:
                arrays[name] = np.frombuffer(data, np.uint8, offset=len(header)).reshape(self.arrays[name])
                continue
            metadata = json.loads(data)
            if not isinstance(metadata, dict) or metadata.get("key") != key:
                self.add("the metadata is of another location", key, name)
                metadata = None
        return metadata, arrays

    def read_member(self, descriptor: int, key: str, name: str, member: Member, header: bytes) -> bytes | None:
        """The payload of a member, if it is what its record states. `header` is what an array must begin with."""
        size = len(header) + math.prod(self.arrays[name]) if name in self.arrays else min(member.size, MAX_JSON_BYTES)
        if member.size != size or not 0 <= member.offset <= self.entry.size - size:
            self.add(f"the record states {member.size} bytes at {member.offset}", key, name)
            return None
        data = os.pread(descriptor, size, member.offset)
        if len(data) < size:
            self.add(f"only {len(data)} of {size} bytes are there", key, name)
            return None
        if google_crc32c.value(data) == member.crc32c and data.startswith(header):
            return data
        block = (size - len(header)) // max(1, len(member.season_crc32c))
        starts = range(len(header), size, max(1, block))
        changed = [s for s, crc in enumerate(member.season_crc32c) if google_crc32c.value(data[starts[s] :][:block]) != crc]
        for season in changed:
            self.problems.append(Problem(self.entry.name, "the bytes do not match their CRC-32C", key, name, season))
        if not changed:
            self.add("the bytes before the pixels, or the metadata, do not match their CRC-32C", key, name)
        return None

    def add(self, what: str, key: str, name: str | None = None) -> None:
        self.problems.append(Problem(self.entry.name, what, key, name))


def _listing(path: Path) -> list[tuple[str, int, int]] | str:
    """The members that tarfile finds, or why it cannot."""
    try:
        return tar_listing(path)
    except (tarfile.TarError, ValueError, OSError) as error:
        return f"is no tar that can be read: {error}"

"""Random access to the tars of a dataset: one `pread` an array, and no byte that does not match its checksum.

The tars are not parsed: where everything is comes from the index, as arrays of offsets.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import google_crc32c
import numpy as np

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.index_file import TarTables
from cromss_dist.data.store.manifest import MANIFEST, parse_object
from cromss_dist.data.store.shards import block_bytes, file_problems
from cromss_dist.data.store.stored import StoredDataset, read_stored
from cromss_dist.errors import ShardError
from cromss_dist.schema import LABEL_ARRAY

NUM_NAMES_SHOWN = 5
MEND = "The file was damaged after it was written; restore it or shard the archive again."

Result = TypeVar("Result")


class ShardFiles(Protocol):
    """The files of a dataset on this node. All calls are thread-safe."""

    @property
    def are_local(self) -> bool:
        """Whether all of them lie on this node already."""

    def open(self, shard: int) -> int:
        """A descriptor to read the file of a shard by, to its end whatever becomes of its name; the caller closes it.

        Raises:
            ShardError: it is missing.
            DownloadError: it cannot be fetched.
        """

    def path(self, shard: int) -> Path:
        """Where it lies, or would: for messages."""

    def discard(self, shard: int) -> bool:
        """Called when bytes of a shard's file are missing or changed: whether a fresh copy can be had by `open`."""


@dataclass(frozen=True)
class LocalFiles:
    """The tars of a folder, which nobody but the user can restore.

    Args:
        folder: Of the dataset.
        names: File name of each shard.
    """

    folder: Path
    names: tuple[str, ...]

    @property
    def are_local(self) -> bool:
        """They are."""
        return True

    @cached_property
    def _paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in self.names)  # once: making a path takes as long as reading a small array

    def open(self, shard: int) -> int:
        """A descriptor of the file of a shard."""
        try:
            return os.open(self._paths[shard], os.O_RDONLY)
        except FileNotFoundError as error:
            raise ShardError(f"{self.path(shard)} is missing. Restore it or shard the archive again.") from error

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._paths[shard]

    def discard(self, shard: int) -> bool:
        """There is no other copy."""
        return False


@dataclass(frozen=True)
class _Array:
    """What is to be known of an array for reading it: its column in the tables, bytes of a season, number of seasons read."""

    column: int
    block: int
    all_seasons: int | None


@dataclass(frozen=True)
class ShardIndex(StoredDataset):
    """A `dataset.Dataset` of tars.

    Args:
        files: Where they lie.
    """

    files: ShardFiles

    @cached_property
    def _layout(self) -> dict[str, _Array]:
        return {
            name: _Array(column, block_bytes(spec), self.num_seasons if name == LABEL_ARRAY else None)
            for column, (name, spec) in enumerate(self.manifest["arrays"].items())
        }

    @property
    def _tars(self) -> TarTables:
        assert self.tables.tars is not None, "it was opened with tars"
        return self.tables.tars

    @property
    def is_local(self) -> bool:
        """Whether all of its bytes are on this node."""
        return self.files.are_local

    def fetch(self, shard: int) -> None:
        """Makes sure that a shard is on this node, see `dataset.Dataset`."""
        os.close(self.files.open(shard))

    def read_into(self, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        """Reads one season of one location; of the noisy labels all seasons, since the prior needs them.

        Args:
            sample_id: Index into `locations`.
            season: 0 to num_seasons - 1.
            arrays: Name of each array wanted -> where it goes: uint8, C-contiguous, of `shape(name)`.

        Raises:
            ShardError: bytes are missing or do not match their checksum; names file, sample, array and season.
            DownloadError: the shard cannot be fetched.
        """
        if not (0 <= sample_id < len(self) and 0 <= season < self.num_seasons):
            raise IndexError(f"sample {sample_id}, season {season} of {len(self)} samples of {self.num_seasons} seasons")

        self._with_file(sample_id, lambda descriptor: self._fill(descriptor, sample_id, season, arrays))

    def read(self, sample_id: int, season: int, arrays: Sequence[str]) -> dict[str, Uint8Array]:
        """Like `read_into`, with new arrays: for tools and reports.

        Returns:
            uint8 (band, H / scale, W / scale) for images, (S, H, W) for 'label', (H, W) for the others.
        """
        read: dict[str, Uint8Array] = {name: np.empty(self.shape(name), np.uint8) for name in arrays}
        self.read_into(sample_id, season, read)
        return read

    def metadata(self, sample_id: int) -> Json:
        """Where and when a location was taken: the JSON member of its sample, see `data.sample.Sample`.

        Raises:
            ShardError: bytes are missing or do not match their checksum, or are no JSON object.
            DownloadError: the shard cannot be fetched.
        """
        offset, size, checksum = self._tars.metadata_spans[sample_id].tolist()

        def read(descriptor: int) -> Json:
            data = os.pread(descriptor, size, offset)
            if google_crc32c.value(data) != checksum:
                raise self._damaged(sample_id, "json", "the bytes do not match their CRC-32C")
            return parse_object(self._path(sample_id), data)

        return self._with_file(sample_id, read)

    def _with_file(self, sample_id: int, read: Callable[[int], Result]) -> Result:
        """Calls `read` with the open tar of a sample; once more with a fresh copy where there is one."""
        shard = int(self.shard_of[sample_id])
        try:
            return self._with_open(shard, read)
        except ShardError:
            if not self.files.discard(shard):
                raise
        return self._with_open(shard, read)

    def _with_open(self, shard: int, read: Callable[[int], Result]) -> Result:
        # Opened anew each time: no limit on shards, nothing to close or to share between threads, and microseconds.
        descriptor = self.files.open(shard)
        try:
            return read(descriptor)
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        offsets, checksums = self._tars.offsets[sample_id].tolist(), self.tables.checksums[sample_id].tolist()
        for name, array in arrays.items():
            layout = self._layout[name]
            seasons = range(season, season + 1) if layout.all_seasons is None else range(layout.all_seasons)
            num_bytes = layout.block * len(seasons)
            if array.dtype != np.uint8 or array.nbytes != num_bytes or not array.flags.c_contiguous:
                wanted = f"a C-contiguous uint8 array of shape {self.shape(name)}"
                raise ValueError(f"{name} needs {wanted}, not {array.dtype} {array.shape}")
            try:
                found = os.preadv(descriptor, [array.data], offsets[layout.column] + layout.block * seasons.start)
            except OSError as error:
                raise self._damaged(sample_id, f"{name}.npy", str(error)) from error
            # A short read must be an error before checksums are looked at: the array may hold the right bytes from before.
            if found != num_bytes:
                member = f"{name}.npy, season {seasons[found // layout.block]}"
                raise self._damaged(sample_id, member, "the file ends before it")
            blocks = [array] if layout.all_seasons is None else array
            for stored_season, block in zip(seasons, blocks, strict=True):
                if google_crc32c.value(block) != checksums[layout.column][stored_season]:
                    member = f"{name}.npy, season {stored_season}"
                    raise self._damaged(sample_id, member, "the bytes do not match their CRC-32C")

    def _path(self, sample_id: int) -> Path:
        return self.files.path(int(self.shard_of[sample_id]))

    def _damaged(self, sample_id: int, member: str, what: str) -> ShardError:
        return ShardError(f"{self._path(sample_id)}: sample {self.locations[sample_id]}, member {member}: {what}. {MEND}")


def open_shards(folder: str | Path) -> ShardIndex:
    """Opens a folder of shards after checking that it is complete: digests of manifest and index, names and sizes of tars.

    Pixels are not read here; `ShardIndex.read_into` checks those it reads. What is wrong is listed, not only the first of it.

    Raises:
        ShardError: the folder is none of ours, or something in it is missing, surplus or changed.
    """
    path = Path(folder)
    if "://" in str(folder) or not path.is_dir():
        raise ShardError(f"{folder} is not a folder; give a local folder that tools/shard.py has written.")
    return shards_of(path, read_stored(path))


def shards_of(folder: Path, stored: StoredDataset) -> ShardIndex:
    """The tars of a local dataset whose manifest and index were read.

    Raises:
        ShardError: it has none, or some of them are missing, surplus or changed.
    """
    entries = stored.entries
    if not entries:
        raise ShardError(f"{folder} has no shards, only a cube; read that (open_dataset), or convert with --write both.")
    first = np.cumsum(stored.shard_sizes) - stored.shard_sizes
    first_keys = {entry.name: stored.locations[i] for entry, i in zip(entries, first, strict=True)}
    wrong: defaultdict[str, list[str]] = defaultdict(list)
    for entry in entries:
        if not (folder / entry.record).is_file():
            wrong["missing"].append(entry.record)
    for kind, name, _ in file_problems(folder, entries, first_keys):
        wrong[kind].append(name)
    if wrong:
        told = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:NUM_NAMES_SHOWN])}{', ...' if len(names) > NUM_NAMES_SHOWN else ''})"
            for kind, names in wrong.items()
        )
        raise ShardError(
            f"{folder} is not as {MANIFEST} states: {told}. tools/verify.py says more. Restore them, move what is surplus "
            "elsewhere, or shard the archive again."
        )
    files = LocalFiles(folder, tuple(entry.name for entry in entries))
    return ShardIndex(stored.origin, stored.manifest, stored.tables, files)

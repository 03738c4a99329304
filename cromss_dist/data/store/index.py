"""Random access to the tars of a dataset: one `pread` an array, and no byte that does not match its checksum.

The tars are not parsed: where everything is comes from the index, as arrays of offsets.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.files import MEND, LocalFiles, ShardFiles, read_file
from cromss_dist.data.store.index_file import TarTables
from cromss_dist.data.store.manifest import MANIFEST, parse_object
from cromss_dist.data.store.shards import block_bytes, file_problems
from cromss_dist.data.store.stored import StoredDataset, read_stored
from cromss_dist.errors import ShardError
from cromss_dist.schema import LABEL_ARRAY

NUM_NAMES_SHOWN = 5


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
        self.check_in_range(sample_id, season)
        shard = int(self.shard_of[sample_id])
        read_file(self.files, shard, lambda descriptor: self._fill(descriptor, sample_id, season, arrays))

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

        return read_file(self.files, int(self.shard_of[sample_id]), read)

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

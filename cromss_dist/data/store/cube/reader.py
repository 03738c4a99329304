"""Reads seasons of samples out of the files of a cube: a `pread` and a decoding each, into the caller's array, all bytes checked.

Not by a Zarr library: they serve any slice of any store, and take 1.5 times (tensorstore) and 8 times (zarr-python) as long for
what is one chunk of ours; and a chunk that is missing is fill values to them, to us an error. See docs/data-format.md.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import google_crc32c
import imagecodecs
import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.cube.layout import NO_CHUNK, chunk_name
from cromss_dist.data.store.cube.record import CubeFile, check_cube
from cromss_dist.data.store.files import MEND, LocalFiles, ShardFiles, read_file
from cromss_dist.data.store.manifest import MANIFEST
from cromss_dist.data.store.stored import StoredDataset
from cromss_dist.errors import ShardError
from cromss_dist.schema import LABEL_ARRAY

SPAN_BYTES = 16  # of a chunk in the index of its file: offset and size
CRC_BYTES = 4
CHECKED = 0x48674BC7  # CRC-32C of any bytes followed by their CRC-32C: nothing to cut off and compare


class ChunkError(ValueError):
    """A chunk cannot be read; who asked for it knows whose it is."""


@dataclass(frozen=True)
class CubeLayout:
    """Which chunk of which file is which season of a row.

    Args:
        shapes: Of each array of a sample, seasons first.
        rows_per_file: That a file has room for.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rows_per_file: int

    @classmethod
    def of(cls, manifest: Json) -> Self:
        """That of a dataset."""
        shapes = {name: tuple(spec["shape"]) for name, spec in manifest["arrays"].items()}
        return cls(shapes, manifest["parts"]["locations_per_part"])

    def file_of(self, row: int, name: str) -> str:
        """Path inside the cube of the file that holds a row of an array."""
        return f"{name}/{chunk_name(row // self.rows_per_file, *[0] * len(self.shapes[name]))}"

    def read_seasons(self, descriptor: int, row: int, name: str, seasons: Sequence[int], into: Uint8Array) -> None:
        """Reads seasons of one array of a row.

        Args:
            descriptor: Of the file that holds the row.
            row: Of the cube.
            name: Of the array.
            seasons: Which ones.
            into: uint8 (len(seasons), ...), C-contiguous; undefined when this raises.

        Raises:
            ChunkError: a chunk is missing, or its bytes do not match their checksum, or are not as many pixels.
            OSError: the file cannot be read.
        """
        num_seasons = self.shapes[name][0]
        num_chunks = self.rows_per_file * num_seasons
        # Its index is read anew each time: microseconds, beside a millisecond of decoding; nothing to hold or share.
        end = os.fstat(descriptor).st_size - num_chunks * SPAN_BYTES - CRC_BYTES
        index = os.pread(descriptor, num_chunks * SPAN_BYTES + CRC_BYTES, end) if end >= 0 else b""
        if google_crc32c.value(index) != CHECKED:
            raise ChunkError("the list of its chunks does not match its CRC-32C")
        spans = np.frombuffer(index, "<u8", 2 * num_chunks).reshape(self.rows_per_file, num_seasons, 2)
        for season, pixels in zip(seasons, into, strict=True):
            offset, size = spans[row % self.rows_per_file, season].tolist()
            if offset == NO_CHUNK:
                raise ChunkError(f"season {season}: there is no chunk")
            if offset + size > end:
                raise ChunkError(f"season {season}: the chunk does not lie inside the file")
            _decode(season, os.pread(descriptor, size, offset), pixels.reshape(-1))


def _decode(season: int, chunk: bytes, pixels: Uint8Array) -> None:
    if google_crc32c.value(chunk) != CHECKED:
        raise ChunkError(f"season {season}: the bytes do not match their CRC-32C")
    try:
        # Unlike that of numcodecs, it says how many bytes there were: fewer than wanted would leave what was there before.
        decoded = imagecodecs.zstd_decode(chunk[:-CRC_BYTES], out=pixels.data)
    except RuntimeError as error:
        raise ChunkError(f"season {season}: the chunk cannot be decoded: {error}") from error
    if len(decoded) != pixels.size:
        raise ChunkError(f"season {season}: the chunk has {len(decoded)} pixels, not {pixels.size}")


@dataclass(frozen=True)
class CubeIndex(StoredDataset):
    """A `dataset.Dataset` of a cube: ids, order and pixels are those of the tars.

    Args:
        files: Where its files lie, in the order of its record.
        numbers: Number of each in that order, by path inside the cube.
    """

    files: ShardFiles
    numbers: Mapping[str, int]

    @cached_property
    def layout(self) -> CubeLayout:
        """Of the cube's files."""
        return CubeLayout.of(self.manifest)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Position of each sample along the cube's `location`, int64 (N,)."""
        assert self.tables.cube_rows is not None, "it was opened with a cube"
        return self.tables.cube_rows

    @cached_property
    def _first(self) -> npt.NDArray[np.int64]:
        """First sample of each shard."""
        return np.cumsum(self.shard_sizes) - self.shard_sizes

    @property
    def is_local(self) -> bool:
        """Whether all of its bytes are on this node."""
        return self.files.are_local

    def fetch(self, shard: int) -> None:
        """Makes sure that the files of a shard, one an array, are on this node, see `dataset.Dataset`."""
        for name in self.arrays:
            os.close(self.files.open(self._number(int(self._first[shard]), name)))

    def read_into(self, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        """Reads one season of one location; of the noisy labels all seasons, since the prior needs them.

        Args:
            sample_id: Index into `locations`.
            season: 0 to num_seasons - 1.
            arrays: Name of each array wanted -> where it goes: uint8, C-contiguous, of `shape(name)`.

        Raises:
            ShardError: a chunk is missing or does not match its checksum; names file, sample, array and season.
            DownloadError: a file cannot be fetched.
        """
        self.check_in_range(sample_id, season)
        for name, array in arrays.items():
            if array.dtype != np.uint8 or array.shape != self.shape(name) or not array.flags.c_contiguous:
                raise ValueError(
                    f"{name} needs a C-contiguous uint8 array of shape {self.shape(name)}, not {array.dtype} {array.shape}"
                )
            number = self._number(sample_id, name)
            read_file(self.files, number, partial(self._fill, number, sample_id, season, name, array))

    def _number(self, sample_id: int, name: str) -> int:
        return self.numbers[self.layout.file_of(int(self.rows[sample_id]), name)]

    def _fill(self, number: int, sample_id: int, season: int, name: str, array: Uint8Array, descriptor: int) -> None:
        is_label = name == LABEL_ARRAY
        seasons, into = (range(self.num_seasons), array) if is_label else (range(season, season + 1), array[np.newaxis])
        try:
            self.layout.read_seasons(descriptor, int(self.rows[sample_id]), name, seasons, into)
            # Chunks have checksums of their own, which hold, too, where files or rows have changed places.
            stated = self.tables.checksums[sample_id, self.arrays.index(name)].tolist()
            for i, pixels in zip(seasons, into, strict=True):
                if google_crc32c.value(pixels) != stated[i]:
                    raise ChunkError(f"season {i}: the pixels do not match the CRC-32C in the index; they are of another sample")
        except (ChunkError, OSError) as error:
            path = self.files.path(number)
            raise ShardError(f"{path}: sample {self.locations[sample_id]}, array {name}, {error}. {MEND}") from error


def cube_of(folder: Path, stored: StoredDataset) -> CubeIndex:
    """The cube of a local dataset whose manifest and index were read.

    Raises:
        ShardError: it has none, or a file of it is missing, surplus or changed.
    """
    files = check_cube(folder, cube_section(stored)["record_sha256"])
    return cube_index(stored, files, LocalFiles(folder, tuple(file.name for file in files)))


def cube_section(stored: StoredDataset) -> Json:
    """What the manifest says of the cube. Raises ShardError where there is none."""
    section: Json | None = stored.manifest["cube"]
    if section is None:
        raise ShardError(f"{stored.origin} has no cube, only shards; open them, or convert the archive with --write both.")
    return section


def cube_index(stored: StoredDataset, recorded: Sequence[CubeFile], files: ShardFiles) -> CubeIndex:
    """A cube whose record was read.

    Args:
        stored: Manifest and index.
        recorded: The files of its record.
        files: Where they lie, in that order.

    Raises:
        ShardError: the record lacks a file that samples are in.
    """
    index = CubeIndex(stored.origin, stored.manifest, stored.tables, files, {file.path: i for i, file in enumerate(recorded)})
    per_file = index.layout.rows_per_file
    rows = np.unique(index.rows // per_file) * per_file
    needed = {index.layout.file_of(row, name) for row in rows.tolist() for name in index.arrays}
    if lacking := sorted(needed - index.numbers.keys()):
        raise ShardError(f"{stored.origin}: the record of the cube lacks {lacking[0]}, which {MANIFEST} has samples in.")
    return index

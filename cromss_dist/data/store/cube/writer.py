"""The cube: all samples as one Zarr v3 store that `xarray.open_zarr` opens, and the list of its files that makes it safe.

One flat group: a reader sees pixels, labels and coordinates at once, and places and times are stored once; what differs by
resolution are only the names of dimensions (`y`, `x`; `y_20m`, `x_20m`; ...). A chunk is one location and season; a file is
one shard of `rows_per_shard` locations, written whole by one process. A missing file reads as fill value in any Zarr
library: that none is missing is what `cube.json` and `open_cube` are for. See docs/data-format.md.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from cromss_dist.data.sample import Json, Rejected, Sample, SampleSpec, Uint8Array
from cromss_dist.data.store.cube.layout import (
    METADATA,
    SEASON_TEXTS,
    SEASON_TIMES,
    Row,
    chunk_name,
    coordinate_node,
    coordinates,
    encode_coordinate,
    encode_shard,
    json_bytes,
    pixel_node,
    root_node,
)
from cromss_dist.data.store.cube.reader import ChunkError, CubeLayout
from cromss_dist.data.store.cube.record import CUBE, CubeFile, check_cube, place_file
from cromss_dist.data.store.times import from_seconds
from cromss_dist.data.zarr_metadata import check_store
from cromss_dist.errors import ShardError


def create_cube(path: Path, spec: SampleSpec, num_rows: int, rows_per_shard: int) -> None:
    """Writes the metadata of a cube of `num_rows` locations and no data. Doing it again changes nothing."""
    for name in spec.names:
        (path / name).mkdir(parents=True, exist_ok=True)
        place_file(path, f"{name}/{METADATA}", json_bytes(pixel_node(spec, name, num_rows, rows_per_shard)))
    place_file(path, METADATA, json_bytes(root_node(spec)))


def grow_cube(path: Path, spec: SampleSpec, num_rows: int) -> None:
    """Makes room for `num_rows` locations; what is there stays. New rows come by `write_rows`, then `finish_cube`.

    Files are replaced, never written into: in a folder of hard links the other folder keeps what it had.
    """
    create_cube(path, spec, num_rows, rows_per_shard(path, spec))


def rows_per_shard(path: Path, spec: SampleSpec) -> int:
    """Locations in one file of an array."""
    node = json.loads((path / spec.names[0] / METADATA).read_bytes())
    return int(node["chunk_grid"]["configuration"]["chunk_shape"][0])


def write_rows(path: Path, spec: SampleSpec, first_row: int, samples: Sequence[Sample | None]) -> tuple[CubeFile, ...]:
    """Writes one whole shard of every array: synced, read back and decoded before it gets its name.

    Args:
        path: Of the cube, from `create_cube`.
        spec: Of the samples.
        first_row: Multiple of `rows_per_shard`.
        samples: At most `rows_per_shard`; None for a rejected input, whose row reads as 0 (images) or 255 (values).

    Raises:
        ShardError: what was read back is not what was written.
    """
    per_shard = rows_per_shard(path, spec)
    assert first_row % per_shard == 0, f"row {first_row} does not start a shard of {per_shard}"
    assert len(samples) <= per_shard, f"{len(samples)} samples do not fit into a shard of {per_shard}"
    files = []
    for name in spec.names:
        rows = [None if sample is None else sample.arrays[name] for sample in samples]
        decodes = functools.partial(_decodes_to, pixel_node(spec, name, per_shard, per_shard), rows)
        shard = chunk_name(first_row // per_shard, *[0] * len(spec.shape(name)))
        files.append(place_file(path, f"{name}/{shard}", encode_shard(rows, spec.num_seasons, per_shard), decodes))
    return tuple(files)


def finish_cube(path: Path, spec: SampleSpec, rows: Sequence[Row]) -> tuple[CubeFile, ...]:
    """Writes coordinates, then all metadata consolidated in the root; removes what a killed writer left.

    Args:
        path: Of the cube; all its shards are written.
        spec: Of the samples.
        rows: Of the whole cube, as many as it has.

    Returns:
        The files written here, metadata included: all that `write_rows` has not returned.
    """
    for leftover in path.rglob(".*.tmp"):
        leftover.unlink()
    per_shard = rows_per_shard(path, spec)
    nodes = {name: pixel_node(spec, name, len(rows), per_shard) for name in spec.names}
    files = []
    for name, coordinate in coordinates(spec, rows).items():
        (path / name).mkdir(exist_ok=True)
        nodes[name] = coordinate_node(coordinate)
        files += [place_file(path, f"{name}/{chunk}", data) for chunk, data in encode_coordinate(coordinate)]
    files += [place_file(path, f"{name}/{METADATA}", json_bytes(node)) for name, node in nodes.items()]
    consolidated = {"kind": "inline", "must_understand": False, "metadata": nodes}
    files.append(place_file(path, METADATA, json_bytes({**root_node(spec, rows), "consolidated_metadata": consolidated})))
    return tuple(sorted(files, key=lambda file: file.path))


def open_cube(folder: str | Path, record_sha256: str | None = None) -> xr.Dataset:
    """Opens the cube of a dataset after checking that no file is missing, surplus or of another size; loads no pixel.

    Args:
        folder: That tools/shard.py has written; it holds cube.zarr and cube.json.
        record_sha256: Of cube.json, as the manifest states it.

    Returns:
        Arrays of the samples, uint8 (location, season, band, y, x), and their coordinates, see docs/data-format.md. Loading
        a chunk with a changed byte raises ValueError.

    Raises:
        ShardError: it is no cube of ours, or a file is missing, surplus or changed.
    """
    path = Path(folder)
    check_cube(path, record_sha256)
    check_metadata(path / CUBE)
    dataset: xr.Dataset = xr.open_zarr(path / CUBE, chunks=None)
    return dataset


class CubeReader:
    """Reads samples back out of a cube, row by row, and what its coordinates say of them.

    Args:
        cube: The folder cube.zarr.
        layout: Of its files.

    Raises:
        ShardError: its metadata is not what a cube of ours has, or its coordinates cannot be read.
    """

    def __init__(self, cube: Path, layout: CubeLayout) -> None:
        check_metadata(cube)
        self.cube, self.layout = cube, layout
        try:
            self.rows = read_rows(cube)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise ShardError(f"{cube}: the coordinates cannot be read: {error}. Restore it.") from error

    def read(self, row: int, name: str, season: int | None = None) -> Uint8Array:
        """One array of one location, of one season or of all: uint8 ([season,] [band,] H, W).

        Raises:
            ShardError: its file or a chunk of it is missing, or a byte of it changed.
        """
        num_seasons, *shape = self.layout.shapes[name]
        seasons = range(num_seasons) if season is None else range(season, season + 1)
        pixels = np.empty((len(seasons), *shape), np.uint8)
        path = self.cube / self.layout.file_of(row, name)
        try:
            with path.open("rb", buffering=0) as file:
                self.layout.read_seasons(file.fileno(), row, name, seasons, pixels)
        except (ChunkError, OSError) as error:
            raise ShardError(f"{path}: row {row}: {error}. Restore it or convert the archive again.") from error
        return pixels if season is None else pixels[0]


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows that `finish_cube` was given, from the cube's coordinates; those without a sample also without their key."""
    group = zarr.open_group(path, mode="r")
    values: dict[str, Any] = {
        name: np.asarray(_array(group, name)[...]).tolist()
        for name in ("location", "valid", "lon", "lat", "transform", *SEASON_TIMES, *SEASON_TEXTS)
    }
    rows = []
    for row, key in enumerate(values["location"]):
        seasons: list[Json] = []
        for season in range(len(values["valid"][row])):
            texts = {name: values[name][row][season] or None for name in SEASON_TEXTS}
            times = {name: from_seconds(values[name][row][season]) for name in SEASON_TIMES}
            transform = values["transform"][row][season]
            seasons.append({**texts, **times, "transform": None if np.isnan(transform[0]) else transform})
        lon, lat = (None if np.isnan(values[axis][row]) else values[axis][row] for axis in ("lon", "lat"))
        metadata = {"key": key, "lon": lon, "lat": lat, "seasons": seasons} if any(values["valid"][row]) else None
        rows.append(Row(key, metadata))
    return tuple(rows)


def check_metadata(cube: Path) -> None:
    """Reads all metadata of a cube before a Zarr library does.

    Raises:
        ShardError: it has types, codecs or sizes that no cube of ours has.
    """
    names = [path.relative_to(cube).as_posix() for path in cube.rglob("*")]
    try:
        check_store(names, lambda name: (cube / name).read_bytes())
    except Rejected as error:
        raise ShardError(f"{cube} is no cube of ours: {error}. Restore it or convert the archive again.") from error


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _decodes_to(node: Json, rows: Sequence[Uint8Array | None], data: bytes) -> bool:
    """Whether zarr-python reads the samples of `rows` out of a shard."""
    buffer = default_buffer_prototype().buffer
    shard = chunk_name(*[0] * len(node["shape"]))
    store = MemoryStore({METADATA: buffer.from_bytes(json_bytes(node)), shard: buffer.from_bytes(data)})
    array = zarr.open_array(store, mode="r")
    return all(np.array_equal(np.asarray(array[row]), pixels) for row, pixels in enumerate(rows) if pixels is not None)

"""Holds the index of a dataset against what it repeats: commit records, the rows of the cube, metadata of samples."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json
from cromss_dist.data.store.cube.layout import Row
from cromss_dist.data.store.index_file import INDEX, IndexTables, checksum_table, places_of, recorded_checksums, tar_tables
from cromss_dist.data.store.manifest import ShardEntry
from cromss_dist.data.store.shards import Samples
from cromss_dist.data.store.stored import MALFORMED, read_stored
from cromss_dist.data.store.verify.tar import Problem
from cromss_dist.errors import ShardError


def read_tables(folder: Path, problems: list[Problem]) -> IndexTables | None:
    """The index; None, and a problem, where it cannot be believed."""
    try:
        return read_stored(folder).tables
    except ShardError as error:
        problems.append(Problem(INDEX, str(error)))
        return None


def differs_from_records(
    tables: IndexTables, manifest: Json, entries: Sequence[ShardEntry], records: Mapping[str, Samples]
) -> Iterator[Problem]:
    """Samples of which the index does not say what the commit records say; tars without a record are passed over."""
    ends = np.cumsum(tables.shard_sizes).tolist() if entries else []
    locations = _text(tables.locations)
    for entry, end in zip(entries, ends, strict=True):
        record = records.get(entry.name, [])
        if len(record) != entry.samples:  # it is missing, or that was told
            continue
        samples = range(end - entry.samples, end)
        keys = _text([key for key, _ in record])
        yield from _differing(tables, samples, {"keys": (locations, keys)}, entry.record)
        try:
            stated = vars(tar_tables(manifest["arrays"], record))
            stated["checksums"] = checksum_table(manifest["arrays"], recorded_checksums(record))
        except MALFORMED as error:
            yield Problem(entry.record, f"is malformed: {error!r}")
            continue
        tar_columns = {**vars(tables.tars), "checksums": tables.checksums}
        columns = {name: (tar_columns[name], values) for name, values in stated.items()}
        yield from _differing(tables, samples, columns, entry.record)


def differs_from_rows(tables: IndexTables, manifest: Json, rows: Sequence[Row]) -> Iterator[Problem]:
    """Samples of which the index does not say what the cube's coordinates say."""
    assert tables.cube_rows is not None
    valid = [number for number, row in enumerate(rows) if row.metadata is not None]
    metadata = [row.metadata for row in rows if row.metadata is not None]
    if valid != tables.cube_rows.tolist():
        yield Problem(INDEX, "has other rows of the cube than those that hold a sample")
        return
    sizes = np.bincount(np.array(valid) // manifest["parts"]["locations_per_part"])
    if not np.array_equal(sizes[sizes > 0], tables.shard_sizes):
        yield Problem(INDEX, "has other shard_sizes than the parts of the cube")
    keys = [row.key for row in rows if row.metadata is not None]
    columns = {"keys": (_text(tables.locations), _text(keys))}
    places = places_of(metadata, tables.places.s1_time.shape[1])
    columns |= {name: (getattr(tables.places, name), values) for name, values in vars(places).items()}
    yield from _differing(tables, range(len(valid)), columns, "the cube")


def differs_from_metadata(tables: IndexTables, sample_id: int, metadata: Json) -> Iterator[Problem]:
    """Whether the index has other places or times of a sample than its metadata in the tar."""
    try:
        places = places_of([metadata], tables.places.s1_time.shape[1])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield Problem(INDEX, f"has places that its metadata in the tar does not: {error!r}", tables.locations[sample_id])
        return
    columns = {name: (getattr(tables.places, name), values) for name, values in vars(places).items()}
    yield from _differing(tables, range(sample_id, sample_id + 1), columns, "its metadata in the tar")


def _differing(
    tables: IndexTables, samples: range, columns: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], whose: str
) -> Iterator[Problem]:
    """A problem for each of `samples` and column, (values of all samples, those that these should have), that differ."""
    for name, (values, expected) in columns.items():
        found = values[samples.start : samples.stop]
        same = (found == expected) | ((found != found) & (expected != expected))  # NaN: unknown
        for i in np.flatnonzero(~same.reshape(len(samples), -1).all(axis=1)).tolist():
            yield Problem(INDEX, f"{name} of it are not those of {whose}", tables.locations[samples[i]])


def _text(keys: Sequence[str]) -> npt.NDArray[np.object_]:
    array = np.empty(len(keys), object)
    array[:] = keys
    return array

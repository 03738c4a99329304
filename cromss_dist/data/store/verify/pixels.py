"""Compares a stored sample with what else there is of it: index, cube and archive."""

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cromss_dist.data.sample import Json, Rejected, Source, Uint8Array
from cromss_dist.data.store.cube.layout import SEASON_TEXTS, SEASON_TIMES
from cromss_dist.data.store.cube.record import CUBE
from cromss_dist.data.store.cube.writer import CubeReader
from cromss_dist.data.store.index_file import INDEX, IndexTables
from cromss_dist.data.store.shards import season_checksums
from cromss_dist.data.store.times import to_seconds
from cromss_dist.data.store.verify.index import differs_from_metadata
from cromss_dist.data.store.verify.tar import Problem
from cromss_dist.errors import InputChangedError, ShardError


@dataclass
class Beside:
    """What there is of a dataset beside the pixels that are being read.

    Args:
        problems: To add to.
        counts: Of samples compared, to add to.
        source: The archive.
        tables: The index.
        cube: The cube; each of them is None where there is none that can be believed.
        row_of: Row of each key in the cube.
        missing: Files of the cube, told already.
    """

    problems: list[Problem]
    counts: Counter[str]
    source: Source | None
    tables: IndexTables | None
    cube: CubeReader | None
    row_of: Mapping[str, int]
    missing: Set[str]

    @cached_property
    def sample_ids(self) -> dict[str, int]:
        """By key."""
        return {key: i for i, key in enumerate(self.tables.locations)} if self.tables else {}

    def compare(self, file: str, key: str, metadata: Json | None, arrays: dict[str, Uint8Array]) -> None:
        """Compares a sample of the shards; its checksums are those of its record, and these were held against the index."""
        if self.tables is not None and metadata is not None and key in self.sample_ids:
            self.problems += differs_from_metadata(self.tables, self.sample_ids[key], metadata)
        if self.cube is not None and key in self.row_of:
            row = self.row_of[key]
            for name, pixels in arrays.items():
                if (found := self._read(self.cube, key, name)) is not None:
                    self._differing(f"{file} and {self.cube.layout.file_of(row, name)}", key, name, pixels, found, "the cube")
            stored = self.cube.rows[row].metadata
            if metadata is not None and stored is not None and _place_and_times(metadata) != _place_and_times(stored):
                self._add(CUBE, "place, times or scenes are not those of the shards", key)
            self.counts["compared_with_cube"] += 1
        self._compare_source(file, key, metadata, arrays)

    def compare_row(self, key: str) -> None:
        """Compares a sample of a cube without shards."""
        assert self.cube is not None
        row = self.row_of[key]
        found = {name: self._read(self.cube, key, name) for name in self.cube.layout.shapes}
        arrays = {name: pixels for name, pixels in found.items() if pixels is not None}
        if self.tables is not None and key in self.sample_ids:
            stated = dict(zip(self.cube.layout.shapes, self.tables.checksums[self.sample_ids[key]], strict=True))
            for name, checksums in season_checksums(arrays).items():
                for season in np.flatnonzero(stated[name] != np.array(checksums, np.uint32)).tolist():
                    file = f"{CUBE}/{self.cube.layout.file_of(row, name)}"
                    self._add(file, f"the pixels do not match their CRC-32C in {INDEX}", key, name, season)
        self._compare_source(CUBE, key, self.cube.rows[row].metadata, arrays)

    def _compare_source(self, file: str, key: str, metadata: Json | None, arrays: dict[str, Uint8Array]) -> None:
        if self.source is None:
            return
        try:
            sample = self.source.read(key)
        except (Rejected, InputChangedError) as error:
            self._add(file, f"the source does not give it: {error}", key)
            return
        for name, pixels in arrays.items():
            self._differing(file, key, name, pixels, sample.arrays[name], "the source")
        if metadata is not None and _place_and_times(metadata) != _place_and_times(sample.metadata):
            self._add(file, "place, times or scenes are not those of the source", key)
        self.counts["compared_with_source"] += 1

    def _read(self, cube: CubeReader, key: str, name: str) -> Uint8Array | None:
        """An array of the cube, season by season where it cannot be read at once; None where one cannot."""
        row = self.row_of[key]
        file = cube.layout.file_of(row, name)
        if file in self.missing:
            return None
        try:
            return cube.read(row, name)
        except ShardError as error:
            seasons = range(cube.layout.shapes[name][0])
            failed = [season for season in seasons if not _readable(cube, row, name, season)]
            for season in failed if len(failed) < len(seasons) else [None]:
                self._add(f"{CUBE}/{file}", str(error), key, name, season)
            return None

    def _differing(self, file: str, key: str, name: str, pixels: Uint8Array, others: Uint8Array, whose: str) -> None:
        """Adds a problem a season in which two arrays differ."""
        for season, (these, those) in enumerate(zip(pixels, others, strict=True)):
            if differing := int(np.count_nonzero(these != those)):
                self._add(file, f"{differing} of {these.size} values are not those of {whose}", key, name, season)

    def _add(self, file: str, what: str, key: str, array: str | None = None, season: int | None = None) -> None:
        self.problems.append(Problem(file, what, key, array, season))


def _readable(cube: CubeReader, row: int, name: str, season: int) -> bool:
    try:
        cube.read(row, name, season)
    except ShardError:
        return False
    return True


def _place_and_times(metadata: Json) -> Any:
    """What a cube holds of a sample's metadata, in comparable form."""
    seasons = [
        (
            [to_seconds(season.get(name)) for name in SEASON_TIMES],
            [season.get(name) or None for name in SEASON_TEXTS],
            list(season.get("transform") or []),
        )
        for season in metadata["seasons"]
    ]
    return metadata["lon"], metadata["lat"], seasons

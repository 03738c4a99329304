"""A dataset of ours as an archive: to convert it again with other labels, or to compute something of each sample."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from cromss_dist.data.sample import Json, Sample, SampleSpec, Uint8Array
from cromss_dist.data.store.cube.layout import Row
from cromss_dist.data.store.cube.reader import CubeIndex
from cromss_dist.data.store.cube.record import CUBE
from cromss_dist.data.store.cube.writer import read_rows
from cromss_dist.data.store.index import ShardIndex
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import ConfigError, InputChangedError
from cromss_dist.schema import LABEL_ARRAY


@dataclass(frozen=True)
class StoredArchive:
    """A `data.sample.Source` of the samples of a dataset, which travels to other processes as a place and a digest.

    Args:
        location: Folder or URL that `open_dataset` takes; of a dataset without shards a local folder.
        digest: Of the dataset.
    """

    location: str
    digest: str

    @classmethod
    def of(cls, location: str | Path) -> "StoredArchive":
        """Opens a dataset as an archive.

        Raises:
            ShardError, DownloadError: see `open_dataset`.
            ConfigError: it is a cube behind a URL.
        """
        place = str(location) if "://" in str(location) else str(Path(location).absolute())
        dataset = open_dataset(place)
        if isinstance(dataset, CubeIndex) and not dataset.is_local:
            raise ConfigError(
                f"{place} is a cube behind a URL, whose metadata cannot be read from here; copy it to this machine."
            )
        return cls(place, dataset.digest)

    @property
    def dataset(self) -> ShardIndex | CubeIndex:
        """The dataset, opened once a process.

        Raises:
            InputChangedError: there is another one meanwhile.
        """
        return _opened(self).dataset

    @property
    def spec(self) -> SampleSpec:
        """What its samples have in common."""
        return self.dataset.spec

    @property
    def keys(self) -> tuple[str, ...]:
        """Its locations, sorted."""
        return tuple(sorted(self.dataset.locations))

    @property
    def duplicates(self) -> Counter[str]:
        """None: a dataset has a key once."""
        return Counter()

    @property
    def asides(self) -> dict[str, int]:
        """Those of the archive that it was made from."""
        return dict(self.dataset.manifest["ledger"]["asides"])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the dataset's digest."""
        return hashlib.sha256(self.digest.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of its pixels."""
        spec = self.spec
        return len(self.dataset) * sum(int(np.prod(spec.shape(name))) for name in spec.names)

    def check_apart(self, out: Path) -> None:
        """That what is computed of it does not take its place.

        Raises:
            ConfigError: `out` is its folder.
        """
        if os.path.realpath(out) == os.path.realpath(self.location):
            raise ConfigError(f"{out} is the dataset that is read; choose another folder for the output.")

    def read(self, key: str) -> Sample:
        """Reads one location, all its seasons.

        Raises:
            ShardError: bytes are missing or changed. It is not rejected: what was whole once has to be restored.
            DownloadError: they cannot be fetched.
        """
        opened = _opened(self)
        dataset, sample_id = opened.dataset, opened.ids[key]
        arrays: dict[str, Uint8Array] = {name: np.empty(dataset.spec.shape(name), np.uint8) for name in dataset.arrays}
        dataset.read_into(sample_id, 0, {LABEL_ARRAY: arrays[LABEL_ARRAY]})
        for season in range(dataset.num_seasons):
            of_season = {name: array[season] for name, array in arrays.items() if name != LABEL_ARRAY}
            dataset.read_into(sample_id, season, of_season)
        return Sample(key, arrays, opened.metadata(sample_id), ())


@dataclass(frozen=True)
class _Opened:
    """A dataset, and what is looked up in it."""

    dataset: ShardIndex | CubeIndex

    @cached_property
    def ids(self) -> dict[str, int]:
        """Sample id of each key."""
        return {key: sample_id for sample_id, key in enumerate(self.dataset.locations)}

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        return read_rows(Path(self.dataset.origin) / CUBE)

    def metadata(self, sample_id: int) -> Json:
        if isinstance(self.dataset, ShardIndex):
            return self.dataset.metadata(sample_id)
        metadata = self._rows[int(self.dataset.rows[sample_id])].metadata
        assert metadata is not None, "the index names rows that have a sample"
        return metadata


@lru_cache(maxsize=4)
def _opened(archive: StoredArchive) -> _Opened:
    dataset = open_dataset(archive.location)
    if dataset.digest != archive.digest:
        raise InputChangedError(
            f"{archive.location} is another dataset than when this began: digest {dataset.digest}, then {archive.digest}. "
            "Restore it, or begin anew."
        )
    return _Opened(dataset)

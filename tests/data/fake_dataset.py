"""A stored dataset without files: every pixel follows from what it belongs to, so that a wrong sample is seen."""

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.dataset import Dataset, Places
from cromss_dist.errors import ShardError
from cromss_dist.schema import (
    CLASS_NAMES,
    IGNORE,
    IMAGE_ARRAYS,
    LABEL_ARRAY,
    NORMALISATION,
    REFERENCE_ARRAY,
    ArraySpec,
    Modality,
    Normalisation,
)

NO_TIME = np.iinfo(np.int64).min


@dataclass
class FakeDataset:
    """`Dataset` of invented pixels. It can be pickled to other processes; what it notes of calls stays in each.

    Args:
        sizes: Samples in each shard.
        seed: Of the pixels, keys and places.
        num_seasons: Seasons of each location.
        patch_px: A multiple of 6, because of the bands of 60 m.
        images: The stored image arrays.
        class_names: What label values mean.
        with_reference: Whether there are reference labels.
        contracts: Normalisation of each modality.
        is_local: Whether there is nothing to fetch.
        damaged: Sample ids whose reading raises ShardError.
        delay_s: What one reading takes.
        fetch_delay_s: What fetching one shard takes.
    """

    sizes: Sequence[int]
    seed: int = 0
    num_seasons: int = 4
    patch_px: int = 12
    images: tuple[ArraySpec, ...] = IMAGE_ARRAYS
    class_names: tuple[str, ...] = CLASS_NAMES
    with_reference: bool = True
    contracts: Mapping[Modality, Normalisation] = field(default_factory=lambda: dict(NORMALISATION))
    is_local: bool = False
    damaged: frozenset[int] = frozenset()
    delay_s: float = 0.0
    fetch_delay_s: float = 0.0
    reads: list[tuple[int, int]] = field(default_factory=list, init=False)
    """(sample id, season) of every `read_into`, in the order of the calls."""
    fetched: list[int] = field(default_factory=list, init=False)
    """Every shard that `fetch` was asked for, in the order of the calls."""

    @property
    def digest(self) -> str:
        told = (list(self.sizes), self.seed, self.num_seasons, self.patch_px, self.images, self.class_names, self.arrays)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    @property
    def archives(self) -> dict[str, Json]:
        return {self.digest: {"inputs": sum(self.sizes)}}

    @cached_property
    def locations(self) -> tuple[str, ...]:
        return tuple(f"{self.seed}-{i:07d}" for i in range(sum(self.sizes)))

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        return np.array(self.sizes, np.int64)

    @property
    def arrays(self) -> tuple[str, ...]:
        return (*(spec.name for spec in self.images), LABEL_ARRAY, *([REFERENCE_ARRAY] if self.with_reference else []))

    @cached_property
    def places(self) -> Places:
        rng = np.random.default_rng(self.seed)
        num = sum(self.sizes)
        times = rng.integers(1_577_836_800, 1_609_459_200, (2, num, self.num_seasons))  # the year 2020
        return Places(rng.uniform(-180, 180, num), rng.uniform(-80, 80, num), times[0], times[1])

    def normalisation(self, modality: Modality) -> Normalisation:
        return self.contracts[modality]

    def shape(self, name: str) -> tuple[int, ...]:
        for spec in self.images:
            if spec.name == name:
                return len(spec.bands), self.patch_px // spec.scale, self.patch_px // spec.scale
        square = (self.patch_px, self.patch_px)
        return (self.num_seasons, *square) if name == LABEL_ARRAY else square

    def pixels(self, sample_id: int, season: int, name: str) -> Uint8Array:
        """What `read_into` fills in. Labels are classes and some ignored pixels; they are of all seasons."""
        shape = self.shape(name)
        of_season = "" if name == LABEL_ARRAY else f"/{season}"
        data = hashlib.shake_128(f"{self.seed}/{sample_id}/{name}{of_season}".encode()).digest(int(np.prod(shape)))
        values = np.frombuffer(data, np.uint8).reshape(shape)
        if name not in (LABEL_ARRAY, REFERENCE_ARRAY):
            return values
        classes = values % (len(self.class_names) + 1)
        return np.where(classes == len(self.class_names), np.uint8(IGNORE), classes).astype(np.uint8)

    def read_into(self, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        self.reads.append((sample_id, season))
        time.sleep(self.delay_s)
        if sample_id in self.damaged:
            raise ShardError(f"sample {self.locations[sample_id]}, season {season}: damaged for the test.")
        for name, array in arrays.items():
            assert array.dtype == np.uint8
            assert array.flags.c_contiguous
            assert array.shape == self.shape(name)
            array[...] = self.pixels(sample_id, season, name)

    def fetch(self, shard: int) -> None:
        assert 0 <= shard < len(self.sizes)
        time.sleep(self.fetch_delay_s)
        self.fetched.append(shard)


@dataclass
class StuckDataset(FakeDataset):
    """Reading `stuck_id` never ends before `released` is set; not for other processes."""

    stuck_id: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def read_into(self, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        if sample_id == self.stuck_id:
            self.released.wait()
        super().read_into(sample_id, season, arrays)


def check_protocol(dataset: FakeDataset) -> Dataset:
    """Has the type checker compare the double with what it stands for."""
    return dataset

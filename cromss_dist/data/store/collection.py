"""Several stored datasets as one, for mixtures: the ids of the second go on where those of the first end."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.dataset import Dataset, Places
from cromss_dist.errors import ConfigError
from cromss_dist.schema import ArraySpec, Modality, Normalisation


@dataclass(frozen=True)
class Collection:
    """`Dataset` over datasets whose samples can lie in one batch.

    Sample id = id in its dataset + `starts` of that dataset; shards are counted on in the same way.

    Args:
        datasets: In the order of their ids; at least one.

    Raises:
        ConfigError: they differ in patch size, seasons, image arrays, classes or normalisation; says in what.
    """

    datasets: tuple[Dataset, ...]

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError("There is no dataset to read; name at least one.")
        first = _traits(self.datasets[0])
        for number, dataset in enumerate(self.datasets[1:], 1):
            for what, value in _traits(dataset).items():
                if value != first[what]:
                    raise ConfigError(
                        f"Datasets 0 and {number} of the mixture cannot share a batch: their {what} differ, {first[what]} and "
                        f"{value}. Mix datasets that tools/shard.py wrote with the same bands, sizes and classes."
                    )

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Sample id of the first location of each dataset, int64 (D,)."""
        return _starts([int(dataset.shard_sizes.sum()) for dataset in self.datasets])

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the datasets' digests, in order."""
        return hashlib.sha256("".join(dataset.digest for dataset in self.datasets).encode()).hexdigest()

    @property
    def archives(self) -> dict[str, Json]:
        """What the manifest of each says of its archive, by the manifest's digest."""
        return {digest: facts for dataset in self.datasets for digest, facts in dataset.archives.items()}

    @cached_property
    def locations(self) -> tuple[str, ...]:
        """All keys, dataset by dataset. Two datasets may use the same key for places of their own."""
        return tuple(key for dataset in self.datasets for key in dataset.locations)

    @cached_property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each shard, dataset by dataset."""
        return np.concatenate([dataset.shard_sizes for dataset in self.datasets])

    @property
    def is_local(self) -> bool:
        """Whether all bytes of all datasets are on this node."""
        return all(dataset.is_local for dataset in self.datasets)

    @property
    def patch_px(self) -> int:
        """Side of the patches at 10 m, px."""
        return self.datasets[0].patch_px

    @property
    def num_seasons(self) -> int:
        """Scenes a location has in each modality, and labels."""
        return self.datasets[0].num_seasons

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The stored image arrays."""
        return self.datasets[0].images

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that every dataset has: reference labels only where all have them."""
        others = [set(dataset.arrays) for dataset in self.datasets]
        return tuple(name for name in self.datasets[0].arrays if all(name in names for names in others))

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels' values 0, 1, ... mean."""
        return self.datasets[0].class_names

    @cached_property
    def places(self) -> Places:
        """Where and when the locations were taken."""
        places = [dataset.places for dataset in self.datasets]
        return Places(
            np.concatenate([place.lon for place in places]),
            np.concatenate([place.lat for place in places]),
            np.concatenate([place.s1_time for place in places]),
            np.concatenate([place.s2_time for place in places]),
        )

    def normalisation(self, modality: Modality) -> Normalisation:
        """The contract by which the stored values of a modality came from physical ones."""
        return self.datasets[0].normalisation(modality)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array as `read_into` fills it."""
        return self.datasets[0].shape(name)

    def read_into(self, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        """Reads one season of one location, see `Dataset`."""
        number = bisect_right(self.starts, sample_id) - 1
        self.datasets[number].read_into(sample_id - int(self.starts[number]), season, arrays)

    def fetch(self, shard: int) -> None:
        """Makes sure that a shard is on this node, see `Dataset`."""
        number = bisect_right(self._first_shards, shard) - 1
        self.datasets[number].fetch(shard - int(self._first_shards[number]))

    @cached_property
    def _first_shards(self) -> npt.NDArray[np.int64]:
        return _starts([len(dataset.shard_sizes) for dataset in self.datasets])


def _starts(counts: list[int]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)


def _traits(dataset: Dataset) -> dict[str, object]:
    """What must be equal, under the names that an error calls it by."""
    modalities = sorted({spec.modality for spec in dataset.images if spec.modality is not None})
    return {
        "patch sizes (px)": dataset.patch_px,
        "numbers of seasons": dataset.num_seasons,
        "image arrays": [(spec.name, *spec.bands) for spec in dataset.images],
        "pixel sizes (m)": {spec.name: 10 * spec.scale for spec in dataset.images},
        "classes": list(dataset.class_names),
        "normalisations (digests)": {modality: dataset.normalisation(modality).digest[:12] for modality in modalities},
    }

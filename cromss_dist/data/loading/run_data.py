"""What a run trains on and what it holds out, from its config."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cromss_dist.config import BatchPlan, DataConfig
from cromss_dist.data.loading.draws import split
from cromss_dist.data.loading.loader import EvalLoader, TrainLoader
from cromss_dist.data.loading.plan import EvalPlan, Source, TrainPlan
from cromss_dist.data.loading.selection import Selection, select
from cromss_dist.data.store.collection import Collection
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.open import open_dataset
from cromss_dist.data.store.remote.cache import ShardCache
from cromss_dist.errors import ConfigError


@dataclass(frozen=True, eq=False)
class RunData:
    """The datasets of a run, split: the same on every rank.

    Args:
        config: What the run's config says of them.
        seed: Of the run.
        train: What to train on, a source for each dataset.
        held_out: The locations held out of each.
    """

    config: DataConfig
    seed: int
    train: tuple[Source, ...]
    held_out: tuple[Selection, ...]

    @classmethod
    def open(cls, config: DataConfig, seed: int) -> "RunData":
        """Opens the datasets, filters them and holds out `val_fraction` of what is left of each.

        Raises:
            ShardError: a dataset is missing or damaged.
            DownloadError: it is remote and cannot be fetched.
            ConfigError: the filters leave too little, or the datasets do not go together.
        """
        reading, filters = config.reading, config.filter
        cache = ShardCache(Path(reading.cache), reading.cache_gib) if reading.cache else ShardCache(limit_gib=reading.cache_gib)
        tables = _quality_tables(filters.quality, len(config.weights))
        datasets = {location: open_dataset(location, cache, reading.kind) for location in config.weights}
        usable = []
        for (location, dataset), quality in zip(datasets.items(), tables, strict=True):
            with _filtering(location):
                part = select(
                    dataset,
                    region=filters.region,
                    max_cloud_share=filters.max_cloud_share,
                    max_nodata_share=filters.max_nodata_share,
                    max_shift_px=filters.max_shift_px,
                    quality=quality,
                )
                usable.append(part)
        keys = [[dataset.locations[i] for i in part.ids] for dataset, part in zip(datasets.values(), usable, strict=True)]
        held_out = [part.take(split(of_part, config.val_fraction, seed)[1]) for part, of_part in zip(usable, keys, strict=True)]
        # A location that several datasets have is trained on in none of them if one holds it out.
        unseen = {dataset.locations[i] for dataset, part in zip(datasets.values(), held_out, strict=True) for i in part.ids}
        train = []
        for (location, dataset), part, of_part in zip(datasets.items(), usable, keys, strict=True):
            seen = part.take(np.flatnonzero([key not in unseen for key in of_part]).astype(np.int64))
            if filters.seasons is not None:
                with _filtering(location):
                    seen = seen.only(filters.seasons)
            if len(seen.ids) == 0:
                raise ConfigError(
                    f"Nothing of {location} is left to train on: all of its {len(part.ids)} locations that pass the filters are "
                    f"held out (data.val_fraction={config.val_fraction:g}; what one dataset holds out is trained on in none) or "
                    "lack data.filter.seasons. Loosen these, or leave the dataset out."
                )
            train.append(Source(dataset, seen, config.weights[location]))
        return cls(config, seed, tuple(train), tuple(held_out))

    @cached_property
    def dataset(self) -> Dataset:
        """All of it as one."""
        return self.train[0].dataset if len(self.train) == 1 else self._together

    @cached_property
    def _together(self) -> Collection:
        return Collection(tuple(source.dataset for source in self.train))

    @cached_property
    def validation(self) -> Selection:
        """The locations held out, in the ids of `dataset`; also the seasons that training does not draw from."""
        ids = np.concatenate([part.ids + start for part, start in zip(self.held_out, self._together.starts, strict=True)])
        return Selection(ids, np.concatenate([part.seasons for part in self.held_out]))

    @property
    def num_train(self) -> int:
        """Locations trained on."""
        return sum(len(source.selection.ids) for source in self.train if source.selection)

    def train_plan(self, batches: BatchPlan, rank: int = 0) -> TrainPlan:
        """What a rank trains on, and when. Raises as `TrainPlan` does."""
        return TrainPlan(
            sources=self.train,
            seed=self.seed,
            global_batch=batches.global_batch,
            micro_batch=batches.micro_batch,
            rank=rank,
            world_size=batches.world_size,
            window=self.config.window,
            tail=self.config.tail,
            bands=self.config.bands,
        )

    def eval_plan(self, batches: BatchPlan, rank: int = 0) -> EvalPlan:
        """What a rank scores. Raises as `EvalPlan` does."""
        return EvalPlan(
            dataset=self.dataset,
            selection=self.validation,
            seasons=self.config.val_seasons,
            micro_batch=batches.micro_batch,
            rank=rank,
            world_size=batches.world_size,
            bands=self.config.bands,
        )

    def train_loader(self, batches: BatchPlan, rank: int = 0, samples: int = 0, pin_memory: bool = False) -> TrainLoader:
        """What reads a rank's `train_plan`, as `data.reading` says, from behind `samples` samples on. Raises as `TrainLoader`."""
        return TrainLoader.of(self.train_plan(batches, rank).starting_at(samples), self.config.reading, pin_memory)

    def eval_loader(self, batches: BatchPlan, rank: int = 0, pin_memory: bool = False) -> EvalLoader:
        """What reads a rank's `eval_plan`, on threads of this process. Raises as `EvalLoader` does."""
        return EvalLoader.of(self.eval_plan(batches, rank), self.config.reading, pin_memory)


@contextmanager
def _filtering(location: str) -> Iterator[None]:
    """Says in an error which dataset of the run was being filtered, by which part of its config."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.filter of {location}: {error}") from error


def _quality_tables(paths: Sequence[str], num_datasets: int) -> list[Path | None]:
    if not paths:
        return [None] * num_datasets
    if len(paths) != num_datasets:
        raise ConfigError(
            f"data.filter.quality names {len(paths)} tables for {num_datasets} datasets; give the quality.csv of each, "
            "in their order."
        )
    return [Path(path) for path in paths]

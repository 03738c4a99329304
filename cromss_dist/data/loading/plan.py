"""Which samples make up which micro batch of a rank: pure functions of what is stored, seed, batch sizes and start.

A plan reads nothing and holds no state; it can be pickled to the processes that read.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.data.loading.draws import Draws, IntArray
from cromss_dist.data.loading.order import Stretch, Tail, TrainingOrder
from cromss_dist.data.loading.selection import Selection, draw_seasons, select
from cromss_dist.data.store.collection import Collection
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import BatchError, ConfigError
from cromss_dist.schema import ArraySpec, Modality

State: TypeAlias = dict[str, Any]
Bands: TypeAlias = Mapping[Modality, Sequence[str]]

MAX_NEIGHBOURS = 8  # tried in the place of a damaged sample: where more in a row are damaged, something else is wrong


@dataclass(frozen=True)
class Request:
    """A micro batch to be read: B samples.

    Args:
        number: Which one of this rank, counted from its start.
        sample_ids: int64 (B,): in the plan's dataset.
        epochs: int64 (B,).
        seasons: int64 (B,).
        weights: float32 (B,).
    """

    number: int
    sample_ids: IntArray
    epochs: IntArray
    seasons: IntArray
    weights: npt.NDArray[np.float32]


class Plan(Protocol):
    """What a reader needs to know."""

    @property
    def dataset(self) -> Dataset:
        """Where the samples are."""

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The image arrays that are read."""

    def requests(self, first: int = 0, every: int = 1) -> Iterator[Request]:
        """This rank's micro batches `first`, `first + every`, ..."""

    def neighbours(self, sample_id: int, epoch: int) -> Iterator[tuple[int, int]]:
        """Samples and seasons that may stand in for a damaged one, best first; the same ones on every machine."""


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset, or a part of one, in a mixture.

    Args:
        dataset: From `open_dataset`.
        selection: Of its locations and seasons, from `select`; None takes all.
        weight: Its share of the training line, relative to the others'.
    """

    dataset: Dataset
    selection: Selection | None = None
    weight: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainPlan:
    """The endless sequence of one rank's training batches.

    The line of samples is that of `TrainingOrder`; global batches follow each other on it. A rank has a contiguous part
    of every global batch, and that in `accumulation_steps` micro batches. Ids of a mixture count on from source to source.

    Args:
        sources: What to train on; more than one is a mixture.
        seed: Of order and seasons.
        global_batch: Samples of one optimizer step over all ranks.
        micro_batch: Samples of one forward pass on one rank.
        rank: Of this process.
        world_size: Number of ranks.
        window: See `TrainingOrder`.
        tail: See `TrainingOrder`.
        start: Samples of the line that all ranks together consumed before; unless `tail` is 'carry' a multiple of
            `global_batch`.
        bands: What is wanted of each modality: arrays without such a band are not read. None reads all.

    Raises:
        BatchError: `global_batch` is not micro_batch x world_size x a whole number.
        ConfigError: there is nothing to train on, the sources do not go together, a selection is not of its dataset, or
            `window` or `tail` is not possible.
    """

    sources: Sequence[Source]
    seed: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    window: int = 2048
    tail: Tail = "carry"
    start: int = 0
    bands: Bands | None = None
    dataset: Dataset = field(init=False)
    starts: IntArray = field(init=False)
    """int64: sample id of the first location of each source."""
    selections: tuple[Selection, ...] = field(init=False)
    order: TrainingOrder = field(init=False)
    accumulation_steps: int = field(init=False)

    def __post_init__(self) -> None:
        per_step = self.micro_batch * self.world_size
        if min(self.micro_batch, self.world_size, self.global_batch) < 1 or self.global_batch % per_step:
            raise BatchError(
                f"global_batch {self.global_batch} is not micro_batch {self.micro_batch} x world size {self.world_size} x a "
                f"whole number of accumulation steps; set it to a multiple of {per_step}."
            )
        _check_rank(self.rank, self.world_size)
        if not self.sources:
            raise ConfigError("There is no dataset to train on; give at least one source.")
        datasets = tuple(source.dataset for source in self.sources)
        together = Collection(datasets)
        selections = tuple(source.selection or select(source.dataset) for source in self.sources)
        for dataset, selection in zip(datasets, selections, strict=True):
            _check_selection(dataset, selection)
        sizes = [selection.sizes(one.shard_sizes) for selection, one in zip(selections, datasets, strict=True)]
        weights = [source.weight for source in self.sources]
        order = TrainingOrder(sizes, weights, self.seed, self.window, self.tail, self.global_batch)
        derived: dict[str, object] = {
            "dataset": datasets[0] if len(datasets) == 1 else together,
            "starts": together.starts,
            "selections": selections,
            "order": order,
            "accumulation_steps": self.global_batch // per_step,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        self._check_start(self.start)

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The image arrays that are read."""
        return _wanted(self.dataset, self.bands)

    @property
    def guard(self) -> State:
        """All that decides what comes when, beside the number of samples consumed; JSON types."""
        return {
            **self.order.guard,
            "lanes": list(self.order.lanes),
            "datasets": [source.dataset.digest for source in self.sources],
            "selections": [selection.digest for selection in self.selections],
        }

    def state(self, samples: int) -> State:
        """What a run that goes on behind `samples` samples of the line must know; JSON types."""
        return {"samples": samples, "guard": self.guard}

    def starting_at(self, samples: int) -> "TrainPlan":
        """The same plan with another `start`."""
        self._check_start(samples)
        plan = copy(self)
        object.__setattr__(plan, "start", samples)
        return plan

    def resumed(self, state: State) -> "TrainPlan":
        """The same plan from the point on that `state` describes.

        Number of ranks, micro batch, threads and workers may be others than when it was written; unless `tail` says
        otherwise the global batch, too.

        Raises:
            ConfigError: the state is of another line of samples, or none at all; says what differs.
        """
        guard, samples = (state.get("guard"), state.get("samples")) if isinstance(state, dict) else (None, None)
        if not isinstance(guard, dict) or type(samples) is not int or samples < 0 or set(state) != {"samples", "guard"}:
            raise ConfigError(f"{str(state)[:200]} is no state of a loader; give what its state_dict() returned.")
        own = self.guard
        differing = [name for name in {**own, **guard} if own.get(name) != guard.get(name)]
        if differing:
            told = "; ".join(f"{name} was {guard.get(name)} and is {own.get(name)}" for name in differing)
            raise ConfigError(
                f"The loader cannot go on from this state, since the samples would come in another order: {told}. Give it what "
                "the run had, or start anew without the state."
            )
        return self.starting_at(samples)

    def requests(self, first: int = 0, every: int = 1) -> Iterator[Request]:
        """Endless, from `start` on."""
        share = self.global_batch // self.world_size
        known: tuple[int, Stretch] | None = None
        for number in count(first, every):
            step, micro_step = divmod(number, self.accumulation_steps)
            if known is None or known[0] != step:
                mine = slice(self.rank * share, (self.rank + 1) * share)
                known = step, self.order.stretch(self.start + step * self.global_batch, self.global_batch, mine)
            stretch, part = known[1], slice(micro_step * self.micro_batch, (micro_step + 1) * self.micro_batch)
            epochs = stretch.epoch[part]
            sample_ids, seasons = self._drawn(stretch.source[part], stretch.place[part], epochs)
            yield Request(number, sample_ids, epochs, seasons, stretch.weight[part])

    def neighbours(self, sample_id: int, epoch: int) -> Iterator[tuple[int, int]]:
        """The next ones of the same source by id, behind the last the first; each with the season that it would have."""
        source = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        ids = self.selections[source].ids
        place = int(np.searchsorted(ids, sample_id - self.starts[source]))
        for distance in range(1, min(MAX_NEIGHBOURS, len(ids) - 1) + 1):
            found, seasons = self._drawn(np.array([source]), np.array([(place + distance) % len(ids)]), np.array([epoch]))
            yield int(found[0]), int(seasons[0])

    def _check_start(self, samples: int) -> None:
        if samples < 0 or (self.tail != "carry" and samples % self.global_batch):
            raise ConfigError(
                f"start={samples} is not allowed with tail={self.tail!r}; give 0 or more samples, and unless tail is 'carry' a "
                f"multiple of global_batch {self.global_batch}."
            )

    def _drawn(self, sources: IntArray, places: IntArray, epochs: IntArray) -> tuple[IntArray, IntArray]:
        """Sample ids and seasons, int64 (B,) each, at places of the sources' selections."""
        sample_ids = np.empty_like(places)
        allowed = np.empty((len(places), self.dataset.num_seasons), bool)
        for number, selection in enumerate(self.selections):
            here = sources == number
            sample_ids[here] = selection.ids[places[here]] + self.starts[number]
            allowed[here] = selection.seasons[places[here]]
        return sample_ids, draw_seasons(Draws(self.seed, epochs, sample_ids).season, allowed)


@dataclass(frozen=True, eq=False, kw_only=True)
class EvalPlan:
    """Each (location, season) pair once over all ranks, in a fixed order.

    Every rank has the same number of batches, all of them full: samples of weight 0 fill up the last.

    Args:
        dataset: What to score on; a `Collection` for several.
        selection: Of its locations; of their seasons those are scored that it allows and `seasons` names.
        seasons: Seasons to score, in that order.
        micro_batch: Samples of one forward pass on one rank.
        rank: Of this process.
        world_size: Number of ranks.
        bands: See `TrainPlan`.

    Raises:
        ConfigError: nothing is left to score, a season or rank does not exist, or the selection is not of the dataset.
        BatchError: `micro_batch` is less than 1.
    """

    dataset: Dataset
    selection: Selection
    seasons: Sequence[int]
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    bands: Bands | None = None
    pairs: IntArray = field(init=False)
    """int64 (P, 2): sample id and season."""

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world_size)
        if self.micro_batch < 1:
            raise BatchError(f"micro_batch={self.micro_batch} is not allowed; give at least 1.")
        _check_selection(self.dataset, self.selection)
        if repeated := [season for season in self.seasons if list(self.seasons).count(season) > 1]:
            raise ConfigError(f"Season {repeated[0]} is named twice and would be scored twice; name each once.")
        if unknown := [season for season in self.seasons if not 0 <= season < self.dataset.num_seasons]:
            raise ConfigError(f"Season {unknown[0]} is not there; give some of 0 to {self.dataset.num_seasons - 1}.")
        wanted = self.selection.seasons[:, list(self.seasons)]
        places, nth = np.nonzero(wanted)
        if len(places) == 0:
            raise ConfigError(
                f"{len(self.selection.ids)} locations and seasons {list(self.seasons)} leave nothing to score; give at least "
                "one location that has one of them."
            )
        pairs = np.stack([self.selection.ids[places], np.asarray(self.seasons, np.int64)[nth]], axis=1)
        object.__setattr__(self, "pairs", pairs)

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The image arrays that are read."""
        return _wanted(self.dataset, self.bands)

    @property
    def num_batches(self) -> int:
        """Micro batches of each rank."""
        return -(-len(self.pairs) // (self.micro_batch * self.world_size))

    def requests(self, first: int = 0, every: int = 1) -> Iterator[Request]:
        """As many as `num_batches`."""
        for number in range(first, self.num_batches, every):
            places = (number * self.world_size + self.rank) * self.micro_batch + np.arange(self.micro_batch)
            weights = (places < len(self.pairs)).astype(np.float32)
            sample_ids, seasons = self.pairs[np.minimum(places, len(self.pairs) - 1)].T
            epochs = np.zeros(self.micro_batch, np.int64)
            yield Request(number, np.ascontiguousarray(sample_ids), epochs, np.ascontiguousarray(seasons), weights)

    def neighbours(self, sample_id: int, epoch: int) -> Iterator[tuple[int, int]]:
        """None: a score is of what it says."""
        return iter(())


def _wanted(dataset: Dataset, bands: Bands | None) -> tuple[ArraySpec, ...]:
    """The image arrays that have one of the bands."""
    if bands is None:
        return dataset.images
    wanted = {(modality, band) for modality, of_modality in bands.items() for band in of_modality}
    return tuple(spec for spec in dataset.images if any((spec.modality, band) in wanted for band in spec.bands))


def _check_selection(dataset: Dataset, selection: Selection) -> None:
    num_locations, seasons = int(dataset.shard_sizes.sum()), selection.seasons.shape
    last = int(selection.ids[-1]) if len(selection.ids) else 0
    if seasons != (len(selection.ids), dataset.num_seasons) or last >= max(1, num_locations):
        raise ConfigError(
            f"The selection is not of this dataset of {num_locations} locations and {dataset.num_seasons} seasons: it has "
            f"{list(seasons)} locations and seasons, the last one with the id {last}. Give what `select` returned for it."
        )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} is not one of {world_size} ranks; give 0 to {world_size - 1}.")

"""Which training tiles a run may learn from, where it gets few labels.

Layer 4. A choice is a function of the tiles' keys, of what their labels hold and of the seed, and of nothing else: it is the same
for every encoder, mode and run, and a smaller one is always part of a larger one of the same kind and seed.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cromss_dist.config.transfer import LabelsConfig
from cromss_dist.data.loading.draws import IntArray, Stream, ranked_keys
from cromss_dist.data.loading.selection import Selection, select
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import ConfigError
from cromss_dist.schema import LABEL_ARRAY
from cromss_dist.transfer.results import LabelsUsed

MIN_SHARE = 0.01
"""Share of its labelled pixels that a tile must have of a class to count as a tile of that class."""


def choose_share(keys: Sequence[str], fraction: float, seed: int) -> IntArray:
    """The first `fraction` of the tiles in the order of `ranked_keys`, rounded, at least one: ascending indices, int64."""
    return np.sort(ranked_keys(keys, seed, Stream.LABELS)[: max(1, round(fraction * len(keys)))])


def choose_per_class(keys: Sequence[str], has_class: npt.NDArray[np.bool_], per_class: int, seed: int) -> IntArray:
    """For every class the first `per_class` tiles of it, in the order of `ranked_keys`: ascending indices, int64.

    That is what goes through the tiles in this order and takes each one that has a class of which there are not enough yet. A
    tile counts for each of its classes, so that there are at most `per_class` times C tiles and mostly far fewer; a class with
    fewer tiles than asked for gives all that it has.

    Args:
        keys: N of them.
        has_class: bool (N, C).
        per_class: Tiles of each class.
        seed: Of the order.

    Raises:
        ConfigError: no tile has a class.
    """
    order = ranked_keys(keys, seed, Stream.LABELS)
    ordered = has_class[order]
    among_first = ordered & (np.cumsum(ordered, axis=0) <= per_class)
    chosen = np.sort(order[among_first.any(axis=1)])
    if len(chosen) == 0:
        raise ConfigError("labels.per_class chooses nothing: no training tile has a labelled pixel. Look at the training set.")
    return chosen


def class_counts(dataset: Dataset, selection: Selection, threads: int = 4) -> IntArray:
    """Labelled pixels of each class in each tile, over its selected seasons: int64 (L, C). Reads every label once.

    Raises:
        ShardError: a label is missing or damaged.
    """
    num_classes = len(dataset.class_names)

    def count(place: int) -> IntArray:
        label = np.empty(dataset.shape(LABEL_ARRAY), np.uint8)
        dataset.read_into(int(selection.ids[place]), 0, {LABEL_ARRAY: label})
        seasons = label[selection.seasons[place]]
        return np.bincount(seasons[seasons < num_classes], minlength=num_classes).astype(np.int64)

    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(count, range(len(selection.ids)))))


def choose_labels(dataset: Dataset, seasons: Sequence[int] | None, config: LabelsConfig) -> tuple[Selection, LabelsUsed]:
    """The training tiles of a run, and how they are told of in its results.

    Args:
        dataset: The training set.
        seasons: That are used; None: all.
        config: How many labels, and the seed.

    Raises:
        ConfigError: a season is not there, or nothing is left.
        ShardError: a label cannot be read; labels are only read for `per_class`.
    """
    available = select(dataset, seasons=seasons)
    keys = [dataset.locations[i] for i in available.ids]
    if config.per_class is None:
        places = choose_share(keys, config.fraction, config.seed)
    else:
        counts = class_counts(dataset, available)
        has_class = (counts > 0) & (counts >= MIN_SHARE * counts.sum(1, keepdims=True))
        places = choose_per_class(keys, has_class, config.per_class, config.seed)
    chosen = sorted(keys[place] for place in places)
    used = LabelsUsed(
        tiles=len(chosen),
        digest=hashlib.sha256("\n".join(chosen).encode()).hexdigest(),
        fraction=config.fraction,
        per_class=config.per_class or 0,
        seed=config.seed,
    )
    return available.take(places), used

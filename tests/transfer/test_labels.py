"""Which tiles a run may learn from: the same for everyone, and fewer always among more."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cromss_dist.config.transfer import LabelsConfig
from cromss_dist.data.loading.selection import select
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import ConfigError
from cromss_dist.schema import LABEL_ARRAY
from cromss_dist.transfer.labels import MIN_SHARE, choose_labels, choose_per_class, choose_share, class_counts

KEYS = [f"tile-{number}" for number in range(200)]


def test_a_share_is_so_many_tiles_and_at_least_one() -> None:
    for fraction, number in ((1.0, 200), (0.5, 100), (0.1, 20), (0.004, 1), (0.0001, 1)):
        assert len(choose_share(KEYS, fraction, seed=0)) == number


def test_fewer_tiles_are_always_among_more() -> None:
    chosen = [set(choose_share(KEYS, fraction, seed=3).tolist()) for fraction in (0.01, 0.1, 0.1, 0.5, 1.0)]
    assert all(small <= large for small, large in pairwise(chosen))
    assert choose_share(KEYS, 0.1, 3).tolist() != choose_share(KEYS, 0.1, 4).tolist()


def test_a_choice_knows_keys_and_not_their_order() -> None:
    backwards = {KEYS[::-1][place] for place in choose_share(KEYS[::-1], 0.2, seed=1)}
    assert backwards == {KEYS[place] for place in choose_share(KEYS, 0.2, seed=1)}
    # pinned: what was published with a seed must stay
    assert choose_share(KEYS, 0.02, seed=0).tolist() == [14, 29, 78, 166]


def by_going_through(order: list[int], has_class: np.ndarray, per_class: int) -> list[int]:
    """The same as a loop: take a tile if a class of it is not there `per_class` times yet."""
    counts, taken = np.zeros(has_class.shape[1], int), []
    for tile in order:
        if (has_class[tile] & (counts < per_class)).any():
            taken.append(tile)
            counts += has_class[tile]
    return sorted(taken)


def test_tiles_of_each_class_are_what_going_through_them_one_by_one_takes() -> None:
    draws = np.random.default_rng(0)
    for _ in range(20):
        has_class = draws.random((60, 5)) < draws.uniform(0.02, 0.6, 5)
        keys = KEYS[:60]
        order = sorted(range(60), key=choose_order(keys).index)
        chosen = {n: choose_per_class(keys, has_class, n, seed=0) for n in (1, 2, 5, 60)}
        for per_class, found in chosen.items():
            assert found.tolist() == by_going_through(order, has_class, per_class)
            assert (has_class[found].sum(0) >= np.minimum(has_class.sum(0), per_class)).all()
            assert len(found) <= 5 * per_class
        assert set(chosen[1]) <= set(chosen[2]) <= set(chosen[5]) <= set(chosen[60])


def choose_order(keys: list[str]) -> list[int]:
    """Tiles in the order in which shares take them, found from the shares themselves."""
    order: list[int] = []
    for number in range(1, len(keys) + 1):
        order += sorted(set(choose_share(keys, number / len(keys), seed=0).tolist()) - set(order))
    return order


def test_without_a_labelled_pixel_there_is_nothing_to_choose() -> None:
    with pytest.raises(ConfigError, match="no training tile has a labelled pixel"):
        choose_per_class(KEYS, np.zeros((200, 3), bool), 1, seed=0)


@pytest.fixture(scope="module")
def dataset(synthetic_shards: Path) -> Dataset:
    return open_dataset(str(synthetic_shards))


def test_counts_are_those_of_the_labels_of_the_seasons_that_are_used(dataset: Dataset) -> None:
    selection = select(dataset, seasons=[1, 3])
    counts = class_counts(dataset, selection)
    label = np.empty(dataset.shape(LABEL_ARRAY), np.uint8)
    dataset.read_into(5, 0, {LABEL_ARRAY: label})
    expected = [int((label[[1, 3]] == value).sum()) for value in range(9)]
    assert counts.shape == (12, 9)
    assert counts[5].tolist() == expected


def test_the_labels_of_a_run_are_told_with_the_digest_of_their_keys(dataset: Dataset) -> None:
    all_of_them, told = choose_labels(dataset, None, LabelsConfig())
    assert (told.tiles, told.amount, all_of_them.ids.tolist()) == (12, "all", list(range(12)))
    assert told.digest == hashlib.sha256("\n".join(sorted(dataset.locations)).encode()).hexdigest()
    half, told_half = choose_labels(dataset, [0], LabelsConfig(fraction=0.5, seed=7))
    assert (told_half.tiles, told_half.amount, half.seasons.sum()) == (6, "50 %", 6)
    few, told_few = choose_labels(dataset, None, LabelsConfig(per_class=1, seed=7))
    counts = class_counts(dataset, few)
    assert ((counts >= MIN_SHARE * counts.sum(1, keepdims=True)).sum(0) >= 1).all()
    assert told_few.amount == "1 a class"
    assert told_few.tiles == len(few.ids) <= 9

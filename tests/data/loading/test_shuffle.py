"""How well the order mixes, and how few shards a rank needs for that: measures of one order, which is always the same."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from cromss_dist.data.loading.order import TrainingOrder

Rows: TypeAlias = npt.NDArray[np.int64]

SHARDS, PER_SHARD, BATCH = 200, 250, 256
NUM = SHARDS * PER_SHARD
FULL = NUM // BATCH


@pytest.fixture(scope="module")
def order() -> TrainingOrder:
    """64 lanes of one window each: 781 samples."""
    return TrainingOrder([np.full(SHARDS, PER_SHARD)], [1], seed=7, window=512)


@pytest.fixture(scope="module")
def epochs(order: TrainingOrder) -> list[Rows]:
    """Two epochs: the samples of their full batches, (FULL, BATCH)."""
    return [np.stack([order.stretch(epoch * NUM + i * BATCH, BATCH).place for i in range(FULL)]) for epoch in (0, 1)]


def batch_of(rows: Rows) -> Rows:
    """The batch that each sample comes in, (NUM,); -1 for those behind the last full one."""
    batch = np.full(NUM, -1)
    batch[rows] = np.arange(FULL)[:, None]
    return batch


def test_a_batch_has_as_many_shards_as_one_drawn_at_random(epochs: list[Rows]) -> None:
    at_random = SHARDS * (1 - (1 - 1 / SHARDS) ** BATCH)
    for rows in epochs:
        distinct = [len(np.unique(row // PER_SHARD)) for row in rows]
        assert np.mean(distinct) > 0.98 * at_random
        assert min(distinct) > 0.85 * at_random


def test_samples_of_a_shard_share_batches_no_more_than_at_random(epochs: list[Rows]) -> None:
    for rows in epochs:
        counts = np.stack([np.bincount(row // PER_SHARD, minlength=SHARDS) for row in rows])
        pairs = (counts * (counts - 1)).sum() / (FULL * BATCH * (BATCH - 1))
        assert pairs < 1.1 * (PER_SHARD - 1) / (NUM - 1)


def test_an_epoch_tells_nothing_of_the_next_nor_of_the_place_in_the_dataset(epochs: list[Rows]) -> None:
    first, second = (batch_of(rows) for rows in epochs)
    both = (first >= 0) & (second >= 0)
    assert abs(np.corrcoef(first[both], second[both])[0, 1]) < 0.02
    # Two uniform and independent numbers differ by a third on average.
    assert np.abs(first - second)[both].mean() / FULL == pytest.approx(1 / 3, rel=0.02)
    for batch in (first, second):
        assert abs(np.corrcoef(batch[both], np.flatnonzero(both))[0, 1]) < 0.02


def test_batch_mates_of_one_epoch_are_strangers_in_the_next(epochs: list[Rows]) -> None:
    second = batch_of(epochs[1])
    again = [np.bincount(second[row][second[row] >= 0]) for row in epochs[0]]
    met_again = sum(int((counts * (counts - 1)).sum()) for counts in again) / (FULL * BATCH * (BATCH - 1))
    assert met_again == pytest.approx(BATCH / NUM, rel=0.1)


@pytest.mark.parametrize("size", [64, 256, 512])
@pytest.mark.parametrize("world", [2, 8])
def test_a_rank_needs_its_share_of_the_shards_and_one_at_each_border(order: TrainingOrder, size: int, world: int) -> None:
    part = size // world
    needed: list[set[int]] = [set() for _ in range(world)]
    for step in range(NUM // size):
        shards = order.stretch(step * size, size).place // PER_SHARD
        for rank in range(world):
            needed[rank].update(shards[rank * part : (rank + 1) * part].tolist())
    assert max(len(shards) for shards in needed) <= SHARDS // world + 2


def test_a_batch_that_is_no_multiple_of_the_lanes_costs_a_rank_few_shards_more(order: TrainingOrder) -> None:
    shards = {int(shard) for step in range(NUM // 96) for shard in order.stretch(step * 96, 96, slice(0, 12)).place // PER_SHARD}
    assert len(shards) < 2 * SHARDS // 8


def test_a_smaller_window_has_fewer_shards_open_at_a_time() -> None:
    def open_shards(window: int) -> int:
        line = TrainingOrder([np.full(SHARDS, 10 * PER_SHARD)], [1], seed=7, window=window)
        return len({int(shard) for step in range(64) for shard in line.stretch(step * 64, 64).place // (10 * PER_SHARD)})

    assert open_shards(256) < open_shards(2048) < open_shards(8192)


def test_orders_of_small_sets_are_equally_likely() -> None:
    # 3! = 6 orders over 6,000 epochs; the bound is that of chance at one in a million (chi-squared of 5 degrees of freedom).
    order = TrainingOrder([np.array([3])], [1], seed=0)
    places = np.concatenate([order.stretch(300 * i, 300).place for i in range(60)]).reshape(-1, 3)
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 35.9

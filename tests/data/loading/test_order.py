"""The laws of the training order; each against the line as `reference_line` builds it, one sample at a time."""

import hashlib
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest

from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.order import MIXTURE_PERIOD, ORDER_VERSION, Stretch, TrainingOrder
from cromss_dist.data.loading.selection import draw_seasons, select
from cromss_dist.errors import ConfigError
from tests.data.fake_dataset import FakeDataset
from tests.data.loading.reference_line import reference_epoch

UNEVEN = (5, 1, 0, 40, 17, 3, 33, 21)  # 120 samples

Sample = tuple[int, int, int]


def of(*sizes: Sequence[int], weights: Sequence[float] = (1,), seed: int = 5, **how: Any) -> TrainingOrder:
    return TrainingOrder([np.array(shards, np.int64) for shards in sizes], weights, seed, **{"window": 8} | how)


def samples(stretch: Stretch) -> list[Sample]:
    """(dataset, epoch, sample) of each."""
    return list(zip(stretch.source.tolist(), stretch.epoch.tolist(), stretch.place.tolist(), strict=True))


def batches(order: TrainingOrder, size: int, num: int, start: int = 0) -> list[list[Sample]]:
    return [samples(order.stretch(start + batch * size, size)) for batch in range(num)]


@cache
def reference(sizes: tuple[int, ...], window: int, num_epochs: int, seed: int = 5) -> list[tuple[int, int]]:
    """(epoch, sample) of each place of the line."""
    return [
        (epoch, sample)
        for epoch in range(num_epochs)
        for sample in reference_epoch(sizes, seed, source=0, epoch=epoch, window=window)
    ]


@pytest.mark.parametrize("window", [1, 2, 7, 8, 60, 61, 500])
@pytest.mark.parametrize("sizes", [UNEVEN, (1,), (2, 0), (0, 0, 97), (1,) * 64, (9, 1) * 13, (150, 3, 0, 170)])
def test_the_line_is_the_one_described(sizes: tuple[int, ...], window: int) -> None:
    order = of(sizes, window=window)
    place_by_place = [batch[0][1:] for batch in batches(order, 1, 3 * sum(sizes))]
    assert place_by_place == reference(sizes, window, 3)


def test_a_batch_is_a_stretch_of_the_line_arranged_by_lane() -> None:
    order, line = of(UNEVEN), reference(UNEVEN, 8, 4)
    (lanes,) = order.lanes
    for start, size in ((0, 7), (7, 32), (100, 64), (119, 2), (37, 300)):
        arranged = sorted(range(start, start + size), key=lambda at: (at % 120 % lanes, at))
        assert [sample[1:] for sample in samples(order.stretch(start, size))] == [line[at] for at in arranged]


@pytest.mark.parametrize(("num_samples", "window", "lanes"), [(1, 8, 1), (15, 8, 1), (16, 8, 2), (511, 8, 32), (10**6, 8, 64)])
def test_lanes_are_as_many_as_hold_a_window_each(num_samples: int, window: int, lanes: int) -> None:
    assert of((num_samples,), window=window).lanes == (lanes,)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ((UNEVEN,), {"window": 2048}),
        ((UNEVEN,), {}),
        ((UNEVEN,), {"tail": "drop", "global_batch": 16}),
        ((UNEVEN,), {"tail": "pad", "global_batch": 16}),
        ((UNEVEN, (30, 2), (64,)), {"weights": (3, 1, 1.5)}),
    ],
    ids=["one lane", "lanes", "drop", "pad", "mixture"],
)
def test_restored_at_every_step_the_rest_of_the_sequence_is_the_same(sizes: tuple[Any, ...], how: dict[str, Any]) -> None:
    num = 20  # two epochs and more
    whole = batches(of(*sizes, **how), 16, num)
    for step in range(num):
        assert batches(of(*sizes, **how), 16, num - step, start=16 * step) == whole[step:]


def random_schedule(rng: random.Random, end: int) -> list[tuple[int, int, int, int, int]]:
    """Runs one after another: (steps, global batch, world size, micro batch, workers)."""
    runs, consumed = [], 0
    while consumed < end:
        size = rng.choice((4, 6, 8, 12, 24, 30, 48))
        world = rng.choice([n for n in range(1, size + 1) if size % n == 0 and n <= 8])
        micro = rng.choice([n for n in range(1, size // world + 1) if size // world % n == 0 and size // n <= 8])
        runs.append((rng.randint(1, 8), size, world, micro, rng.randint(0, 3)))
        consumed += runs[-1][0] * size
    return runs


def test_five_hundred_random_schedules_give_the_same_global_batches_none_lost_none_twice() -> None:
    line = reference(UNEVEN, 8, 5)
    (lanes,) = of(UNEVEN).lanes
    rng = random.Random(4)
    differing = lost = duplicated = compared = 0
    for _ in range(500):
        seen: Counter[tuple[int, int]] = Counter()
        start = 0
        for steps, size, world, micro, workers in random_schedule(rng, end=150):
            per_rank = size // world
            found: dict[tuple[int, int], list[Sample]] = {}
            for rank in range(world):
                order = of(UNEVEN)  # each process makes its own
                numbers = range(steps * per_rank // micro)  # micro batches, worker by worker
                for number in (n for worker in range(max(1, workers)) for n in numbers[worker :: max(1, workers)]):
                    step, part = divmod(number * micro, per_rank)
                    at = rank * per_rank + part
                    found[step, at] = samples(order.stretch(start + step * size, size, slice(at, at + micro)))
            for step in range(steps):
                batch = [sample[1:] for at in range(0, size, micro) for sample in found[step, at]]
                stretch = range(start + step * size, start + (step + 1) * size)
                differing += batch != [line[at] for at in sorted(stretch, key=lambda at: (at % 120 % lanes, at))]
                compared += 1
                seen.update(batch)
            start += steps * size
        lost += len(set(line[:start]) - set(seen))
        duplicated += sum(count - 1 for count in seen.values())
    assert (differing, lost, duplicated) == (0, 0, 0)
    assert compared > 5000


@pytest.mark.parametrize("size", [8, 40, 64, 512])
def test_uneven_shards_give_full_batches_and_lose_less_than_one_an_epoch(size: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [1, 0, *rng.integers(1, 401, 30).tolist(), 0, 1]
    num_samples = sum(sizes)
    order = of(sizes, window=64, tail="drop", global_batch=size)
    assert 0 <= num_samples - order.epoch_samples < size
    left_out = []
    for epoch in range(3):
        rows = batches(order, size, order.epoch_samples // size, start=epoch * order.epoch_samples)
        places = [place for batch in rows for _, of_epoch, place in batch if of_epoch == epoch]
        assert len(set(places)) == len(places) == order.epoch_samples
        left_out.append(frozenset(range(num_samples)) - set(places))
    assert len(set(left_out)) == 3  # others each epoch
    assert of(UNEVEN, tail="drop", global_batch=120).epoch_samples == 120


def test_fewer_shards_than_ranks_are_enough() -> None:
    order = of((5,))
    for step in range(4):
        ranks = [order.stretch(8 * step, 8, slice(2 * rank, 2 * rank + 2)) for rank in range(4)]
        assert [len(rank.place) for rank in ranks] == [2] * 4
        assert [sample for rank in ranks for sample in samples(rank)] == samples(order.stretch(8 * step, 8))
    assert Counter(sample[2] for batch in batches(order, 8, 5) for sample in batch) == dict.fromkeys(range(5), 8)


def test_padding_has_each_sample_once_with_weight_and_fills_up_with_none() -> None:
    order = of(UNEVEN, tail="pad", global_batch=32)
    assert order.epoch_samples == 128
    for epoch in range(3):
        rows = [order.stretch(128 * epoch + 32 * batch, 32) for batch in range(4)]
        assert all((row.epoch == epoch).all() for row in rows)
        counted = np.concatenate([row.place[row.weight == 1] for row in rows])
        assert sorted(counted.tolist()) == list(range(120))
        assert [int((row.weight == 0).sum()) for row in rows] == [0, 0, 0, 8]
    assert of(UNEVEN, tail="pad", global_batch=40).epoch_samples == 120
    tiny = of((3,), tail="pad", global_batch=8).stretch(8, 8)
    assert tiny.weight.sum() == 3
    assert set(tiny.epoch.tolist()) == {1}


def test_the_rest_of_an_epoch_is_carried_into_the_next() -> None:
    assert of(UNEVEN).epoch_samples == 120
    batch = of(UNEVEN).stretch(112, 16)
    assert Counter(batch.epoch.tolist()) == {0: 8, 1: 8}
    assert (batch.weight == 1).all()


GOLDEN_SIZES = (700, 0, 1, 333, 250, 250, 466)
GOLDEN = [
    (0, 0, "9ca153b407f427f7"),
    (0, 1, "1da7a48d5de41614"),
    (1, 0, "9b786989d2fed03b"),
    (42, 7, "a49b2bef92e77a3c"),
    (1099511627776, 100, "9a18742f9ddc781e"),
]


@pytest.mark.parametrize(("seed", "epoch", "golden"), GOLDEN)
def test_the_first_thousand_samples_have_their_golden_digest(seed: int, epoch: int, golden: str) -> None:
    places = of(GOLDEN_SIZES, seed=seed, window=10).stretch(epoch * 2000, 1000).place
    assert hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()[:16] == golden


def test_the_first_samples_are_the_golden_ones() -> None:
    # Where they change, the order has: count ORDER_VERSION up.
    assert of(GOLDEN_SIZES, seed=0, window=10).stretch(0, 8).place.tolist() == [1291, 1316, 1348, 1381, 1413, 1450, 1480, 1515]
    assert of((10,), seed=0).stretch(0, 10).place.tolist() == [7, 8, 2, 1, 0, 5, 3, 4, 9, 6]
    mixed = of((10,), (10, 10), weights=(1, 2), seed=0).stretch(0, 8)
    assert mixed.source.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert mixed.place.tolist() == [7, 8, 2, 3, 7, 2, 18, 10]


def test_epochs_seeds_and_datasets_of_a_mixture_have_orders_of_their_own() -> None:
    orders = {tuple(of((50,), seed=seed).stretch(50 * epoch, 50).place) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    mixed = of((50,), (50,), weights=(1, 1)).stretch(0, 100)
    assert mixed.place[mixed.source == 0].tolist() != mixed.place[mixed.source == 1].tolist()


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (5, 3, 1), (2e-3, 1, 1, 2, 0.5), (1,) * 20])
def test_a_mixture_keeps_its_shares_everywhere_and_each_dataset_its_epochs(weights: tuple[float, ...]) -> None:
    sizes = [tuple(range(3, 9))[number % 3 :] for number in range(len(weights))]
    order = of(*sizes, weights=weights)
    shares = np.array(order.guard["shares"])
    assert shares.sum() == MIXTURE_PERIOD
    assert np.abs(shares - np.array(weights) / sum(weights) * MIXTURE_PERIOD).max() < 1
    line = [sample for batch in batches(order, 1, MIXTURE_PERIOD) for sample in batch]
    counts = np.cumsum(np.array([sample[0] for sample in line])[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, MIXTURE_PERIOD + 1)[:, None] * shares / MIXTURE_PERIOD
    assert np.abs(counts - due).max() <= (len(weights) + 1) / 2
    for period in range(3):
        sources = order.stretch(period * MIXTURE_PERIOD, MIXTURE_PERIOD).source
        assert np.bincount(sources).tolist() == shares.tolist()
    for source, of_shards in enumerate(sizes):
        own = [sample[1:] for sample in line if sample[0] == source]
        assert [epoch for epoch, _ in own] == [at // sum(of_shards) for at in range(len(own))]
        full = len(own) // sum(of_shards) * sum(of_shards)
        assert Counter(own[:full]) == {(at // sum(of_shards), at % sum(of_shards)): 1 for at in range(full)}


def test_two_datasets_have_their_shares_of_every_batch() -> None:
    order = of((1000,), (500, 40), weights=(0.9, 0.1))
    for batch in range(100):
        assert abs(int((order.stretch(64 * batch, 64).source == 1).sum()) - 6.4) < 1.1


def test_a_dataset_too_rare_for_a_batch_leaves_it_to_the_others() -> None:
    order = of((1000,), (7,), weights=(4095, 1))
    assert not order.stretch(0, 8).source.any()
    assert order.stretch(0, MIXTURE_PERIOD).source.sum() == 1


def test_filters_leave_out_what_they_filter_and_keep_every_law() -> None:
    dataset = FakeDataset((30, 1, 0, 50, 12, 7), seed=3)
    selection = select(dataset, region=(-120, -60, 150, 70), seasons=(0, 2))
    assert 0 < len(selection.ids) < 100
    order = of(selection.sizes(dataset.shard_sizes).tolist())
    num = len(selection.ids)
    for epoch in range(3):
        stretch = order.stretch(epoch * num, num)
        ids = selection.ids[stretch.place]
        assert sorted(ids.tolist()) == selection.ids.tolist()
        season = draw_seasons(Draws(5, stretch.epoch, ids).season, selection.seasons[stretch.place])
        assert set(season.tolist()) == {0, 2}


def test_threads_that_read_different_epochs_disturb_nobody() -> None:
    order = of(UNEVEN, (60, 5), weights=(1, 1))
    starts = random.Random(0).choices(range(0, 5000, 10), k=400)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: samples(order.stretch(start, 10)), starts))
    alone = of(UNEVEN, (60, 5), weights=(1, 1))
    assert found == [samples(alone.stretch(start, 10)) for start in starts]


def test_a_billion_samples_take_the_memory_of_their_shards() -> None:
    sizes = np.full(10**6, 1000)
    tracemalloc.start()
    try:
        order = TrainingOrder([sizes], [1], seed=0)
        stretch = order.stretch(10**9 - 100, 200)  # of two epochs
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert len(np.unique(stretch.place)) == 200


@pytest.mark.parametrize(
    ("sizes", "how", "message"),
    [
        ((UNEVEN,), {"window": 0}, "window=0"),
        (((0, 0),), {}, r"\[0\] samples"),
        ((UNEVEN, (0,)), {"weights": (1, 1)}, r"\[120, 0\] samples"),
        ((UNEVEN,), {"weights": (1, 1)}, "a weight for each"),
        ((), {"weights": ()}, "at least one"),
        ((UNEVEN,), {"weights": (0,)}, "positive"),
        ((UNEVEN,), {"weights": (float("nan"),)}, "positive"),
        ((UNEVEN, UNEVEN), {"weights": (1, 4096)}, "too unequal; none may be below 1/4096"),
        ((UNEVEN,), {"tail": "drop"}, "tail='drop' needs one dataset and a global batch"),
        ((UNEVEN,), {"tail": "pad", "global_batch": 0}, "tail='pad' needs"),
        ((UNEVEN, UNEVEN), {"weights": (1, 1), "tail": "pad", "global_batch": 8}, "needs one dataset"),
        ((UNEVEN,), {"tail": "drop", "global_batch": 121}, "120 samples in batches of 121 leaves none"),
    ],
)
def test_what_cannot_be_ordered_is_refused(sizes: tuple[Any, ...], how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of(*sizes, **how)


def test_the_guard_names_all_that_the_order_depends_on() -> None:
    guards = [
        of(UNEVEN).guard,
        of(UNEVEN, seed=6).guard,
        of(UNEVEN, window=9).guard,
        *(of(UNEVEN, tail=tail, global_batch=size).guard for tail in ("drop", "pad") for size in (8, 16)),
        of(UNEVEN, UNEVEN, weights=(1, 1)).guard,
        of(UNEVEN, UNEVEN, weights=(1, 2)).guard,
    ]
    assert len({json.dumps(guard) for guard in guards}) == len(guards)
    assert of(UNEVEN, global_batch=8).guard == of(UNEVEN, global_batch=16).guard  # batch sizes may change on the way
    assert guards[0]["order_version"] == ORDER_VERSION == 2

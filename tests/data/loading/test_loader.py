import json
import math
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.loader import EvalLoader, TrainLoader
from cromss_dist.data.loading.order import TrainingOrder
from cromss_dist.data.loading.plan import EvalPlan, Request, Source, TrainPlan
from cromss_dist.data.loading.reading import BatchMemory
from cromss_dist.data.loading.selection import Selection, select
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import BatchError, ConfigError, DownloadError, LoaderError, ShardError
from cromss_dist.schema import IMAGE_ARRAYS, Batch
from tests.data.fake_dataset import FakeDataset, StuckDataset

SIZES = (5, 1, 0, 9, 4, 8)  # 27 locations


def plan_of(*datasets: Dataset, **changes: Any) -> TrainPlan:
    sources = [Source(dataset) for dataset in datasets or (FakeDataset(SIZES),)]
    return TrainPlan(**{"sources": sources, "seed": 5, "global_batch": 8, "micro_batch": 2, "window": 4, **changes})


def take(loader: TrainLoader, num_batches: int) -> list[Batch]:
    with loader:
        return list(islice(loader, num_batches))


def samples(batches: list[Batch] | list[Request]) -> list[tuple[int, int, int]]:
    """(epoch, sample, season) of everything in the batches, in order."""
    return [row for b in batches for row in zip(b.epochs.tolist(), b.sample_ids.tolist(), b.seasons.tolist(), strict=True)]


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cromss-")]


def eventually(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def test_batches_hold_the_pixels_of_their_samples() -> None:
    dataset = FakeDataset(SIZES)
    for batch in take(TrainLoader(plan=plan_of(dataset)), 20):
        for place, (sample_id, season) in enumerate(zip(batch.sample_ids.tolist(), batch.seasons.tolist(), strict=True)):
            assert batch.keys[place] == dataset.locations[sample_id]
            for spec in IMAGE_ARRAYS:
                np.testing.assert_array_equal(batch.images[spec.name][place], dataset.pixels(sample_id, season, spec.name))
            np.testing.assert_array_equal(batch.labels[place], dataset.pixels(sample_id, season, "label"))
            assert batch.reference is not None
            np.testing.assert_array_equal(batch.reference[place], dataset.pixels(sample_id, season, "reference"))
        assert batch.weights.tolist() == [1, 1]


def test_samples_are_those_of_the_order_in_turn() -> None:
    order = TrainingOrder([np.array(SIZES)], [1], seed=5, window=4)
    expected = []
    for step in range(5):
        stretch = order.stretch(step * 8, 8)
        seasons = np.floor(Draws(5, stretch.epoch, stretch.place).season * 4).astype(int)
        expected += list(zip(stretch.epoch.tolist(), stretch.place.tolist(), seasons.tolist(), strict=True))
    assert samples(take(TrainLoader(plan=plan_of()), 20)) == expected


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 2), (8, 1)])
def test_ranks_make_up_the_same_global_batches_whatever_their_number(world_size: int, micro_batch: int) -> None:
    expected = samples(take(TrainLoader(plan=plan_of(micro_batch=8)), 3))
    steps = 8 // (world_size * micro_batch)
    plans = [plan_of(micro_batch=micro_batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    found = [samples(take(TrainLoader(plan=plan), 3 * steps)) for plan in plans]
    per_rank = 8 // world_size
    together = [row for b in range(3) for rank in found for row in rank[b * per_rank : (b + 1) * per_rank]]
    assert together == expected


def test_restoring_at_every_step_gives_the_rest_of_the_sequence() -> None:
    whole = samples(take(TrainLoader(plan=plan_of()), 40))
    states = []
    with TrainLoader(plan=plan_of()) as loader:
        for step in range(1, 41):
            next(loader)
            states.append(json.dumps(loader.state_dict()))
            assert loader.samples == step // 4 * 8  # only whole global batches of four micro batches count
    for state in states:
        with TrainLoader(plan=plan_of(micro_batch=4, world_size=2, rank=1), threads=1) as loader:
            loader.load_state_dict(json.loads(state))
            begin = loader.samples
            rest = samples(list(islice(loader, (80 - begin) // 8)))
        expected = [row for b in range(begin, 80, 8) for row in whole[b + 4 : b + 8]]
        assert rest == expected


def test_a_loader_that_is_running_goes_on_from_a_state_of_its_past() -> None:
    with TrainLoader(plan=plan_of()) as loader:
        state = loader.state_dict()
        first = samples([next(loader) for _ in range(8)])
        loader.load_state_dict(state)
        assert samples([next(loader) for _ in range(8)]) == first
    assert eventually(lambda: not reader_threads())


def test_another_global_batch_goes_on_without_a_sample_lost_or_repeated() -> None:
    with TrainLoader(plan=plan_of()) as loader:
        found = [next(loader) for _ in range(8)]
        state = loader.state_dict()
    with TrainLoader(plan=plan_of(global_batch=19, micro_batch=19)) as loader:
        loader.load_state_dict(state)
        found += [next(loader) for _ in range(2)]
    epoch_0 = [sample for epoch, sample, _ in samples(found) if epoch == 0]
    assert sorted(epoch_0) == list(range(27))
    assert len(samples(found)) == 54


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"window": 5}, "window was 4 and is 5"),
        ({"tail": "drop"}, "tail was carry and is drop; global_batch was None and is 8"),
        ({"sources": [Source(FakeDataset(SIZES, seed=1))]}, "datasets was"),
        ({"sources": [Source(FakeDataset(SIZES), select(FakeDataset(SIZES), seasons=[1]))]}, "selections was"),
        ({"sources": [Source(FakeDataset(SIZES)), Source(FakeDataset(SIZES))]}, "shares was"),
    ],
)
def test_a_state_of_another_order_is_refused_by_what_differs(changes: dict[str, Any], told: str) -> None:
    state = TrainLoader(plan=plan_of()).state_dict()
    with pytest.raises(ConfigError, match="cannot go on from this state") as caught:
        TrainLoader(plan=plan_of(**changes)).load_state_dict(state)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "state", [None, {}, {"samples": 8}, {"samples": -8, "guard": {}}, {"samples": True, "guard": {}}, {"samples": 8, "guard": 1}]
)
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ConfigError, match="no state of a loader"):
        plan_of().resumed(state)


def test_a_state_of_another_order_version_is_refused() -> None:
    state = plan_of().state(8)
    state["guard"]["order_version"] = 1
    with pytest.raises(ConfigError, match="order_version was 1 and is"):
        plan_of().resumed(state)


def test_a_start_within_a_global_batch_is_refused_where_batches_are_fixed() -> None:
    assert plan_of(start=4).start == 4
    with pytest.raises(ConfigError, match="multiple of global_batch 8"):
        plan_of(start=4, tail="pad")


@pytest.mark.parametrize(("micro_batch", "world_size"), [(3, 1), (16, 1), (2, 3), (2, 5), (1, 7), (0, 1)])
def test_batch_sizes_that_do_not_multiply_are_refused(micro_batch: int, world_size: int) -> None:
    with pytest.raises(BatchError, match="global_batch 8 is not micro_batch"):
        plan_of(micro_batch=micro_batch, world_size=world_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 0},
        {"workers": -1},
        {"prefetch": 0},
        {"lookahead": -1},
        {"timeout_s": 0},
        {"timeout_s": float("inf")},
        {"on_corrupt": "skip"},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TrainLoader(plan=plan_of(), **changes)


def test_pinned_memory_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no GPU"):
        TrainLoader(plan=plan_of(), pin_memory=True)


def test_a_mixture_has_ids_that_count_on_and_the_pixels_of_each() -> None:
    one, other = FakeDataset((6, 6)), FakeDataset((30,), seed=1)
    plan = plan_of(sources=[Source(one, select(one, seasons=[2]), weight=1), Source(other, weight=3)], global_batch=16)
    batches = take(TrainLoader(plan=plan), 16)
    for batch in batches:
        for place, (sample_id, season) in enumerate(zip(batch.sample_ids.tolist(), batch.seasons.tolist(), strict=True)):
            dataset, local = (one, sample_id) if sample_id < 12 else (other, sample_id - 12)
            np.testing.assert_array_equal(batch.labels[place], dataset.pixels(local, season, "label"))
            assert dataset is other or season == 2
    for step in range(2):  # a quarter of each global batch of 16 is the first's
        of_step = samples(batches[8 * step : 8 * step + 8])
        assert sum(sample < 12 for _, sample, _ in of_step) == 4
    assert plan.resumed(json.loads(json.dumps(plan.state(32)))).start == 32


def test_padding_has_weight_zero_and_dropping_leaves_full_batches() -> None:
    padded = take(TrainLoader(plan=plan_of(tail="pad")), 16)  # 27 samples in 4 steps of 8
    assert torch.cat([batch.weights for batch in padded]).sum() == 27
    dropped = samples(take(TrainLoader(plan=plan_of(tail="drop")), 12))
    assert len({sample for _, sample, _ in dropped}) == 24


# What reads


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_change_nothing(threads: int) -> None:
    loaders = [TrainLoader(plan=plan_of(micro_batch=8), threads=number) for number in (threads, 3)]
    for one, other in zip(*(take(loader, 8) for loader in loaders), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.labels, other.labels)
        assert all(torch.equal(one.images[name], other.images[name]) for name in one.images)


def test_no_more_is_read_than_prefetch_beyond_what_was_handed_out() -> None:
    dataset = FakeDataset(SIZES)
    with TrainLoader(plan=plan_of(dataset), prefetch=3) as loader:
        for handed_out in range(1, 6):
            next(loader)
            most = (handed_out + 3) * 2
            assert eventually(lambda most=most: len(dataset.reads) == most)  # type: ignore[misc]
    assert len(dataset.reads) == most


def test_shards_are_fetched_ahead_once_and_no_further_than_asked() -> None:
    dataset = FakeDataset([2] * 40)
    plan = plan_of(dataset, window=80)
    with TrainLoader(plan=plan, prefetch=1, lookahead=4) as loader:
        next(loader)
        ahead = list(islice(plan.requests(), 1 + 1 + 4))  # handed out, read ahead, looked ahead
        needed = {sample_id // 2 for request in ahead for sample_id in request.sample_ids.tolist()}
        assert eventually(lambda: len(dataset.fetched) == len(needed))
    assert sorted(dataset.fetched) == sorted(needed)


def test_without_lookahead_nothing_is_fetched_ahead() -> None:
    dataset = FakeDataset(SIZES)
    take(TrainLoader(plan=plan_of(dataset), lookahead=0), 4)
    assert not dataset.fetched


def test_where_all_is_local_nothing_is_looked_at_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    requests = TrainPlan.requests

    def noted(plan: TrainPlan) -> Iterator[Request]:
        for request in requests(plan):
            planned.append(request.number)
            yield request

    monkeypatch.setattr(TrainPlan, "requests", noted)
    dataset = FakeDataset(SIZES, is_local=True)
    with TrainLoader(plan=plan_of(dataset), prefetch=1, lookahead=64) as loader:
        next(loader)
    assert planned == [0, 1]
    assert not dataset.fetched


class Unreachable(FakeDataset):
    def fetch(self, shard: int) -> None:
        raise DownloadError("the server is out of reach.")


def test_an_error_of_fetching_ahead_is_not_raised_before_its_sample_is_read() -> None:
    assert len(take(TrainLoader(plan=plan_of(Unreachable(SIZES))), 20)) == 20


def test_an_error_of_a_thread_reaches_the_consumer_and_ends_the_threads() -> None:
    dataset = FakeDataset(SIZES, damaged=frozenset([7]))
    loader = TrainLoader(plan=plan_of(dataset))
    with pytest.raises(ShardError, match="0-0000007"):
        list(islice(loader, 20))
    assert eventually(lambda: not reader_threads())
    assert list(loader) == []


def test_a_stuck_thread_ends_in_an_error_that_names_what_it_reads() -> None:
    dataset = StuckDataset(SIZES, stuck_id=7)
    try:
        with pytest.raises(LoaderError, match=r"not read in 0\.5 s\. Being read: location 0-0000007, season \d \(shard 3\)"):
            take(TrainLoader(plan=plan_of(dataset), timeout_s=0.5), 20)
    finally:
        dataset.released.set()
    assert eventually(lambda: not reader_threads())


def test_closing_leaves_no_thread_and_ends_the_iteration() -> None:
    loader = TrainLoader(plan=plan_of())
    assert not reader_threads()
    next(loader)
    assert reader_threads()
    loader.close()
    assert eventually(lambda: not reader_threads())
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("damaged", [{7}, {7, 8, 9}, {26}])
def test_a_neighbour_stands_in_for_a_damaged_sample_and_the_rest_stays(damaged: set[int]) -> None:
    intact = samples(take(TrainLoader(plan=plan_of()), 28))
    dataset = FakeDataset(SIZES, damaged=frozenset(damaged))
    with TrainLoader(plan=plan_of(dataset), on_corrupt="replace") as loader:
        batches = list(islice(loader, 28))
        replaced = loader.replaced
    used = (max(damaged) + 1) % 27
    found = samples(batches)
    for (epoch, sample, season), other in zip(intact, found, strict=True):
        if sample in damaged:
            stands_in = int(np.floor(Draws(5, np.array([epoch]), np.array([used])).season[0] * 4))
            assert other == (epoch, used, stands_in)
            assert any(r.damaged == f"0-{sample:07d}" and r.epoch == epoch and r.season == season for r in replaced)
        else:
            assert other == (epoch, sample, season)
    assert len(replaced) == sum(sample in damaged for _, sample, _ in intact)
    place = next(i for i, row in enumerate(found) if row[1] == used)
    np.testing.assert_array_equal(batches[place // 2].labels[place % 2], dataset.pixels(used, 0, "label"))


def test_too_many_damaged_neighbours_stop_the_loader() -> None:
    dataset = FakeDataset(SIZES, damaged=frozenset(range(2, 12)))
    with pytest.raises(ShardError, match="0-0000002"):
        take(TrainLoader(plan=plan_of(dataset, micro_batch=8), on_corrupt="replace", threads=1), 20)


# Memory


def test_a_batch_that_is_held_is_never_written_to_again() -> None:
    with TrainLoader(plan=plan_of(), prefetch=1) as loader:
        held = [next(loader) for _ in range(6)]
        before = [batch.labels.clone() for batch in held]
        views = [batch.images["s1"][1:] for batch in held]
        bands = [view.clone() for view in views]
        addresses = {next(loader).labels.data_ptr() for _ in range(60)}
    assert all(torch.equal(batch.labels, old) for batch, old in zip(held, before, strict=True))
    del held
    assert all(torch.equal(view, old) for view, old in zip(views, bands, strict=True))
    assert len(addresses) <= 4  # one handed out, the one before, and those ahead


def test_memory_of_another_size_is_not_used_again() -> None:
    memory = BatchMemory("plain", keep=2)
    assert [memory.take(size).numel() for size in (3, 5, 3, 5)] == [3, 5, 3, 5]


def test_full_shared_memory_is_an_error_that_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr("torch.UntypedStorage._new_shared", full)
    with (
        pytest.raises(LoaderError, match=r"No space left.*data\.reading\.workers"),
        TrainLoader(plan=plan_of(), workers=2) as loader,
    ):
        next(loader)


@pytest.mark.parametrize(("prefetch", "window"), [(1, 500), (1, 5000), (8, 500), (8, 5000)])
def test_memory_is_what_selection_windows_and_batches_take(prefetch: int, window: int) -> None:
    """Catalogue L12, in bytes: an id and a flag a season for each location, 4 a sample of each lane's window, and the batches."""
    dataset = FakeDataset([500] * 100, patch_px=36)
    sample_bytes = sum(math.prod(dataset.shape(name)) for name in dataset.arrays)
    num_locations, micro_batch = len(dataset.locations), 16
    take(TrainLoader(plan=plan_of(dataset, global_batch=16, micro_batch=micro_batch)), 1)  # what is imported and cached
    tracemalloc.start()
    try:
        plan = plan_of(dataset, global_batch=16, micro_batch=micro_batch, window=window)
        with TrainLoader(plan=plan, prefetch=prefetch) as loader:
            for _ in islice(loader, 20):
                pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (lanes,) = plan.order.lanes
    lane = num_locations // lanes
    windows = lanes * (lane // (lane // window)) * 4
    batches = (prefetch + 2) * micro_batch * sample_bytes  # read ahead, handed out, and the one before
    model_bytes = num_locations * (8 + 4) + windows + batches
    assert 0.8 * model_bytes < peak_bytes < 1.2 * model_bytes


# Evaluation


def evaluate(seasons: tuple[int, ...], micro_batch: int = 4, rank: int = 0, world_size: int = 1, **of: Any) -> EvalLoader:
    dataset = FakeDataset((2, 1))
    selection = of.get("selection") or select(dataset)
    plan = EvalPlan(
        dataset=dataset, selection=selection, seasons=seasons, micro_batch=micro_batch, rank=rank, world_size=world_size
    )
    return EvalLoader(plan=plan)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 20])
def test_evaluation_covers_each_pair_once_in_as_many_batches_on_each_rank(world_size: int, micro_batch: int) -> None:
    seen = []
    lengths = set()
    for rank in range(world_size):
        loader = evaluate((0, 2, 3), micro_batch, rank, world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert len(batch.keys) == micro_batch
            kept = batch.weights > 0
            seen += list(zip(batch.sample_ids[kept].tolist(), batch.seasons[kept].tolist(), strict=True))
    assert sorted(seen) == [(sample, season) for sample in range(3) for season in (0, 2, 3)]
    assert len(lengths) == 1
    assert eventually(lambda: not reader_threads())


def test_evaluation_scores_the_seasons_that_a_filter_leaves_in_the_order_given() -> None:
    allowed = np.array([[True, False, True, False], [False, False, True, True]])
    loader = evaluate((3, 0, 2), micro_batch=5, selection=Selection(np.array([0, 2]), allowed))
    (batch,) = loader
    pairs = list(zip(batch.sample_ids.tolist(), batch.seasons.tolist(), batch.weights.tolist(), strict=True))
    assert pairs == [(0, 0, 1), (0, 2, 1), (2, 3, 1), (2, 2, 1), (2, 2, 0)]


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to score"):
        evaluate(())


@pytest.mark.parametrize("wrong", [{"seasons": (4,)}, {"seasons": (-1,)}, {"micro_batch": 0}, {"rank": 2, "world_size": 2}])
def test_evaluation_of_what_is_not_there_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is not"):
        evaluate(**{"seasons": (0,), **wrong})


def test_a_season_that_is_named_twice_would_be_scored_twice_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="Season 2 is named twice"):
        evaluate((2, 0, 2))


@pytest.mark.parametrize("other", [FakeDataset((4, 4)), FakeDataset((3,), num_seasons=2)])
def test_a_selection_of_another_dataset_is_refused(other: FakeDataset) -> None:
    dataset = FakeDataset((3,))
    with pytest.raises(ConfigError, match="selection is not of this dataset"):
        plan_of(sources=[Source(dataset, select(other))])
    with pytest.raises(ConfigError, match="selection is not of this dataset"):
        EvalPlan(dataset=dataset, selection=select(other), seasons=(0,), micro_batch=1)


@pytest.mark.parametrize("wrong", [{"rank": 1}, {"rank": -1}, {"sources": []}])
def test_training_on_what_is_not_there_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan_of(**wrong)

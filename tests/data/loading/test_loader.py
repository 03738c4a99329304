import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cromss_dist.data.loading.loader import EvalLoader, TrainLoader
from cromss_dist.data.loading.order import draws, sample_line
from cromss_dist.data.store.index import ShardIndex, open_shards
from cromss_dist.errors import BatchError, ConfigError, ShardError
from cromss_dist.schema import IMAGE_ARRAYS, Batch

IDS = np.arange(3)


@pytest.fixture
def index(shards: Path) -> ShardIndex:
    return open_shards(shards)


def train(
    index: ShardIndex, micro_batch: int = 2, rank: int = 0, world_size: int = 1, start: int = 0, threads: int = 2
) -> TrainLoader:
    return TrainLoader(
        index,
        IDS,
        seed=5,
        global_batch=8,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        threads=threads,
        prefetch=2,
        start=start,
    )


def take(loader: TrainLoader, num_batches: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(num_batches)]


def samples(batches: list[Batch]) -> list[tuple[int, int, int]]:
    """(epoch, sample, season) of everything in the batches, in order."""
    return [row for b in batches for row in zip(b.epochs.tolist(), b.sample_ids.tolist(), b.seasons.tolist(), strict=True)]


def test_batches_hold_what_the_index_reads(index: ShardIndex) -> None:
    for batch in take(train(index), 6):
        for place, (sample_id, season) in enumerate(zip(batch.sample_ids.tolist(), batch.seasons.tolist(), strict=True)):
            expected = index.read(sample_id, season, index.arrays)
            assert batch.keys[place] == index.locations[sample_id]
            for spec in IMAGE_ARRAYS:
                np.testing.assert_array_equal(batch.images[spec.name][place], expected[spec.name])
            np.testing.assert_array_equal(batch.labels[place], expected["label"])
            assert batch.reference is not None
            np.testing.assert_array_equal(batch.reference[place], expected["reference"])
        assert batch.weights.tolist() == [1, 1]


def test_samples_are_those_of_the_training_line(index: ShardIndex) -> None:
    ids, epochs = sample_line(np.arange(40), 3, seed=5)
    seasons = np.floor(draws(5, epochs, ids).season * 4).astype(int)
    assert samples(take(train(index), 20)) == list(zip(epochs.tolist(), ids.tolist(), seasons.tolist(), strict=True))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 2), (8, 1)])
def test_ranks_make_up_the_same_global_batches_whatever_their_number(
    index: ShardIndex, world_size: int, micro_batch: int
) -> None:
    expected = samples(take(train(index, micro_batch=8), 3))
    steps = 8 // (world_size * micro_batch)
    found = [samples(take(train(index, micro_batch, rank, world_size), 3 * steps)) for rank in range(world_size)]
    per_rank = 8 // world_size
    together = [row for b in range(3) for rank in found for row in rank[b * per_rank : (b + 1) * per_rank]]
    assert together == expected


def test_going_on_from_any_state_gives_the_rest_of_the_sequence(index: ShardIndex) -> None:
    whole = samples(take(train(index), 20))
    with train(index) as loader:
        for step in range(1, 21):
            next(loader)
            assert loader.state == step // 4 * 8  # only whole global batches of four micro batches count
    for state in range(0, 40, 8):
        assert samples(take(train(index, start=state), (40 - state) // 2)) == whole[state:]


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_change_nothing(index: ShardIndex, threads: int) -> None:
    for one, other in zip(take(train(index, threads=threads), 8), take(train(index, threads=3), 8), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.labels, other.labels)
        assert all(torch.equal(one.images[name], other.images[name]) for name in one.images)


@pytest.mark.parametrize(("micro_batch", "world_size"), [(3, 1), (16, 1), (2, 3)])
def test_batch_sizes_that_do_not_multiply_are_refused(index: ShardIndex, micro_batch: int, world_size: int) -> None:
    with pytest.raises(BatchError, match="global_batch 8 is not micro_batch"):
        train(index, micro_batch=micro_batch, world_size=world_size)


def test_a_start_within_a_global_batch_is_refused(index: ShardIndex) -> None:
    with pytest.raises(ConfigError, match="multiple of global_batch 8"):
        train(index, start=4)


def test_an_error_of_a_thread_reaches_the_consumer_and_ends_the_threads(index: ShardIndex, shards: Path) -> None:
    (shards / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"shard-000001\.tar"):
        take(train(index), 20)
    assert not reader_threads()


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cromss-reader")]


def test_closing_leaves_no_thread_and_ends_the_iteration(index: ShardIndex) -> None:
    loader = train(index)
    next(loader)
    assert reader_threads()
    loader.close()
    assert not reader_threads()
    with pytest.raises(StopIteration):
        next(loader)


def evaluate(index: ShardIndex, seasons: tuple[int, ...], micro_batch: int, rank: int, world_size: int) -> EvalLoader:
    return EvalLoader(index, IDS, seasons, micro_batch, rank, world_size, threads=2, prefetch=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 20])
def test_evaluation_covers_each_pair_once_in_as_many_batches_on_each_rank(
    index: ShardIndex, world_size: int, micro_batch: int
) -> None:
    seen = []
    lengths = set()
    for rank in range(world_size):
        loader = evaluate(index, (0, 2, 3), micro_batch, rank, world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert len(batch.keys) == micro_batch
            kept = batch.weights > 0
            seen += list(zip(batch.sample_ids[kept].tolist(), batch.seasons[kept].tolist(), strict=True))
    assert sorted(seen) == [(sample, season) for sample in range(3) for season in (0, 2, 3)]
    assert len(lengths) == 1
    assert not reader_threads()


def test_evaluation_of_nothing_is_refused(index: ShardIndex) -> None:
    with pytest.raises(ConfigError, match="nothing to score"):
        evaluate(index, (), 1, 0, 1)

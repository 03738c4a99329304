"""Batches for training and evaluation, read ahead by threads; the host side, without a device and without transforms.

Which sample is where is decided in `order`, so a loader's whole state is one integer, and the same global batches come
out whatever the number of ranks, threads or restarts.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from cromss_dist.data.loading.order import IntArray, draws, sample_line
from cromss_dist.data.store.index import ShardIndex
from cromss_dist.errors import BatchError, ConfigError
from cromss_dist.schema import LABEL_ARRAY, REFERENCE_ARRAY, Batch


@dataclass(frozen=True)
class _Request:
    """A micro batch to be read: B samples."""

    sample_ids: IntArray
    epochs: IntArray
    seasons: IntArray
    weights: npt.NDArray[np.float32]


class _ReadAhead:
    """Reads requests in threads, at most `prefetch` micro batches ahead, and hands them out in order.

    An exception in a thread is raised where its batch would have come; after `close` no thread is left.
    """

    def __init__(self, index: ShardIndex, requests: Iterator[_Request], threads: int, prefetch: int) -> None:
        if threads < 1 or prefetch < 1:
            raise ConfigError(f"data.reader_threads={threads} and data.prefetch_batches={prefetch} must be 1 or more.")
        self.index = index
        self.requests = requests
        self.prefetch = prefetch
        self.specs = index.images
        read = {*(spec.name for spec in self.specs), LABEL_ARRAY, REFERENCE_ARRAY}
        self.arrays = [name for name in index.arrays if name in read]
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="cromss-reader")
        self.pending: deque[tuple[_Request, dict[str, npt.NDArray[np.uint8]], list[Future[None]]]] = deque()

    def __next__(self) -> Batch:
        while len(self.pending) <= self.prefetch and (request := next(self.requests, None)) is not None:
            self._submit(request)
        if not self.pending:
            self.close()
            raise StopIteration
        request, buffers, futures = self.pending.popleft()
        try:
            for future in futures:
                future.result()
        except BaseException:
            self.close()
            raise
        reference = buffers.get(REFERENCE_ARRAY)
        return Batch(
            keys=tuple(self.index.locations[i] for i in request.sample_ids),
            sample_ids=torch.from_numpy(request.sample_ids),
            epochs=torch.from_numpy(request.epochs),
            seasons=torch.from_numpy(request.seasons),
            weights=torch.from_numpy(request.weights),
            specs=self.specs,
            images={spec.name: torch.from_numpy(buffers[spec.name]) for spec in self.specs},
            labels=torch.from_numpy(buffers[LABEL_ARRAY]),
            reference=None if reference is None else torch.from_numpy(reference),
        )

    def _submit(self, request: _Request) -> None:
        size = len(request.sample_ids)
        buffers = {name: np.empty((size, *self.index.shape(name)), np.uint8) for name in self.arrays}

        def fill(place: int) -> None:
            sample = self.index.read(int(request.sample_ids[place]), int(request.seasons[place]), self.arrays)
            for name, array in sample.items():
                buffers[name][place] = array

        self.pending.append((request, buffers, [self.pool.submit(fill, place) for place in range(size)]))

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.pending.clear()
        self.requests = iter(())


class _Loader:
    """An iterator of batches that owns threads: use it as a context manager, or call `close`."""

    _reader: _ReadAhead

    def close(self) -> None:
        """Stops reading ahead and ends the threads; the iterator is exhausted then."""
        self._reader.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False)
class TrainLoader(_Loader):
    """An endless iterator of one rank's micro batches.

    Global batch b is the samples b * global_batch .. (b + 1) * global_batch - 1 of the training line; rank r has the
    r-th contiguous slice of it, in `accumulation_steps` micro batches. Every rank has as many as every other.

    Args:
        index: The shards.
        ids: int64: indices into `index.locations` of the training locations.
        seed: Of the run.
        global_batch: Samples of one optimizer step over all ranks.
        micro_batch: Samples of one forward pass on one rank.
        rank: Of this process.
        world_size: Number of ranks.
        threads: Threads that read.
        prefetch: Micro batches read ahead.
        start: Samples of the training line consumed before; a multiple of `global_batch`.

    Raises:
        BatchError: `global_batch` is not micro_batch x world_size x a whole number.
        ConfigError: there is no training location, or `start` is within a global batch.
    """

    index: ShardIndex
    ids: IntArray
    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    threads: int
    prefetch: int
    start: int = 0
    state: int = field(init=False)
    """Samples of the training line whose global batch was handed out to its last micro batch: the next `start`."""

    def __post_init__(self) -> None:
        self.accumulation_steps, rest = divmod(self.global_batch, self.micro_batch * self.world_size)
        if rest or self.accumulation_steps < 1:
            raise BatchError(
                f"global_batch {self.global_batch} is not micro_batch {self.micro_batch} x world size {self.world_size} x a "
                f"whole number of accumulation steps; set it to a multiple of {self.micro_batch * self.world_size}."
            )
        if len(self.ids) == 0 or self.start < 0 or self.start % self.global_batch:
            raise ConfigError(
                f"{len(self.ids)} training locations and start={self.start}; give at least one location and a start that "
                f"is a multiple of global_batch {self.global_batch}: another global batch cannot go on from there."
            )
        self.state = self.start
        self._micro_step = 0
        self._reader = _ReadAhead(self.index, self._requests(), self.threads, self.prefetch)

    def _requests(self) -> Iterator[_Request]:
        first = self.start + self.rank * (self.global_batch // self.world_size)
        while True:
            for step in range(self.accumulation_steps):
                positions = first + step * self.micro_batch + np.arange(self.micro_batch)
                samples, epochs = sample_line(positions, len(self.ids), self.seed)
                sample_ids = self.ids[samples]
                season_draws = draws(self.seed, epochs, sample_ids).season
                seasons = np.floor(season_draws * self.index.num_seasons).astype(np.int64)
                yield _Request(sample_ids, epochs, seasons, np.ones(self.micro_batch, np.float32))
            first += self.global_batch

    def __next__(self) -> Batch:
        batch = super().__next__()
        self._micro_step += 1
        self.state = self.start + self._micro_step // self.accumulation_steps * self.global_batch
        return batch


@dataclass(eq=False)
class EvalLoader(_Loader):
    """Each (location, season) pair once over all ranks, in a fixed order; then it is exhausted.

    Every rank has the same number of batches, all of them full: samples of weight 0 fill up the last.

    Args:
        index: The shards.
        ids: int64: indices into `index.locations` of the locations to score.
        seasons: Seasons of each location to score.
        micro_batch: Samples of one forward pass on one rank.
        rank: Of this process.
        world_size: Number of ranks.
        threads: Threads that read.
        prefetch: Batches read ahead.
    """

    index: ShardIndex
    ids: IntArray
    seasons: Sequence[int]
    micro_batch: int
    rank: int
    world_size: int
    threads: int
    prefetch: int

    def __post_init__(self) -> None:
        if len(self.ids) == 0 or len(self.seasons) == 0:
            raise ConfigError(
                f"{len(self.ids)} locations x {len(self.seasons)} seasons leave nothing to score; give at least one."
            )
        self._reader = _ReadAhead(self.index, self._requests(), self.threads, self.prefetch)

    def __len__(self) -> int:
        return -(-len(self.ids) * len(self.seasons) // (self.micro_batch * self.world_size))

    def _requests(self) -> Iterator[_Request]:
        num_pairs = len(self.ids) * len(self.seasons)
        for batch in range(len(self)):
            places = (batch * self.world_size + self.rank) * self.micro_batch + np.arange(self.micro_batch)
            weights = (places < num_pairs).astype(np.float32)
            places = np.minimum(places, num_pairs - 1)
            yield _Request(
                sample_ids=self.ids[places // len(self.seasons)],
                epochs=np.zeros(self.micro_batch, np.int64),
                seasons=np.asarray(self.seasons, np.int64)[places % len(self.seasons)],
                weights=weights,
            )

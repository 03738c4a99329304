"""Reads the micro batches of a plan ahead of who uses them, by threads of this process."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import get_worker_info

from cromss_dist.data.loading.plan import Plan, Request
from cromss_dist.data.loading.reading import (
    CLOSING_S,
    BatchMemory,
    BatchReader,
    DaemonThreads,
    OnCorrupt,
    Reading,
    Replacement,
    batch_of,
)
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import ConfigError, LoaderError
from cromss_dist.schema import Batch

FETCH_THREADS = 4
MAX_TIMEOUT_S = 1e6  # clocks overflow far above that


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How micro batches are read; see `TrainLoader`."""

    threads: int
    workers: int
    prefetch: int
    lookahead: int
    timeout_s: float
    on_corrupt: OnCorrupt
    pin_memory: bool

    def __post_init__(self) -> None:
        lowest = {"threads": 1, "workers": 0, "prefetch": 1, "lookahead": 0, "timeout_s": 0.001}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed; give at least {least}.")
        if self.timeout_s > MAX_TIMEOUT_S:
            raise ConfigError(f"timeout_s={self.timeout_s} is not allowed; give at most {MAX_TIMEOUT_S:g} s.")
        if self.on_corrupt not in ("stop", "replace"):
            raise ConfigError(f"on_corrupt={self.on_corrupt!r} is not known; give 'stop' or 'replace'.")
        if self.pin_memory and not torch.cuda.is_available():
            raise ConfigError("pin_memory=True, but torch finds no GPU here that would copy from such memory; set it to False.")


def memory_of(settings: ReadSettings, ahead: int) -> BatchMemory:
    """Memory for the batches handed out while `ahead` others are being read."""
    return BatchMemory("pinned" if settings.pin_memory else "plain", keep=ahead + 2)  # the consumer holds one or two


class ReadAhead(Protocol):
    """Hands out a plan's micro batches in order."""

    def next(self) -> tuple[Batch, list[Replacement]]:
        """The next one, and what stands in for damaged samples of it. Raises StopIteration behind the last."""

    def close(self) -> None:
        """Ends what reads."""


class FetchedAhead:
    """Passes requests on, and has the shards of those that follow fetched meanwhile, where they are not on this node.

    Args:
        dataset: Of the requests.
        requests: To pass on.
        lookahead: Requests whose shards are asked for before they are passed on.
    """

    def __init__(self, dataset: Dataset, requests: Iterator[Request], lookahead: int) -> None:
        lookahead = 0 if dataset.is_local else lookahead
        self._dataset, self._requests, self._lookahead = dataset, requests, lookahead
        self._ends = np.cumsum(dataset.shard_sizes)
        self._ahead: deque[tuple[Request, list[int]]] = deque()
        self._needed: Counter[int] = Counter()  # shard -> how many of the requests ahead need it
        self._threads = DaemonThreads(FETCH_THREADS if lookahead else 0, "cromss-fetcher")

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        for request in islice(self._requests, self._lookahead + 1 - len(self._ahead)):
            shards = np.unique(np.searchsorted(self._ends, request.sample_ids, side="right")).tolist() if self._lookahead else []
            for shard in shards:
                if shard not in self._needed:  # else it was asked for
                    self._threads.submit(partial(self._dataset.fetch, shard))  # an error comes again where its sample is read
            self._needed.update(shards)
            self._ahead.append((request, shards))
        if not self._ahead:
            raise StopIteration
        request, shards = self._ahead.popleft()
        for shard in shards:
            self._needed[shard] -= 1
            if not self._needed[shard]:
                del self._needed[shard]
        return request

    def close(self) -> None:
        """Forgets what is not being fetched."""
        self._threads.close(wait_s=0)


class ThreadReadAhead:
    """By threads of this process, at most `prefetch` micro batches beyond the one handed out."""

    def __init__(self, plan: Plan, settings: ReadSettings) -> None:
        self._requests = FetchedAhead(plan.dataset, plan.requests(), settings.lookahead)
        self._plan = plan
        self._reader = BatchReader(plan, settings.threads, settings.on_corrupt)
        self._memory = memory_of(settings, settings.prefetch + 1)
        self._prefetch, self._timeout_s = settings.prefetch, settings.timeout_s
        self._closing_s = CLOSING_S
        self._readings: deque[Reading] = deque()

    def next(self) -> tuple[Batch, list[Replacement]]:
        """See `ReadAhead`."""
        for request in islice(self._requests, self._prefetch + 1 - len(self._readings)):
            self._readings.append(self._reader.begin(request, self._memory.take(self._reader.piece_size(request))))
        if not self._readings:
            raise StopIteration
        reading = self._readings.popleft()
        try:
            self._reader.finish(reading, self._timeout_s)
        except LoaderError:
            self._closing_s = 0  # it was waited for long enough
            raise
        batch = batch_of(self._plan, reading.request, reading.piece)
        return batch.pin_memory() if self._memory.kind == "pinned" else batch, reading.replaced

    def close(self) -> None:
        """See `ReadAhead`."""
        self._requests.close()
        self._reader.close(self._closing_s)
        self._readings.clear()


def read_in_turn(plan: Plan, threads: int, lookahead: int, on_corrupt: OnCorrupt) -> Iterator[Batch]:
    """The micro batches that this process makes for a `DataLoader` of torch, one at a time.

    Process w of W makes w, w + W, ...; the DataLoader takes one of each in turn, and so in the order of the plan, whatever
    W is. In the process that owns the DataLoader, it is all of them.
    """
    worker = get_worker_info()
    first, every = (worker.id, worker.num_workers) if worker else (0, 1)
    requests = FetchedAhead(plan.dataset, plan.requests(first, every), -(-lookahead // every))
    memory = BatchMemory("shared" if worker else "plain", keep=2)
    with BatchReader(plan, threads, on_corrupt) as reader:
        try:
            for request in requests:
                reading = reader.begin(request, memory.take(reader.piece_size(request)))
                reader.finish(reading)
                yield batch_of(plan, request, reading.piece)
        finally:
            requests.close()

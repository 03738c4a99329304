"""Reads the micro batches of a plan ahead of who uses them, by threads of this process or by other processes."""

import multiprocessing
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cromss_dist.data.loading.plan import Plan, Request
from cromss_dist.data.loading.reading import CLOSING_S, BatchReader, DaemonThreads, Memory, OnCorrupt, Reading, Replacement
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import ConfigError, CromssError, LoaderError
from cromss_dist.schema import Batch

FETCH_THREADS = 4
POLL_S = 2.0  # how often the worker processes are looked at while nothing comes
STARTING_S = 60.0  # more than its time for each worker's first batch, since it has to import torch
NUM_KEYS_SHOWN = 3


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
        if self.on_corrupt not in ("stop", "replace"):
            raise ConfigError(f"on_corrupt={self.on_corrupt!r} is not known; give 'stop' or 'replace'.")
        if self.pin_memory and not torch.cuda.is_available():
            raise ConfigError("pin_memory=True, but torch finds no GPU here that would copy from such memory; set it to False.")


class ReadAhead(Protocol):
    """Hands out a plan's micro batches in order."""

    def next(self) -> tuple[Batch, list[Replacement]]:
        """The next one, and what stands in for damaged samples of it. Raises StopIteration behind the last."""

    def close(self) -> None:
        """Ends what reads."""


class FetchedAhead:
    """Passes requests on, and has the shards of those that follow fetched meanwhile.

    Args:
        dataset: Of the requests.
        requests: To pass on.
        lookahead: Requests whose shards are asked for before they are passed on.
    """

    def __init__(self, dataset: Dataset, requests: Iterator[Request], lookahead: int) -> None:
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
        memory: Memory = "pinned" if settings.pin_memory else "plain"
        self._reader = BatchReader(plan, settings.threads, settings.on_corrupt, memory, settings.prefetch + 1)
        self._prefetch, self._timeout_s = settings.prefetch, settings.timeout_s
        self._closing_s = CLOSING_S
        self._readings: deque[Reading] = deque()

    def next(self) -> tuple[Batch, list[Replacement]]:
        """See `ReadAhead`."""
        for request in islice(self._requests, self._prefetch + 1 - len(self._readings)):
            self._readings.append(self._reader.begin(request))
        if not self._readings:
            raise StopIteration
        reading = self._readings.popleft()
        try:
            return self._reader.finish(reading, self._timeout_s), reading.replaced
        except LoaderError:
            self._closing_s = 0  # it was waited for long enough
            raise

    def close(self) -> None:
        """See `ReadAhead`."""
        self._requests.close()
        self._reader.close(self._closing_s)
        self._readings.clear()


def read_in_turn(plan: Plan, threads: int, lookahead: int, on_corrupt: OnCorrupt) -> Iterator[tuple[Batch, list[Replacement]]]:
    """The micro batches that this process makes for a `DataLoader` of torch, one at a time.

    Process w of W makes w, w + W, ...; the DataLoader takes one of each in turn, and so in the order of the plan, whatever
    W is. In the process that owns the DataLoader, it is all of them.
    """
    worker = get_worker_info()
    first, every = (worker.id, worker.num_workers) if worker else (0, 1)
    requests = FetchedAhead(plan.dataset, plan.requests(first, every), -(-lookahead // every))
    with BatchReader(plan, threads, on_corrupt, "shared" if worker else "plain", ahead=1) as reader:
        try:
            for request in requests:
                reading = reader.begin(request)
                yield reader.finish(reading), reading.replaced
        finally:
            requests.close()


class _WorkerStream(IterableDataset[Any]):
    """What a worker sends: batches, and at last the error that ended it, which DataLoader would put into a text."""

    def __init__(self, plan: Plan, settings: ReadSettings) -> None:
        self._plan, self._settings = plan, settings

    def __iter__(self) -> Iterator[tuple[Batch, list[Replacement]] | Exception]:
        try:
            settings = self._settings
            yield from read_in_turn(self._plan, settings.threads, settings.lookahead, settings.on_corrupt)
        except Exception as error:  # noqa: BLE001 - raised by the process that reads the queue
            if not isinstance(error, CromssError):
                error.add_note(traceback.format_exc())
            yield error


class WorkerReadAhead:
    """By worker processes through torch's `DataLoader`, each `prefetch` micro batches ahead.

    A worker that died, and one that gives nothing for `timeout_s`, ends in a LoaderError that says which.
    """

    def __init__(self, plan: Plan, settings: ReadSettings) -> None:
        # Not fork: a process with threads, as one that trains has, may not be forked.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])  # so that torch is imported once
        self._plan, self._workers, self._timeout_s = plan, settings.workers, settings.timeout_s
        self._poll_s = min(POLL_S, self._timeout_s / 10)
        self._number = 0
        loader = DataLoader(
            _WorkerStream(plan, settings),
            batch_size=None,
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch,
            timeout=self._poll_s,
            multiprocessing_context=context,
            pin_memory=settings.pin_memory,
        )
        iterator = iter(loader)
        self._processes: list[BaseProcess] = list(iterator._workers)  # type: ignore[attr-defined]  # there is no public way
        self._batches: Iterator[Any] = iterator

    def next(self) -> tuple[Batch, list[Replacement]]:
        """See `ReadAhead`."""
        began = time.monotonic()
        limit_s = self._timeout_s + (STARTING_S if self._number < self._workers else 0)
        while True:
            try:
                item = next(self._batches)
                break
            except RuntimeError as error:
                if dead := [number for number, process in enumerate(self._processes) if not process.is_alive()]:
                    raise self._died(dead[0]) from None
                if "timed out" not in str(error):
                    raise
                if time.monotonic() - began > limit_s - self._poll_s:
                    raise self._stuck() from None
        if isinstance(item, Exception):
            raise item
        self._number += 1
        batch, replaced = item
        return batch, replaced

    def close(self) -> None:
        """See `ReadAhead`."""
        # One that is stopped or stuck would not heed the wish to end, and nothing that they hold is worth it.
        for process in self._processes:
            process.kill()
        self._batches = iter(())

    def _died(self, worker: int) -> LoaderError:
        process = self._processes[worker]
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return LoaderError(
            f"Worker {worker} (process {process.pid}) {how} while samples were read. SIGKILL is mostly the system's, out of "
            "memory: lower data.reading.workers or prefetch_batches. The run can go on from its last state."
        )

    def _stuck(self) -> LoaderError:
        worker = self._number % self._workers
        request = next(self._plan.requests(self._number))
        keys = [self._plan.dataset.locations[i] for i in request.sample_ids.tolist()]
        told = ", ".join(keys[:NUM_KEYS_SHOWN]) + (", ..." if len(keys) > NUM_KEYS_SHOWN else "")
        return LoaderError(
            f"Worker {worker} (process {self._processes[worker].pid}) did not give micro batch {self._number} in "
            f"{self._timeout_s:g} s; it reads the locations {told}. See whether it is stopped and whether its disk or server "
            "answers, or allow more time (data.reading.timeout_s)."
        )

"""Fills micro batches with verified pixels, by a few threads, straight into the memory that the batch lives in."""

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Literal, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cromss_dist.data.loading.plan import Plan, Request
from cromss_dist.data.sample import Uint8Array
from cromss_dist.errors import LoaderError, ShardError
from cromss_dist.schema import LABEL_ARRAY, REFERENCE_ARRAY, Batch

logger = logging.getLogger(__name__)

Memory: TypeAlias = Literal["plain", "pinned", "shared"]
OnCorrupt: TypeAlias = Literal["stop", "replace"]

ALIGNMENT = 64  # bytes; a cache line
CLOSING_S = 5.0  # for a thread to finish the sample it is at


@dataclass(frozen=True)
class Replacement:
    """A damaged sample and the one that stands in for it."""

    epoch: int
    damaged: str  # location key
    season: int
    reason: str
    used: str  # location key


class DaemonThreads:
    """A few threads that do one thing after another.

    Departs: `ThreadPoolExecutor` has the interpreter wait for its threads at exit, for ever if one hangs in a system call.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._work: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Has a thread call `work`; the future holds its exception."""
        future: Future[None] = Future()
        self._work.put((work, future))
        return future

    def close(self, wait_s: float) -> None:
        """Forgets what has not begun, and waits at most `wait_s` for what has."""
        with suppress(Empty):
            while True:
                self._work.get_nowait()
        for _ in self._threads:
            self._work.put(None)
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the future
                future.set_exception(error)
            else:
                future.set_result(None)
            del item, work, future  # or the last batch would stay in memory as long as the thread has nothing to do


Shapes: TypeAlias = dict[str, tuple[int, ...]]


def shapes_of(plan: Plan) -> Shapes:
    """Name and shape of the arrays that a batch has of each sample."""
    wanted = {*(spec.name for spec in plan.images), LABEL_ARRAY, REFERENCE_ARRAY}
    return {name: plan.dataset.shape(name) for name in plan.dataset.arrays if name in wanted}


def piece_size(shapes: Shapes, num_samples: int) -> int:
    """Bytes of memory that a batch needs."""
    return sum(-(-num_samples * math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes.values())


def lay_out(piece: Tensor, shapes: Shapes, num_samples: int) -> dict[str, Tensor]:
    """A batch's arrays, uint8 (num_samples, *shape), one behind another in a piece of memory."""
    arrays, begin = {}, 0
    for name, shape in shapes.items():
        arrays[name] = piece[begin : begin + num_samples * math.prod(shape)].view(num_samples, *shape)
        begin += piece_size({name: shape}, num_samples)
    return arrays


class BatchMemory:
    """Memory for batches, one piece each. Plain memory is used again once nothing refers to it any more.

    Fresh memory is mapped page by page as it is first written, which takes longer than reading the samples into it.

    Args:
        kind: 'pinned' can be copied to a GPU while it computes; 'shared' goes to another process without a copy.
        keep: Pieces of plain memory that are kept for use again.
    """

    def __init__(self, kind: Memory, keep: int) -> None:
        self.kind = kind
        self._unused: deque[Uint8Array] = deque(maxlen=keep)

    def take(self, size: int) -> Tensor:
        """Uninitialised memory: uint8 (size,). Raises LoaderError where there is no shared memory left."""
        if self.kind == "pinned":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        if self.kind == "shared":  # as default_collate does; `share_memory_` would copy what is not yet written
            try:
                storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise LoaderError(
                    f"There is no shared memory for a batch of {size / 2**20:.3g} MiB ({error}): lower data.reading.workers or "
                    "prefetch_batches, or give the container more (docker run --shm-size)."
                ) from error
            return torch.empty(0, dtype=torch.uint8).set_(storage)
        try:
            piece = self._unused.pop()
        except IndexError:
            piece = np.empty(size, np.uint8)
        if piece.size != size:  # only where a plan's batches are not all of one size
            piece = np.empty(size, np.uint8)
        lent = piece[:]  # the tensors of a batch keep this one, whoever holds them
        weakref.finalize(lent, self._unused.append, piece).atexit = False
        return torch.from_numpy(lent)


def batch_of(plan: Plan, request: Request, piece: Tensor) -> Batch:
    """The batch whose pixels lie in a piece of memory."""
    arrays = lay_out(piece, shapes_of(plan), len(request.sample_ids))
    return Batch(
        keys=tuple(plan.dataset.locations[i] for i in request.sample_ids.tolist()),
        sample_ids=torch.from_numpy(request.sample_ids),
        epochs=torch.from_numpy(request.epochs),
        seasons=torch.from_numpy(request.seasons),
        weights=torch.from_numpy(request.weights),
        specs=plan.images,
        images={spec.name: arrays[spec.name] for spec in plan.images},
        labels=arrays[LABEL_ARRAY],
        reference=arrays.get(REFERENCE_ARRAY),
    )


@dataclass
class Reading:
    """A micro batch on its way into a piece of memory."""

    request: Request
    piece: Tensor
    parts: list[Future[None]]
    replaced: list[Replacement]


class BatchReader:
    """Reads micro batches of a plan; also several at a time, which its threads then do one after another.

    Args:
        plan: What is read.
        threads: That read and check.
        on_corrupt: What a damaged sample does: 'stop' raises its error, 'replace' has a neighbour stand in for it.
    """

    def __init__(self, plan: Plan, threads: int, on_corrupt: OnCorrupt) -> None:
        self._plan, self._dataset, self._on_corrupt = plan, plan.dataset, on_corrupt
        self._shapes = shapes_of(plan)
        self._num_threads = threads
        self._threads = DaemonThreads(threads, "cromss-reader")
        self._at_work: dict[int, tuple[int, int]] = {}

    def piece_size(self, request: Request) -> int:
        """Bytes that a micro batch needs."""
        return piece_size(self._shapes, len(request.sample_ids))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, wait_s: float = CLOSING_S) -> None:
        """Ends the threads."""
        self._threads.close(wait_s)

    def begin(self, request: Request, piece: Tensor) -> Reading:
        """Has the threads read a micro batch into memory of `piece_size`."""
        reading = Reading(request, piece, [], [])
        num_samples = len(request.sample_ids)
        arrays = {name: values.numpy() for name, values in lay_out(piece, self._shapes, num_samples).items()}
        for places in np.array_split(np.arange(num_samples), self._num_threads):
            if len(places):
                reading.parts.append(self._threads.submit(partial(self.fill, reading, arrays, places.tolist())))
        return reading

    def finish(self, reading: Reading, timeout_s: float | None = None) -> None:
        """Waits for a micro batch; its request then says what stands in for damaged samples.

        Raises:
            LoaderError: it takes longer than `timeout_s`; says what hangs.
            ShardError: a sample is damaged.
            DownloadError: a shard cannot be fetched.
        """
        done, waiting = wait(reading.parts, timeout_s, return_when=FIRST_EXCEPTION)
        for part in done:
            part.result()
        if waiting:
            at_work = ", ".join(self._told(*what) for what in list(self._at_work.values())) or "the threads do not answer"
            raise LoaderError(
                f"Micro batch {reading.request.number} was not read in {timeout_s:g} s. Being read: {at_work}. See whether its "
                "disk or server answers, or allow more time (data.reading.timeout_s)."
            )
        reading.replaced.sort(key=lambda replacement: (replacement.epoch, replacement.damaged))

    def fill(self, reading: Reading, arrays: dict[str, Uint8Array], places: Sequence[int]) -> None:
        """Reads the samples at some places of a batch; a thread's part."""
        request, me = reading.request, threading.get_ident()
        try:
            for place in places:
                sample_id, season = int(request.sample_ids[place]), int(request.seasons[place])
                self._at_work[me] = sample_id, season
                into = {name: values[place] for name, values in arrays.items()}
                try:
                    self._dataset.read_into(sample_id, season, into)
                except ShardError as error:
                    if self._on_corrupt == "stop":
                        raise
                    self._replace(reading, place, into, error)
        finally:
            self._at_work.pop(me, None)

    def _replace(self, reading: Reading, place: int, into: dict[str, Uint8Array], error: ShardError) -> None:
        request = reading.request
        sample_id, season, epoch = int(request.sample_ids[place]), int(request.seasons[place]), int(request.epochs[place])
        for other_id, other_season in self._plan.neighbours(sample_id, epoch):
            try:
                self._dataset.read_into(other_id, other_season, into)
            except ShardError:
                continue
            keys = self._dataset.locations
            request.sample_ids[place], request.seasons[place] = other_id, other_season
            reading.replaced.append(Replacement(epoch, keys[sample_id], season, str(error), keys[other_id]))
            logger.warning("%s is read instead of %s: %s", keys[other_id], keys[sample_id], error)
            return
        raise error

    def _told(self, sample_id: int, season: int) -> str:
        shard = int(np.searchsorted(np.cumsum(self._dataset.shard_sizes), sample_id, side="right"))
        return f"location {self._dataset.locations[sample_id]}, season {season} (shard {shard})"

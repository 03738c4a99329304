"""Reads the micro batches of a plan ahead by other processes, which put pixels into memory that they share with this one.

Departs: torch's DataLoader asks the worker for a file descriptor whenever it takes a batch, without a time limit, so that a
worker that hangs hangs it, too; and it maps new memory for each batch, which takes several times as long as a copy.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic

import torch
from torch import Tensor

from cromss_dist.data.loading.plan import Plan, Request
from cromss_dist.data.loading.read_ahead import FetchedAhead, ReadSettings, memory_of
from cromss_dist.data.loading.reading import BatchMemory, BatchReader, Replacement, batch_of, piece_size, shapes_of
from cromss_dist.errors import CromssError, LoaderError
from cromss_dist.schema import Batch

STARTING_S = 60.0  # more than its time for each worker's first batch, since it has to import torch
NUM_KEYS_SHOWN = 3


class WorkerReadAhead:
    """By `workers` processes, each at most `prefetch` micro batches ahead; process w of W makes w, w + W, ... of them.

    A worker reads into a slot of shared memory when it is told its number, and tells when it is done; the batch is copied
    out, so that whoever holds it holds no slot.
    """

    def __init__(self, plan: Plan, settings: ReadSettings) -> None:
        # Not fork: a process with threads, as one that trains has, may not be forked.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])  # so that torch is imported once
        self._plan, self._settings = plan, settings
        self._memory = memory_of(settings, ahead=0)
        self._number = 0
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        shared = BatchMemory("shared", keep=0)
        size = piece_size(shapes_of(plan), len(next(plan.requests()).sample_ids))
        self._slots = [[shared.take(size) for _ in range(settings.prefetch)] for _ in range(settings.workers)]
        for worker, slots in enumerate(self._slots):
            mine, its = context.Pipe()
            process = context.Process(
                target=_work, args=(plan, settings, worker, slots, its), name=f"cromss-worker-{worker}", daemon=True
            )
            try:
                process.start()
                its.close()  # so that the process sees when this one is gone
                for slot in range(settings.prefetch):
                    mine.send(slot)
            except BrokenPipeError as error:  # it did not live to be told what to do
                self.close()
                raise LoaderError(
                    f"Worker {worker} ended before it began, see its output. Workers import the script that starts them: put "
                    'what it does under `if __name__ == "__main__":`, or read by threads alone (workers=0).'
                ) from error
            self._connections.append(mine)
            self._processes.append(process)

    def next(self) -> tuple[Batch, list[Replacement]]:
        """See `ReadAhead`."""
        worker = self._number % self._settings.workers
        connection = self._connections[worker]
        self._wait_for(worker)
        try:
            answer: tuple[int, Request, list[Replacement]] | CromssError | None = connection.recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        if answer is None:
            raise StopIteration
        if isinstance(answer, CromssError):
            raise answer
        slot, request, replaced = answer
        shared = self._slots[worker][slot]
        piece = self._memory.take(len(shared))
        piece.copy_(shared)
        with suppress(OSError):  # where it ended or died: the batch is whole, and its next turn tells
            connection.send(slot)
        self._number += 1
        batch = batch_of(self._plan, request, piece)
        return batch.pin_memory() if self._memory.kind == "pinned" else batch, replaced

    def close(self) -> None:
        """See `ReadAhead`."""
        # One that is stopped or stuck would not heed a wish to end, and nothing that they hold is worth it.
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.kill()
            connection.close()
            process.join()
            process.close()
        self._processes, self._connections, self._slots = [], [], []

    def _wait_for(self, worker: int) -> None:
        """Returns when a worker has an answer, or the end of it. Raises LoaderError if it has none in time, or any died."""
        deadline = monotonic() + self._settings.timeout_s + (STARTING_S if self._number < self._settings.workers else 0)
        connection = self._connections[worker]
        while not connection.poll():
            sentinels = {process.sentinel: i for i, process in enumerate(self._processes) if process.exitcode != 0}
            ready = wait([connection, *sentinels], max(0.0, deadline - monotonic()))
            if not ready:
                raise self._stuck(worker)
            dead = [sentinels[item] for item in ready if isinstance(item, int) and self._processes[sentinels[item]].exitcode]
            if dead and not connection.poll():
                raise self._died(dead[0])

    def _died(self, worker: int) -> LoaderError:
        process = self._processes[worker]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}, see its output"
        return LoaderError(
            f"Worker {worker} (process {process.pid}) {how}. SIGKILL is mostly the system's, out of memory: lower "
            "data.reading.workers or prefetch_batches. The run can go on from its last state."
        )

    def _stuck(self, worker: int) -> LoaderError:
        request = next(self._plan.requests(self._number))
        keys = [self._plan.dataset.locations[i] for i in request.sample_ids.tolist()]
        told = ", ".join(keys[:NUM_KEYS_SHOWN]) + (", ..." if len(keys) > NUM_KEYS_SHOWN else "")
        return LoaderError(
            f"Worker {worker} (process {self._processes[worker].pid}) did not give micro batch {self._number} in "
            f"{self._settings.timeout_s:g} s; it reads the locations {told}. See whether it is stopped and whether its disk or "
            "server answers, or allow more time (data.reading.timeout_s)."
        )


def _work(plan: Plan, settings: ReadSettings, worker: int, slots: list[Tensor], connection: Connection) -> None:
    """A worker's life: until the plan's end, an error, or the end of the process that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the owner ends its workers
    torch.set_num_threads(1)
    requests: Iterator[Request] = FetchedAhead(
        plan.dataset, plan.requests(worker, settings.workers), -(-settings.lookahead // settings.workers)
    )
    with BatchReader(plan, settings.threads, settings.on_corrupt) as reader:
        try:
            while True:
                slot: int = connection.recv()
                request = next(requests, None)
                if request is None:
                    connection.send(None)
                    return
                reading = reader.begin(request, slots[slot])
                reader.finish(reading)
                connection.send((slot, request, reading.replaced))
        except CromssError as error:
            connection.send(error)
        except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody is there who would want more
            return

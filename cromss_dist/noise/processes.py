"""Parts on the cores of this machine: the runner of commands that must not know Ray.

Layer 4. Spawned processes unpickle references to this module, so it imports nothing heavy.
"""

import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any, TypeVar

from cromss_dist.errors import ConfigError, WorkerError

if TYPE_CHECKING:  # heavy
    from cromss_dist.data.conversion.convert import Runner

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")

_shared: list[Any] = []  # of a worker process: what its jobs have in common


def process_runner(workers: int) -> "Runner":
    """A runner in processes of this machine; of one it is a loop in this process.

    Args:
        workers: Jobs at a time.

    Raises:
        ConfigError: there are to be less than one.
        WorkerError (when it runs): a process was killed.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers} is not allowed; give 1 or more.")
    if workers == 1:
        from cromss_dist.data.conversion.convert import run_here

        return run_here

    def run(function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]) -> Generator[Result, None, None]:
        if not jobs:
            return
        # spawn: torch's threads and locks do not survive a fork.
        pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _share, (shared,))
        try:
            # Ctrl-C reaches the whole process group: workers inherit it blocked, and this process alone stops them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                running = [pool.submit(_call, function, job) for job in jobs]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for done in as_completed(running):
                yield done.result()
        except BrokenProcessPool as error:
            raise WorkerError(
                f"One of the {workers} worker processes was killed, most likely for lack of memory; give fewer --workers or "
                "smaller parts (--part-mib). The same command goes on after the finished parts."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    return run


def _share(shared: Any) -> None:
    _shared[:] = [shared]
    end_with_parent()


def end_with_parent() -> None:
    """Has this process end when the one that started it does, even killed: the same command again must find no one at work."""
    parent = parent_process()
    assert parent is not None, "a worker was started by another process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(function: Callable[[Any, Job], Result], job: Job) -> Result:
    return function(_shared[0], job)

"""A job for other processes; light, for they import it."""

import os
import signal
import time
from pathlib import Path

from cromss_dist.errors import ShardError
from cromss_dist.noise.processes import process_runner


def add(shared: int, job: int) -> int:
    """Their sum; a negative job is an error, and 0 kills the process."""
    if job < 0:
        raise ShardError(f"job {job} is damaged.")
    if job == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return shared + job


def sleep(folder: Path, job: int) -> None:
    """Says who it is, and sleeps."""
    (folder / f"{job}.tmp").write_text(str(os.getpid()))
    (folder / f"{job}.tmp").rename(folder / str(job))
    time.sleep(100)


def run_sleepers(folder: Path) -> None:
    """Two of them."""
    list(process_runner(2)(sleep, folder, [0, 1]))

"""A job for other processes; light, for they import it."""

import os
import signal

from cromss_dist.errors import ShardError


def add(shared: int, job: int) -> int:
    """Their sum; a negative job is an error, and 0 kills the process."""
    if job < 0:
        raise ShardError(f"job {job} is damaged.")
    if job == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return shared + job

"""That ranks of an earlier start never write into a run's folder beside those of the present one.

Layer 3. A launcher that is killed lets go of the folder at once, while its ranks, on other machines, end only once Ray has
noticed; on one that was cut off they hang in a collective. Each rank holds a lock that the system takes back when its process
ends, whatever ended it, and the watcher beside it ends it once the folder has another start's ticket.
"""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cromss_dist.errors import OutputExistsError

RANKS_FILE = ".ranks"  # in the run's folder: all ranks hold it; its content is the ticket of the start that may
ENDING_S = 120.0  # for ranks to end: a file server knows of a lost machine only after some 90 s
_POLL_S = 0.1

_shown = ""  # the ticket of this process, if it was admitted by one


def shown_ticket() -> str:
    """The ticket that this process was admitted by; empty where it was not asked for one."""
    return _shown


def new_ticket(run_dir: Path) -> str:
    """Lets no rank of an earlier start in any more, and waits until those that are in have ended.

    Returns:
        What ranks of the next start show at `admitted`.

    Raises:
        OutputExistsError: some do not end.
    """
    file = os.open(run_dir / RANKS_FILE, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        ticket = secrets.token_hex(8)
        os.pwrite(file, ticket.encode(), 0)  # always as long, so that it replaces the last one
        os.fsync(file)
        deadline_s = time.monotonic() + ENDING_S
        while not _try(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline_s:
                raise OutputExistsError(
                    f"Workers of an earlier start have worked in {run_dir} for {ENDING_S:.0f} s after they should have ended; "
                    f"two crews would spoil its checkpoints; end these processes (`lslocks` on their machine shows who holds "
                    f"{RANKS_FILE}), and start the run again."
                )
            time.sleep(_POLL_S)
        return ticket
    finally:
        os.close(file)


@contextmanager
def admitted(run_dir: Path, ticket: str) -> Iterator[None]:
    """Has this process be one of a run's ranks while the block runs.

    Raises:
        OutputExistsError: the ticket is that of an earlier start.
    """
    global _shown
    file = os.open(run_dir / RANKS_FILE, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.pread(file, 64, 0) != ticket.encode():
            raise OutputExistsError(f"This worker is of an earlier start of {run_dir}; a later one works there now.")
        _shown = ticket
        yield
    finally:
        _shown = ""
        fcntl.flock(file, fcntl.LOCK_UN)  # also for forked processes that have the file open, too
        os.close(file)


def _try(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

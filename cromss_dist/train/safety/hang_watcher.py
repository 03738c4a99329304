"""The process beside each rank that sees it hang, or outlive its start; `HangWatch` starts it by its path.

Layer 3. A process, since a thread sees nothing while another one holds the interpreter's lock, or while all are stopped.
Imports the standard library only, so that it costs a few MB and starts at once.
"""

import json
import mmap
import os
import select
import shlex
import signal
import sys
import time
from contextlib import suppress

PAGE_BYTES = 256  # of shared memory: what the last sign of life wrote, padded with zeros
CLOCK_BYTES = 8  # its beginning: the time of it, which only has to differ from the one before
HANG_FILE = "hang.json"  # in the run's folder: tells the watchers of the other ranks


def watch(
    rank_pid: int,
    rank: int,
    timeout_s: float,
    memory_fd: int,
    socket_fd: int,
    run_dir: str,
    error_file: str,
    ticket_file: str,
    ticket: str,
) -> None:
    """Looks for signs of life until the rank ends, ends the watch, or is ended for want of them.

    Args:
        rank_pid: The rank's process, parent of this one.
        rank: Its number.
        timeout_s: Seconds without a sign of life after which it hangs.
        memory_fd: Memory that the rank writes.
        socket_fd: Where the rank says that the watch is over, and where a byte ends the rank.
        run_dir: Folder of the run.
        error_file: Where to say what happened, for the launcher.
        ticket_file: Has another content once a later start works in the folder: then the rank is ended, and writes nothing.
        ticket: Its content until then; empty: nobody looks.
    """
    memory = mmap.mmap(memory_fd, PAGE_BYTES, access=mmap.ACCESS_READ)
    hang_file = os.path.join(run_dir, HANG_FILE)
    earlier = _signature(hang_file)  # of a hang that was before this start
    period_s = min(timeout_s / 40, 1.0)
    seen, silent_s, looked_s = memory[:], 0.0, time.monotonic()
    while silent_s < timeout_s and _signature(hang_file) == earlier:
        if select.select([socket_fd], [], [], period_s)[0] or os.getppid() != rank_pid:
            return
        if ticket and _content(ticket_file) not in (ticket, None):
            os.kill(rank_pid, signal.SIGKILL)
            return
        now_s = time.monotonic()
        # Time in which this process was stopped, too (Ctrl-Z), is no silence of the rank.
        silent_s += min(now_s - looked_s, 2 * period_s)
        looked_s = now_s
        if memory[:] != seen:
            seen, silent_s = memory[:], 0.0

    os.kill(rank_pid, signal.SIGUSR2)  # faulthandler's, in C: it needs no lock of the interpreter
    os.kill(rank_pid, signal.SIGCONT)  # a stopped process takes no signal before
    place = seen[CLOCK_BYTES:].rstrip(b"\0").decode(errors="replace")
    hangs = silent_s >= timeout_s
    message = (
        f"Rank {rank} gave no sign of life for {silent_s:.1f} s after '{place}'"
        if hangs
        else (f"Rank {rank}, at '{place}', was ended since another one hung")
    )
    message += (
        ". The stacks of all ranks are in stacks-rank*.txt in the run's folder; if a step, a batch of validation or a saving is "
        "rightly that long, raise faults.hang_timeout_s."
    )
    content = {"type": "HangError", "message": message, "rank": rank, "place": place, "silent_s": silent_s}
    _write(error_file, content)
    if hangs:
        _write(hang_file, content)
        # Where the rank is its own launcher, nobody else says it.
        print(f"HangError: {message} It goes on with: --resume {shlex.quote(run_dir)}", file=sys.stderr, flush=True)
    # A rank that ends breaks the collectives of the others, which then end as well: first they dump their stacks.
    time.sleep(3 * period_s)
    os.write(socket_fd, b"x")
    end_s = time.monotonic() + min(2.0, timeout_s / 10)
    while os.getppid() == rank_pid and time.monotonic() < end_s:
        time.sleep(0.01)
    if os.getppid() == rank_pid:  # it cannot run Python
        os.kill(rank_pid, signal.SIGKILL)


def _signature(path: str) -> tuple[int, int] | None:
    """What differs between two files written under a name; None where there is none."""
    with suppress(FileNotFoundError):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns
    return None


def _content(path: str) -> str | None:
    """Of a small file; None where it cannot be read now."""
    with suppress(OSError), open(path) as file:
        return file.read()
    return None


def _write(path: str, content: dict[str, object]) -> None:
    """A whole file or none; a disk that refuses must not keep the rank from being ended."""
    staged = f"{path}.{content['rank']}"  # processes of two machines may have one number
    try:
        with open(staged, "w") as file:
            json.dump(content, file)
        os.replace(staged, path)
    except OSError as error:
        print(f"HangError: {content['message']} ({error})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, sent to all of its group
    arguments = sys.argv[1:]
    watch(int(arguments[0]), int(arguments[1]), float(arguments[2]), int(arguments[3]), int(arguments[4]), *arguments[5:9])

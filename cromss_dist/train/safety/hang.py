"""Sees that a rank hangs, says where, and ends it.

Layer 3.
"""

import faulthandler
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from cromss_dist.errors import HangError
from cromss_dist.train.safety import hang_watcher
from cromss_dist.train.safety.failure import STACKS_FILE, error_path
from cromss_dist.train.safety.fence import RANKS_FILE, shown_ticket

_SIGN = struct.Struct(f"<Q{hang_watcher.PAGE_BYTES - hang_watcher.CLOCK_BYTES}s")


class HangWatch:
    """Ends this rank with HangError's code if it gives no sign of life for too long.

    A small process looks at shared memory that `beat` writes. Where that stays the same for `timeout_s`, it has the Python
    stacks of all threads dumped into `stacks-rank00000.txt` of the run's folder, writes the rank's error file of type
    HangError, and has the process end with code 76; one that cannot run Python any more (its lock is held) is killed. The
    other ranks' watchers see that in the run's folder, dump the stacks of theirs at once and end them, too. All of it takes
    less than 1.2 x `timeout_s`. Works for stopped processes, held locks and collectives that wait for ever.

    Args:
        run_dir: Folder of the run, seen by every rank.
        rank: Number of this rank.
        timeout_s: Seconds, at least 1.
    """

    def __init__(self, run_dir: Path, rank: int, timeout_s: float) -> None:
        self.run_dir, self.rank, self.timeout_s = run_dir, rank, timeout_s

    def __enter__(self) -> "HangWatch":
        self._stacks = (self.run_dir / STACKS_FILE.format(rank=f"{self.rank:05d}")).open("w")
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        memory_fd = os.memfd_create("signs-of-life")
        os.truncate(memory_fd, hang_watcher.PAGE_BYTES)
        self._memory = mmap.mmap(memory_fd, hang_watcher.PAGE_BYTES)
        self.beat("start")
        self._socket, watcher_end = socket.socketpair()
        arguments: list[object] = [os.getpid(), self.rank, self.timeout_s, memory_fd, watcher_end.fileno(), self.run_dir]
        arguments += [error_path(self.run_dir, self.rank), self.run_dir / RANKS_FILE, shown_ticket()]
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", hang_watcher.__file__, *map(str, arguments)],
            pass_fds=(memory_fd, watcher_end.fileno()),
        )
        os.close(memory_fd)
        watcher_end.close()
        self._listener = threading.Thread(target=_end_when_told, args=(self._socket,), name="hang", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Not killed: where it has found a hang already, that stands, and ends this process here.
        self._socket.shutdown(socket.SHUT_WR)  # reaches it whoever else has inherited the socket
        self._watcher.wait()
        self._listener.join()
        self._socket.close()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        path = Path(self._stacks.name)
        if path.stat().st_size == 0:
            path.unlink()

    @property
    def watcher_pid(self) -> int:
        """Process id of the watcher."""
        return self._watcher.pid

    def beat(self, place: str) -> None:
        """A sign of life.

        Args:
            place: What comes next; the first 248 bytes of it are told if this was the last sign.
        """
        self._memory[:] = _SIGN.pack(time.monotonic_ns(), place.encode())


def _end_when_told(watcher: socket.socket) -> None:
    """Waits for a byte of the watcher; there is none where the watch ends before."""
    if watcher.recv(1):
        os._exit(HangError.exit_code)  # at once: functions of atexit and other threads may be what hangs

"""A wish that a run stops: a signal to its process, or a file in its folder.

A file `resize` makes the ranks do the same; it is their launcher's, which goes on with another number of them.

Layer 3. Ranks see the wish at different times, so the loop sums it over ranks before any of them acts on it.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType

STOP_FILE = "stop"
RESIZE_FILE = "resize"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of schedulers and of who takes a machine back
LOOK_S = 1.0  # the folder may be on a network: a step must not wait for it


class StopRequest:
    """Notices SIGTERM, SIGUSR1 and the files `stop` and `resize` in a run's folder while its block runs.

    Python hands signals to the main thread only, and Ray Train runs a rank in another one; there the files alone count,
    which the launcher writes. A second signal changes nothing: the run is saving itself already.

    Args:
        run_dir: Folder of the run, seen by this rank.
    """

    def __init__(self, run_dir: Path) -> None:
        self._files = (run_dir / STOP_FILE, run_dir / RESIZE_FILE)
        self._wanted = False
        self._next_look_s = 0.0  # of the monotonic clock
        self._handlers = ExitStack()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._handlers.enter_context(handling_signals(self._on_signal))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handlers.close()

    @property
    def wanted(self) -> bool:
        """Whether this rank has seen a wish to stop; looks for the files at most once a second."""
        if not self._wanted and time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + LOOK_S
            self._wanted = any(file.exists() for file in self._files)
        return self._wanted

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has a function called where SIGTERM or SIGUSR1 reaches this process, whose main thread this is, in place of its end."""
    former = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


@contextmanager
def passing_on_signals(run_dir: Path) -> Iterator[None]:
    """Writes the file where SIGTERM or SIGUSR1 reaches this process, a launcher, whose ranks are other processes."""
    with handling_signals(lambda *_: request_stop(run_dir)):
        yield


@contextmanager
def holding_signals() -> Iterator[None]:
    """Signals that stop a run wait for the end of the block; processes that it starts never get them.

    A scheduler sends them to every process of a job, and Ray's would end at once.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def request_stop(run_dir: Path) -> None:
    """Asks the ranks of a run to save and to stop."""
    (run_dir / STOP_FILE).touch()


def stop_requested(run_dir: Path) -> bool:
    """Whether somebody asked."""
    return (run_dir / STOP_FILE).exists()


def forget_stop(run_dir: Path) -> None:
    """Takes back what stopped a run, before it goes on."""
    for name in (STOP_FILE, RESIZE_FILE):
        (run_dir / name).unlink(missing_ok=True)


def request_resize(run_dir: Path, reason: str) -> None:
    """Asks the ranks of a run to save and to stop, since they shall be more or fewer."""
    staged = run_dir / f".{RESIZE_FILE}"
    staged.write_text(reason)
    staged.rename(run_dir / RESIZE_FILE)


def take_resize(run_dir: Path) -> str | None:
    """Why the ranks should be more or fewer, once; None where nobody asked."""
    file = run_dir / RESIZE_FILE
    if not file.exists():
        return None
    reason = file.read_text()
    file.unlink()
    return reason

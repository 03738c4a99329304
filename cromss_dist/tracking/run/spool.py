"""The spool of a run: JSON lines in its folder that rank 0 and launchers append. Nothing else holds its figures.

Whoever watches the run follows the file, and an MLflow store gets a copy of it (`shipper.py`). Each line has `event`, its kind,
and `time`, seconds since 1970. Beside what is there for who watches:

| event | what it says |
|--|--|
| run | once, before all else: `run`, the run's own id; `name`, `experiment` |
| attempt | a start: its `number` from 1, and the `step` after which it goes on |
| params, tags | `values` |
| dataset | `name`, `digest`, `source` |
| progress, validation | `metrics` at a `step` after `samples` |
| artifact | `path` of a file in the run's folder, `artifact`: its path in the store |
| register | `package`: a folder in the run's folder, `card`: sha256 of its card, `model`, `alias` |
| end | `status` FINISHED, FAILED or KILLED, and the `error` if there was one |
"""

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cromss_dist.errors import StorageError

EVENTS_FILE = "events.jsonl"
SYNC_S = 1.0  # that a crash of the machine may cost; a crash of the process costs nothing
_BLOCK = 1 << 20  # bytes that are read at a time: a spool may be larger than the memory


class Spool:
    """The writer of a run's spool; it has one at a time. What a killed process left of a line is cut.

    A line is with the system when `append` returns, and on disk a second later; any thread may append.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        path = run_dir / EVENTS_FILE
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._end = end_of_lines(self._file)
        if self._end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, self._end)
        self._lock = threading.Lock()
        self._unsynced = False
        self._failure: OSError | None = None
        self._closing = threading.Event()
        self._syncing = threading.Thread(target=self._sync_often, name="spool", daemon=True)
        self._syncing.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def append(self, kind: str, **values: Any) -> None:
        """Writes a line.

        Raises:
            OSError: the disk does not take it, or did not take an earlier one; no part of a line is left.
        """
        if self._failure:
            raise self._failure
        line = (json.dumps({"event": kind, "time": time.time(), **values}) + "\n").encode()
        with self._lock:
            if self._closing.is_set():
                raise OSError(errno.EBADF, "the spool is closed", str(self.run_dir / EVENTS_FILE))
            rest = line
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
            self._end += len(line)
            self._unsynced = True

    def begin(self, name: str, experiment: str) -> str:
        """Gives the run its own id, unless it has one; returns it."""
        if (run := run_id_of(self.run_dir)) is None:
            run = uuid.uuid4().hex
            self.append("run", run=run, name=name, experiment=experiment)
        return run

    def close(self) -> None:
        """Waits until all lines are on disk."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        self._syncing.join()
        self._sync()
        os.close(self._file)

    def _sync_often(self) -> None:
        while not self._closing.wait(SYNC_S):
            try:
                self._sync()
            except OSError as error:
                self._failure = error
                return

    def _sync(self) -> None:
        if self._unsynced:
            self._unsynced = False  # before, so that a line that is written meanwhile is synced next time
            os.fsync(self._file)


class Tail:
    """New whole lines of a file that another process appends to; the file may not be there yet.

    Args:
        path: The file.
        offset: Bytes of it that were read before.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    @classmethod
    def at_end(cls, path: Path) -> Self:
        """Of what comes after the lines that are there."""
        if not path.exists():
            return cls(path)
        with path.open("rb") as file:
            return cls(path, end_of_lines(file.fileno()))

    def read(self, most: int = -1, synced: bool = False) -> list[dict[str, Any]]:
        """The lines since the last reading, as they were given.

        Args:
            most: Bytes after which no further line is begun; -1: no limit.
            synced: Whether only what is on disk counts, which is brought about.

        Raises:
            StorageError: a line is not as it was written.
        """
        whole = self.take(most, synced)
        try:
            return [_parsed(line, self.path) for line in whole.splitlines()]
        except StorageError:
            self.offset -= len(whole)
            raise

    def take(self, most: int = -1, synced: bool = False) -> bytes:
        """As `read`, and the lines are not looked at."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            left = max(os.fstat(file.fileno()).st_size - self.offset, 0)
            if synced and left:
                os.fsync(file.fileno())
            file.seek(self.offset)
            data = file.read(left if most < 0 else min(most, left))
            data += file.readline(left - len(data))
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole


def tell(run_dir: Path, text: str) -> None:
    """In the spool of a run that no rank 0 writes at this time: whoever watches it sees the text, and it stays."""
    with Spool(run_dir) as spool:
        spool.append("stage", text=text)


def read_events(run_dir: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    """The lines of a run's spool so far; there may be none yet.

    Args:
        run_dir: Folder of the run.
        kinds: Only these, and the others are not parsed, which takes a tenth of the time; none given: all.

    Raises:
        StorageError: one of the lines is not as it was written.
    """
    heads = tuple(f'{{"event": "{kind}"'.encode() for kind in kinds) or b""  # as `append` writes them
    tail = Tail(run_dir / EVENTS_FILE)
    while block := tail.take(_BLOCK):
        for line in block.splitlines():
            if line.startswith(heads):
                yield _parsed(line, tail.path)


def count_lines(path: Path, offset: int = 0) -> int:
    """Whole lines of a file after so many bytes."""
    tail, number = Tail(path, offset), 0
    while block := tail.take(_BLOCK):
        number += block.count(b"\n")
    return number


def run_id_of(run_dir: Path) -> str | None:
    """A run's own id; None where its folder has no run that has begun."""
    return next((str(event["run"]) for event in read_events(run_dir, "run")), None)


def end_of_lines(file: int) -> int:
    """Where the last whole line of an open file ends."""
    start = os.fstat(file).st_size
    while start > 0:
        block = os.pread(file, min(_BLOCK, start), start - min(_BLOCK, start))
        start -= len(block)
        if (newline := block.rfind(b"\n")) >= 0:
            return start + newline + 1
    return 0


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    except (ValueError, RecursionError):
        pass
    raise StorageError(f"{path} was damaged: {line[:80]!r} is no event. Take that line out, and run it again.")

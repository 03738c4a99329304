"""Brings the spool of a run to an MLflow store: beside the run, or later."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cromss_dist.errors import CromssError
from cromss_dist.tracking.run.replica import Replica
from cromss_dist.tracking.store import brief

INTERVAL_S = 5.0  # between two looks into the spool: a request costs 10 ms before its first point
HEARTBEAT_S = 60.0
# Of the time, that sending may take while the run trains: MLflow's client is Python, and while that computes, training does not.
SHARE = 0.03
_LONGEST_REST_S = 10.0  # the first import of MLflow alone takes seconds
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # after an error


@dataclass(frozen=True)
class Delivery:
    """What has become of a spool."""

    run_id: str | None  # of the run in MLflow; None while the store has not all of it
    registered: dict[str, int]  # model name -> version
    problem: str | None = None  # why something is left
    refused: dict[str, CromssError] = field(default_factory=dict)  # model name -> why that encoder cannot be registered


class Shipper:
    """A thread that sends the spool of a run while it is written. No error of the store reaches the run.

    What cannot be sent is tried again after 1, 2, 4 ... 60 s. MLflow is imported in the thread: that takes seconds. So that it
    takes little from the run, it computes for a small share of the time; what a run writes faster than that is sent at its end.

    Args:
        run_dir: Folder of the run.
        uri: MLflow tracking URI.
        tell: Takes a line of what was done or does not work.

    Raises:
        RegistryError: the URI is of a kind that cannot hold runs.
    """

    def __init__(self, run_dir: Path, uri: str, tell: Callable[[str], None]) -> None:
        self._replica = Replica(run_dir, uri, tell, pause=self._rest)
        self._rested_s = 0.0  # CPU time of the thread when it last rested
        self._tell = tell
        self._problem: str | None = None
        self._delivered = False
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    def close(self, patience_s: float, patience_if_away_s: float | None = None) -> Delivery:
        """Sends what is left. The spool must have all its lines.

        Args:
            patience_s: Seconds that it may take.
            patience_if_away_s: Seconds, where the last sending was an error; None: the same.
        """
        if self._problem is not None and patience_if_away_s is not None:
            patience_s = patience_if_away_s
        self._closing.set()
        self._thread.join(patience_s)
        self._given_up.set()
        registered, refused = dict(self._replica.registered), dict(self._replica.refused)
        if self._delivered:
            return Delivery(self._replica.run_id, registered, refused=refused)
        return Delivery(None, registered, self._problem or f"not all of it within {patience_s:g} s", refused)

    def _run(self) -> None:
        pause_s, next_beat_s = 0.0, 0.0
        while not self._given_up.is_set():
            closing = self._closing.is_set()  # asked before sending: then all lines are in the spool
            try:
                self._replica.send()
                if time.monotonic() >= next_beat_s:
                    self._replica.beat(time.time())
                    next_beat_s = time.monotonic() + HEARTBEAT_S
                if self._problem:
                    self._tell(f"{self._replica.uri} has all figures again")
                    self._problem = None
            except Exception as error:  # noqa: BLE001 - whatever a store or its libraries raise must not end the run
                self._note(error)
                pause_s = min(max(_FIRST_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
            else:
                if closing:
                    self._delivered = True
                    return
                pause_s = 0.0
            if closing:
                self._given_up.wait(min(pause_s, _FIRST_PAUSE_S))
            else:
                self._rest()
                self._closing.wait(pause_s or INTERVAL_S)

    def _rest(self) -> None:
        """Leaves the interpreter to the run until the thread's share of the time is as small as it may be."""
        computed_s = time.thread_time() - self._rested_s
        self._closing.wait(min(computed_s / SHARE, _LONGEST_REST_S))
        self._rested_s = time.thread_time()

    def _note(self, error: Exception) -> None:
        """Tells of the first error in a row."""
        if self._problem is None:
            with suppress(OSError):  # of the spool: who writes the run's own lines meets it, too
                self._tell(f"figures wait in the run's folder, and the run goes on: {brief(error)}")
        self._problem = brief(error)


def deliver(
    run_dir: Path,
    uri: str,
    *,
    tell: Callable[[str], None] = lambda text: None,
    again: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Delivery:
    """Sends the spool of a run now.

    Args:
        run_dir: Folder of the run.
        uri: MLflow tracking URI, of any store.
        tell: Takes a line of what was done.
        again: Whether all is sent, also what the store is known to have.
        progress: Takes the bytes of the spool that are done.

    Raises:
        RegistryError: the store cannot be reached, or refuses.
        StorageError: the spool cannot be read.
    """
    replica = Replica(run_dir, uri, tell, again)
    replica.send(progress)
    return Delivery(replica.run_id, dict(replica.registered), refused=dict(replica.refused))

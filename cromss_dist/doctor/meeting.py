"""What shows only between machines: whether they share a folder, its locks and the time, reach each other, run the same.

Layer 4. Each machine runs `meet`, at the same time; they speak through files of the shared folder, as launchers and ranks do.
"""

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cromss_dist.doctor.collectives import Backend, all_reduce
from cromss_dist.doctor.finding import Finding

POLL_S = 0.005
TO_GATHER_S = 120.0  # until all machines are there: their processes start one after the other
TO_ANSWER_S = 30.0  # from then on
LATE_S = 2.0  # until a file of one machine is seen on another: stops and resizes are told so
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 30.0
ROUNDS = 3


class AbsentError(Exception):
    """Files that some machines should have written are not seen here."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.ranks = sorted(ranks)
        super().__init__(f"nothing seen of {self.ranks}")


@dataclass(frozen=True)
class Meeting:
    """One machine among all.

    Args:
        folder: Shared by all, without what an earlier meeting left.
        rank: Of this machine.
        size: Number of machines.
    """

    folder: Path
    rank: int
    size: int

    def tell(self, name: str, value: Any) -> None:
        """Lets the others see a JSON value under a name."""
        partial = self.folder / f".{name}-{self.rank}.tmp"
        partial.write_text(json.dumps(value))
        partial.replace(self.folder / f"{name}-{self.rank}.json")

    def hear(self, name: str, ranks: Iterable[int], timeout_s: float = TO_ANSWER_S) -> dict[int, tuple[Any, float]]:
        """What others told under a name, each with this machine's clock (seconds since 1970) when it was seen.

        Raises:
            AbsentError: some did not in the time.
        """
        missing, heard, deadline = set(ranks), {}, time.monotonic() + timeout_s
        while missing:
            for rank in sorted(missing):
                path = self.folder / f"{name}-{rank}.json"
                if path.exists():
                    heard[rank] = (json.loads(path.read_text()), time.time())
            missing -= heard.keys()
            if missing and time.monotonic() > deadline:
                raise AbsentError(missing)
            time.sleep(POLL_S)
        return heard

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]


def meet(meeting: Meeting, host: str, address: str, backends: tuple[Backend, ...], identity: dict[str, str]) -> list[Finding]:
    """Examines this machine together with the others; a call on every one of them.

    Args:
        meeting: This machine among them.
        host: Its name.
        address: At which the others reach it.
        backends: Of the collectives that are tried.
        identity: What must be equal on all: versions and code.
    """
    names: dict[int, str] = {}
    try:
        meeting.tell("here", {"host": host, "identity": identity})
        here = {rank: value for rank, (value, _) in meeting.hear("here", range(meeting.size), TO_GATHER_S).items()}
        names = {rank: value["host"] for rank, value in here.items()}
        findings = [_same(meeting, {rank: value["identity"] for rank, value in here.items()}, names)]
        findings += _exchange(meeting, names)
        findings += [_locks_across(meeting), _exclusive_across(meeting)]
        for backend in backends:
            ranks = [meeting.rank]
            findings.append(all_reduce(f"{backend} across nodes", backend, meeting.folder, ranks, meeting.size, address))
        meeting.tell("done", None)  # nobody takes the folder away before
        meeting.hear("done", range(meeting.size), 2 * TO_GATHER_S)
    except AbsentError as absent:
        who = ", ".join(names.get(rank, f"node {rank + 1} of {meeting.size}") for rank in absent.ranks)
        fix = "Put `output` on a file system that all machines mount under the same path; see whether those machines are up."
        return [Finding("shared folder", "fail", f"{meeting.folder.parent}: nothing seen of {who} in the time", fix)]
    except OSError as error:
        fix = "Put `output` on a file system that all machines mount under the same path, and may write to."
        return [Finding("shared folder", "fail", f"{meeting.folder.parent}: {error.strerror}", fix)]
    return findings


def _same(meeting: Meeting, identities: dict[int, dict[str, str]], names: dict[int, str]) -> Finding:
    """Whether this machine runs what the first one does."""
    mine, first = identities[meeting.rank], identities[0]
    differing = [key for key in sorted({*mine, *first}) if mine.get(key) != first.get(key)]
    if differing:
        told = ", ".join(f"{key} {mine.get(key, 'missing')}, not {first.get(key, 'missing')}" for key in differing)
        fix = "Use one environment and one checkout on a shared file system, or install requirements.lock on every machine."
        return Finding("same code", "fail", f"other than on {names[0]}: {told}", fix)
    return Finding("same code", "ok", f"code {mine.get('code', '')[:12]} and {len(mine) - 1} versions as on {names[0]}")


def _exchange(meeting: Meeting, names: dict[int, str]) -> list[Finding]:
    """Has the first machine ask and the others answer: how late files are seen, and how far their clocks are apart.

    Both from the first one's clock alone: an answer's time lies between question and arrival, whatever the clocks say.
    """
    if meeting.rank:
        for turn in range(ROUNDS):
            meeting.hear(f"ping{turn}", [0])
            meeting.tell(f"pong{turn}", time.time())
        return [_late(meeting), _skewed(meeting, names)]
    best: dict[int, tuple[float, float]] = {}  # rank: seconds there and back, skew
    worst: dict[int, float] = {}
    for turn in range(ROUNDS):
        asked = time.time()
        meeting.tell(f"ping{turn}", None)
        for rank, (answered, seen) in meeting.hear(f"pong{turn}", meeting.others).items():
            way = seen - asked
            best[rank] = min(best.get(rank, (math.inf, 0.0)), (way, answered - (asked + seen) / 2), key=lambda pair: pair[0])
            worst[rank] = max(worst.get(rank, 0.0), way)
    # Each machine tells its own part, which the first one has measured.
    meeting.tell("measured", {rank: [worst[rank], *best[rank]] for rank in meeting.others})
    return [_late(meeting), _skewed(meeting, names)]


def _measured(meeting: Meeting) -> list[float] | None:
    """Of this machine: the longest way there and back, the shortest, and the skew then, seconds; None on the first one."""
    measured: dict[str, list[float]] = meeting.hear("measured", [0])[0][0]
    return measured.get(str(meeting.rank))


def _late(meeting: Meeting) -> Finding:
    measured = _measured(meeting)
    if measured is None:
        return Finding("shared folder", "ok", f"{meeting.folder.parent} is seen by {meeting.size} machines")
    one_way = measured[0] / 2
    told = f"a file of another machine is seen after {one_way:.2f} s"
    if one_way <= LATE_S:
        return Finding("shared folder", "ok", told)
    fix = "Mount it so that new files are seen at once (NFS: lookupcache=positive, actimeo=1): requests to stop would come late."
    return Finding("shared folder", "warn", told, fix)


def _skewed(meeting: Meeting, names: dict[int, str]) -> Finding:
    measured = _measured(meeting)
    if measured is None:
        return Finding("clocks", "ok", "the others are held against this machine's")
    _, way, skew = measured
    told = f"{skew:+.2f} s against {names[0]}, known to {way / 2:.2f} s"
    certain = abs(skew) - way / 2
    if certain <= SKEW_WARN_S:
        return Finding("clocks", "ok", told)
    fix = "Run a time service (chrony, ntpd) on every machine: notices of preemption and the order of events go by the clock."
    return Finding("clocks", "fail" if certain > SKEW_FAIL_S else "warn", told, fix)


def _locks_across(meeting: Meeting) -> Finding:
    """The first machine holds a lock that none of the others may get."""
    fix = "Mount it with locks that all machines see (NFS: without nolock or local_lock, Lustre: -o flock, not localflock)."

    def attempt() -> str:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""

    with (meeting.folder / "lock").open("a") as lock:
        if meeting.rank == 0:
            problem = _words_of(attempt)
            meeting.tell("locked", problem)
            meeting.hear("tried", meeting.others)
        else:
            problem = meeting.hear("locked", [0])[0][0]
            answer = _words_of(attempt)
            meeting.tell("tried", None)
            if not problem and answer != os.strerror(errno.EWOULDBLOCK):
                problem = answer or "this machine gets a lock that another one holds"
    if problem:
        return Finding("locks across nodes", "fail", f"flock: {problem}", fix)
    return Finding("locks across nodes", "ok", "a lock of one machine keeps the others out")


def _exclusive_across(meeting: Meeting) -> Finding:
    """All machines create one file at the same time, and one of them succeeds."""

    def attempt() -> str:
        os.close(os.open(meeting.folder / "only-once", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        return "won"

    meeting.tell("ready", None)
    meeting.hear("ready", range(meeting.size))
    meeting.tell("created", _words_of(attempt))
    answers = [value for value, _ in meeting.hear("created", range(meeting.size)).values()]
    refused = os.strerror(errno.EEXIST)
    if answers.count("won") == 1 and answers.count(refused) == meeting.size - 1:
        return Finding("create across nodes", "ok", "one of all succeeds")
    other = sorted(set(answers) - {"won", refused})
    told = f"{answers.count('won')} of {meeting.size} succeed{''.join(f'; {words}' for words in other)}"
    return Finding("create across nodes", "fail", told, "Put `output` on a POSIX file system: O_EXCL has no effect on this.")


def _words_of(action: Callable[[], str]) -> str:
    """What an action gives, or the system's words where it refuses."""
    try:
        return action()
    except OSError as error:
        return str(error.strerror)

"""Named places where a test can have a process killed: proof that what is on disk survives a crash there.

Layer 0. Does nothing unless the environment variable CROMSS_FAILPOINT names the place.
"""

import os
import signal


def failpoint(place: str) -> None:
    """Kills this process, as `kill -9` does, when CROMSS_FAILPOINT is `place`, or `place:N` and this is the N-th time here."""
    wish, _, times = os.environ.get("CROMSS_FAILPOINT", "").partition(":")
    if wish != place:
        return
    _visits[place] = _visits.get(place, 0) + 1
    if _visits[place] == int(times or 1):
        os.kill(os.getpid(), signal.SIGKILL)


_visits: dict[str, int] = {}

"""The file of events of a run: JSON lines that rank 0 and launchers append and whoever watches the run reads.

Layer 3.
"""

import json
import time
from pathlib import Path
from typing import IO, Any

EVENTS_FILE = "events.jsonl"


def append_event(file: IO[str], kind: str, **values: Any) -> None:
    """Writes one JSON line with the time."""
    file.write(json.dumps({"event": kind, "time": time.time(), **values}) + "\n")
    file.flush()


def tell(run_dir: Path, text: str) -> None:
    """Among the events of a run that writes none at this time: whoever watches it sees the text, and it stays."""
    with (run_dir / EVENTS_FILE).open("a") as file:
        append_event(file, "stage", text=text)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run so far; none if it has no file of events yet."""
    return Tail(run_dir / EVENTS_FILE).read()


class Tail:
    """New whole lines of a file that another process appends to; the file may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The lines since the last reading, as they were given."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

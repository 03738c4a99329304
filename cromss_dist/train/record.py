"""What a run tells the outside: a file of events beside it, which launchers show, and the MLflow run.

Layer 3. Only rank 0 has a Record. Events are JSON lines, so that a launcher in another process (or on another node,
over a shared folder) can follow the run without talking to it.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure

from cromss_dist.tracking.runs import RunTracker

EVENTS_FILE = "events.jsonl"


class Record:
    """Writes events and forwards metrics to the tracker.

    Args:
        run_dir: Folder of the run.
        tracker: The MLflow run.
    """

    def __init__(self, run_dir: Path, tracker: RunTracker) -> None:
        self.tracker = tracker
        self._run_dir = run_dir
        self._file = (run_dir / EVENTS_FILE).open("a", buffering=1)

    def event(self, kind: str, **values: Any) -> None:
        """Appends one event."""
        append_event(self._file, kind, **values)

    def metrics(self, values: Mapping[str, float], step: int, samples: int) -> None:
        """Training figures at an optimiser step; also the sign of life that progress bars follow."""
        self.tracker.log_metrics({**values, "train/samples": float(samples)}, step)
        self.event("progress", step=step, samples=samples, metrics=dict(values))

    def validation(self, values: Mapping[str, float], step: int, samples: int) -> None:
        """Validation figures at an optimiser step."""
        self.tracker.log_metrics(values, step)
        self.event("validation", step=step, samples=samples, metrics=dict(values))

    def picture(self, path: str, figure: Figure) -> None:
        """A figure, in the run's folder and as an artifact of the MLflow run."""
        place = self._run_dir / path
        place.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(place)
        self.tracker.log_figure(figure, path)
        self.event("picture", path=str(place))

    def close(self) -> None:
        """Closes the file of events; the tracker is its owner's to close."""
        self._file.close()


def append_event(file: IO[str], kind: str, **values: Any) -> None:
    """Writes one JSON line with the time."""
    file.write(json.dumps({"event": kind, "time": time.time(), **values}) + "\n")
    file.flush()

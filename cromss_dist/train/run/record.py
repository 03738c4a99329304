"""What a run tells the outside: a file of events beside it, which launchers show, and the MLflow run.

Layer 3. Only rank 0 has a Record. Events are JSON lines, so that a launcher in another process (or on another node,
over a shared folder) can follow the run without talking to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cromss_dist.tracking.run.runs import RunTracker
from cromss_dist.tracking.run.spool import EVENTS_FILE, append_event, read_events
from cromss_dist.train.checkpoint.store import Committed


class Record:
    """Writes events and forwards metrics to the tracker.

    Args:
        run_dir: Folder of the run.
        tracker: The MLflow run.
    """

    def __init__(self, run_dir: Path, tracker: RunTracker) -> None:
        self.tracker = tracker
        self._run_dir = run_dir
        path = run_dir / EVENTS_FILE
        _cut_unfinished_line(path)
        self._file = path.open("a", buffering=1)

    def event(self, kind: str, **values: Any) -> None:
        """Appends one event."""
        append_event(self._file, kind, **values)

    def catch_up(self, step: int) -> None:
        """Sends the tracker the figures up to a step, of which a killed process may have kept some; it drops what it has."""
        figures = {}
        for event in read_events(self._run_dir):
            if event["event"] in ("progress", "validation") and event["step"] <= step:
                figures[event["event"], event["step"]] = event  # of a step that was computed again, the last
        for (kind, _), event in sorted(figures.items(), key=lambda item: item[0][1]):
            samples = {"train/samples": float(event["samples"])} if kind == "progress" else {}
            self.tracker.log_metrics(event["metrics"] | samples, event["step"])

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
        self.tracker.log_file(place, path)
        self.event("picture", path=str(place))

    def savings(self, news: Iterable[Committed | str]) -> None:
        """What became of checkpoints."""
        for told in news:
            if isinstance(told, Committed):
                self.event("checkpoint", step=told.step, folder=str(told.folder), seconds=told.seconds)
            else:
                self.event("stage", text=told)

    def bad_step(self, step: int, reason: str, bundle: str | None) -> None:
        """A step whose loss or gradient is not finite was skipped; `bundle` is the folder for a replay, if one was kept."""
        self.event("bad_step", step=step, reason=reason, bundle=bundle)

    def spike(self, step: int, reason: str, skipped: bool, bundle: str | None) -> None:
        """The loss of a step jumped; the step was taken unless `skipped`."""
        self.event("spike", step=step, reason=reason, skipped=skipped, bundle=bundle)

    def resumed(self, step: int, samples: int, folder: str, differences: Sequence[str]) -> None:
        """The run goes on after a step; `differences` are what is not as in the run that was saved, each a phrase."""
        self.event("resumed", step=step, samples=samples, folder=folder, differences=list(differences))

    def stopping(self, step: int, reason: str) -> None:
        """The run was asked to stop; it saves itself after this step and ends."""
        self.event("stopping", step=step, reason=reason)

    def close(self) -> None:
        """Closes the file of events; the tracker is its owner's to close."""
        self._file.close()


def _cut_unfinished_line(path: Path) -> None:
    """Drops what a killed process left of a line, which the next event would become a part of."""
    if path.exists():
        with path.open("r+b") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)

"""The file of events: what a Record writes is what a launcher reads, also after a kill."""

import json
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt

from cromss_dist.tracking.run.runs import RunTracker
from cromss_dist.tracking.run.spool import EVENTS_FILE, read_events
from cromss_dist.train.checkpoint.store import Committed
from cromss_dist.train.run.record import Record


class Tracker:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int]] = []
        self.files: list[tuple[Path, str]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((dict(metrics), step))

    def log_file(self, file: Path, path: str) -> None:
        self.files.append((file, path))


def record_in(folder: Path) -> tuple[Record, Tracker]:
    tracker = Tracker()
    return Record(folder, cast(RunTracker, tracker)), tracker


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if name != "time"} for event in read_events(folder)]


def test_each_event_is_a_line_with_its_values(tmp_path: Path) -> None:
    record, _ = record_in(tmp_path)
    record.resumed(step=20, samples=200, folder="step-0000020", differences=("4 ranks, not 2",))
    record.bad_step(step=21, reason="loss is nan", bundle="replay/step-0000021")
    record.spike(step=22, reason="spike", skipped=False, bundle=None)
    record.savings([Committed(30, Path("step-0000030"), 1.5), "the checkpoint of step 33 was not saved"])
    record.stopping(step=31, reason="SIGTERM")
    record.close()
    assert events_of(tmp_path) == [
        {"event": "resumed", "step": 20, "samples": 200, "folder": "step-0000020", "differences": ["4 ranks, not 2"]},
        {"event": "bad_step", "step": 21, "reason": "loss is nan", "bundle": "replay/step-0000021"},
        {"event": "spike", "step": 22, "reason": "spike", "skipped": False, "bundle": None},
        {"event": "checkpoint", "step": 30, "folder": "step-0000030", "seconds": 1.5},
        {"event": "stage", "text": "the checkpoint of step 33 was not saved"},
        {"event": "stopping", "step": 31, "reason": "SIGTERM"},
    ]


def test_figures_go_to_the_tracker_and_to_the_file(tmp_path: Path) -> None:
    record, tracker = record_in(tmp_path)
    record.metrics({"train/loss/total": 2.0}, step=5, samples=50)
    record.validation({"val/loss/total": 3.0}, step=5, samples=50)
    record.picture("panels/step_5.png", plt.figure())
    record.close()
    plt.close("all")
    assert tracker.metrics == [({"train/loss/total": 2.0, "train/samples": 50.0}, 5), ({"val/loss/total": 3.0}, 5)]
    assert tracker.files == [(tmp_path / "panels" / "step_5.png", "panels/step_5.png")]
    progress, validation, picture = events_of(tmp_path)
    assert progress == {"event": "progress", "step": 5, "samples": 50, "metrics": {"train/loss/total": 2.0}}
    assert validation == {"event": "validation", "step": 5, "samples": 50, "metrics": {"val/loss/total": 3.0}}
    assert Path(picture["path"]).read_bytes().startswith(b"\x89PNG")


def test_what_a_killed_process_left_of_a_line_is_cut(tmp_path: Path) -> None:
    whole = json.dumps({"event": "stage", "text": "whole"})
    (tmp_path / EVENTS_FILE).write_text(f'{whole}\n{{"event": "progress", "met')
    record, _ = record_in(tmp_path)
    record.event("stage", text="after")
    record.close()
    assert [event["text"] for event in events_of(tmp_path)] == ["whole", "after"]

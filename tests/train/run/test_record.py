"""What a Record writes: the lines that launchers show and MLflow gets a copy of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from cromss_dist.errors import PreemptedError
from cromss_dist.tracking.package.folder import card_sha256, check_package
from cromss_dist.tracking.run.shipper import Delivery
from cromss_dist.tracking.run.spool import EVENTS_FILE, read_events, run_id_of
from cromss_dist.train.checkpoint.store import Committed
from cromss_dist.train.run import record as module
from cromss_dist.train.run.record import PARTING_IF_AWAY_S, PARTING_S, Record


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if name != "time"} for event in read_events(folder)]


def test_each_event_is_a_line_with_its_values(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        record.resumed(step=20, samples=200, folder="step-0000020", differences=("4 ranks, not 2",))
        record.bad_step(step=21, reason="loss is nan", bundle="replay/step-0000021")
        record.spike(step=22, reason="spike", skipped=False, bundle=None)
        record.savings([Committed(30, Path("step-0000030"), 1.5), "the checkpoint of step 33 was not saved"])
        record.stopping(step=31, reason="SIGTERM")
    assert events_of(tmp_path) == [
        {"event": "resumed", "step": 20, "samples": 200, "folder": "step-0000020", "differences": ["4 ranks, not 2"]},
        {"event": "bad_step", "step": 21, "reason": "loss is nan", "bundle": "replay/step-0000021"},
        {"event": "spike", "step": 22, "reason": "spike", "skipped": False, "bundle": None},
        {"event": "checkpoint", "step": 30, "folder": "step-0000030", "seconds": 1.5},
        {"event": "stage", "text": "the checkpoint of step 33 was not saved"},
        {"event": "stopping", "step": 31, "reason": "SIGTERM"},
    ]


def test_figures_pictures_data_and_encoders_are_lines(tmp_path: Path, encoder_package: Path) -> None:
    card = check_package(encoder_package)
    with Record(tmp_path) as record:
        record.metrics({"train/loss/total": 2.0}, step=5, samples=50)
        record.validation({"val/loss/total": 3.0}, step=5, samples=50)
        record.picture("panels/step_5.png", plt.figure())
        record.params({"seed": 0})
        record.dataset("a", "f" * 64, "/shards")
        record.register(tmp_path / "encoders" / "s2", card, "m", "candidate")
    plt.close("all")
    progress, validation, artifact, picture, params, dataset, register = events_of(tmp_path)
    assert progress == {"event": "progress", "step": 5, "samples": 50, "metrics": {"train/loss/total": 2.0}}
    assert validation == {"event": "validation", "step": 5, "samples": 50, "metrics": {"val/loss/total": 3.0}}
    assert artifact == {"event": "artifact", "path": "panels/step_5.png", "artifact": "panels/step_5.png"}
    assert Path(picture["path"]).read_bytes().startswith(b"\x89PNG")
    assert params == {"event": "params", "values": {"seed": 0}}
    assert dataset == {"event": "dataset", "name": "a", "digest": "f" * 64, "source": "/shards"}
    assert register == {
        "event": "register", "package": "encoders/s2", "card": card_sha256(card), "model": "m", "alias": "candidate",
    }  # fmt: skip


def test_starts_are_numbered_and_keep_the_runs_id(tmp_path: Path) -> None:
    for step in (0, 7):
        with Record(tmp_path) as record:
            record.begin("name", "cromss", {"world_size": "2"}, step)
            assert record.run_id == run_id_of(tmp_path)
    assert [event for event in events_of(tmp_path) if event["event"] in ("run", "attempt")] == [
        {"event": "run", "run": record.run_id, "name": "name", "experiment": "cromss"},
        {"event": "attempt", "number": 1, "step": 0},
        {"event": "attempt", "number": 2, "step": 7},
    ]


def test_what_a_killed_process_left_of_a_line_is_cut(tmp_path: Path) -> None:
    whole = json.dumps({"event": "stage", "text": "whole"})
    (tmp_path / EVENTS_FILE).write_text(f'{whole}\n{{"event": "progress", "met')
    with Record(tmp_path) as record:
        record.tell("after")
    assert [event["text"] for event in events_of(tmp_path)] == ["whole", "after"]


class FakeShipper:
    """Notes how it is closed."""

    closed: list[tuple[float, float | None]]

    def __init__(self, run_dir: Path, uri: str, tell: Callable[[str], None]) -> None:
        self.closed = made.setdefault(uri, [])

    def close(self, patience_s: float, patience_if_away_s: float | None = None) -> Delivery:
        self.closed.append((patience_s, patience_if_away_s))
        return Delivery("f" * 32, {"m": 1})


made: dict[str, list[tuple[float, float | None]]] = {}


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float | None]]:
    """How the shipper of the store `sqlite:///s` was closed."""
    made.clear()
    monkeypatch.setattr(module, "Shipper", FakeShipper)
    return made.setdefault("sqlite:///s", [])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), "FAILED"),
        (PreemptedError("stop"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(75), "KILLED"),
    ],
)
def test_an_exception_ends_the_run_with_its_status(
    tmp_path: Path, error: BaseException, status: str, closed: list[tuple[float, float | None]]
) -> None:
    with pytest.raises(type(error)), Record(tmp_path, "sqlite:///s") as record:  # noqa: PT012 - the block is what raises
        record.begin("name", "cromss", {}, 0)
        raise error
    last = events_of(tmp_path)[-1]
    assert (last["event"], last["status"]) == ("end", status)
    assert last["error"].startswith(type(error).__name__)
    assert closed == [(PARTING_S, PARTING_IF_AWAY_S)]


def test_a_run_that_finishes_waits_for_the_store_and_ends_once(tmp_path: Path, closed: list[tuple[float, float | None]]) -> None:
    with pytest.raises(OSError, match="disk"), Record(tmp_path, "sqlite:///s") as record:  # noqa: PT012
        record.begin("name", "cromss", {}, 0)
        assert record.finish(60.0) == Delivery("f" * 32, {"m": 1})
        raise OSError("disk")
    assert closed == [(60.0, None)]
    assert [event["status"] for event in events_of(tmp_path) if event["event"] == "end"] == ["FINISHED"]


def test_a_run_without_a_store_is_whole_in_its_folder(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        record.begin("name", "cromss", {}, 0)
        assert record.finish(60.0).run_id is None
    assert events_of(tmp_path)[-1]["status"] == "FINISHED"

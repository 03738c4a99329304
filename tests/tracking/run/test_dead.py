"""Runs that the store has as RUNNING and that are not (K7); a live one is never taken for dead."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cromss_dist.tracking.run.dead import end_from_outside, reap
from cromss_dist.tracking.run.replica import HEARTBEAT_TAG
from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool, read_events
from cromss_dist.tracking.store import connect
from cromss_dist.train.run.folder import holding
from tests.tracking.run.recorded import end, expected_points, stored_points, stored_run, write_attempt

OLDER_S = 900.0
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(store_uri: str, tmp_path: Path) -> MakeRun:
    def make(name: str, silent_s: float, run_dir: str | None = None) -> Path:
        """A run without an end, in the store as it was so long ago."""
        folder = tmp_path / name
        folder.mkdir()
        write_attempt(folder, range(1, 5))
        with Spool(folder) as spool:
            spool.append("tags", values={"run_dir": str(folder) if run_dir is None else run_dir})
        run_id = str(deliver(folder, store_uri).run_id)
        connect(store_uri).set_tag(run_id, HEARTBEAT_TAG, f"{time.time() - silent_s:.0f}")
        return folder

    return make


def reaped(uri: str, dry_run: bool = False) -> set[str]:
    return {run.name for run in reap(uri, holding, OLDER_S, dry_run)}


def test_the_dead_are_marked_and_the_living_are_not(store_uri: str, make_run: MakeRun, tmp_path: Path) -> None:
    runs = {
        "killed here": make_run("killed here", 300),
        "killed elsewhere": make_run("killed elsewhere", 1000, run_dir="/nowhere/run"),
        "held": make_run("held", 5000),
        "held, its lock not seen": make_run("held, its lock not seen", 100),
        "alive elsewhere": make_run("alive elsewhere", 800, run_dir="/nowhere/run"),
        "of another machine's folder": make_run("of another machine's folder", 800, run_dir=str(tmp_path / "killed here")),
        "ended": make_run("ended", 5000),
    }
    end(runs["ended"])
    deliver(runs["ended"], store_uri)
    foreign = connect(store_uri).create_run("0", start_time=0).info.run_id
    dead = {"killed here", "killed elsewhere"}
    with holding(runs["held"]) as held:
        assert held
        assert reaped(store_uri, dry_run=True) == dead
        assert {name for name, folder in runs.items() if stored_run(folder, store_uri).info.status == "RUNNING"} == (
            runs.keys() - {"ended"}
        ), "a dry run changes nothing"
        assert reaped(store_uri) == dead
        assert reaped(store_uri) == set()
    statuses = {name: stored_run(folder, store_uri).info.status for name, folder in runs.items()}
    assert statuses == dict.fromkeys(runs, "RUNNING") | dict.fromkeys(dead, "KILLED") | {"ended": "FINISHED"}
    assert connect(store_uri).get_run(foreign).info.status == "RUNNING", "not one of ours"
    assert list(read_events(runs["killed here"]))[-1]["status"] == "KILLED"
    assert list(read_events(runs["killed elsewhere"]))[-1]["event"] != "end"


def test_a_dead_run_gets_what_its_shipper_had_not_sent_and_can_go_on(store_uri: str, make_run: MakeRun) -> None:
    folder = make_run("run", 300)
    with Spool(folder) as spool:
        spool.append("progress", step=5, samples=20, metrics={"train/lr": 0.5})
    assert reaped(store_uri) == {"run"}
    assert stored_points(folder, store_uri) == expected_points(folder)
    write_attempt(folder, range(6, 8), number=2)
    deliver(folder, store_uri)
    assert stored_run(folder, store_uri).info.status == "RUNNING"
    assert stored_points(folder, store_uri) == expected_points(folder)


def test_a_run_is_ended_from_outside_once(tmp_path: Path) -> None:
    assert not end_from_outside(tmp_path, "KILLED", None), "nothing has begun"
    write_attempt(tmp_path, range(1, 3))
    assert end_from_outside(tmp_path, "FAILED", "WorkerError: lost")
    assert not end_from_outside(tmp_path, "KILLED", None)
    *_, last = read_events(tmp_path)
    assert (last["status"], last["error"]) == ("FAILED", "WorkerError: lost")


def test_a_dead_run_of_a_damaged_spool_is_marked_and_holds_up_no_other(store_uri: str, make_run: MakeRun) -> None:
    damaged, whole = make_run("damaged", 300), make_run("whole", 400)
    with (damaged / EVENTS_FILE).open("a") as file:
        file.write("{\n")
    assert reaped(store_uri) == {"damaged", "whole"}
    assert {stored_run(folder, store_uri).info.status for folder in (damaged, whole)} == {"KILLED"}

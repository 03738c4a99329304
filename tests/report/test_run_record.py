"""A run's folder is read as the run left it, whoever made it and however it ended."""

import json
from pathlib import Path

import numpy as np
import pytest

from cromss_dist.errors import ArchiveMissingError, StorageError
from cromss_dist.report.run_record import find_runs, read_run
from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool
from tests.report.run_folders import NUM_STEPS, panel, pretraining_run, transfer_run, write_spool


def test_facts_and_figures_are_those_of_the_spool(pretrainings: Path) -> None:
    run = read_run(pretrainings / "run-1")
    assert (run.name, run.state, run.error, run.attempts) == ("run-1", "FINISHED", None, 1)
    assert (run.steps, run.samples, run.total_samples) == (NUM_STEPS, 16 * NUM_STEPS, 16 * NUM_STEPS)
    assert run.config == {"name": "run-1", "seed": "1", "train.lr": "0.001"}
    assert run.datasets == (("shards", "d" * 64, "/data/shards"),)
    loss = run.series["train/loss/total"]
    np.testing.assert_array_equal(loss.samples, 16 * np.arange(1, NUM_STEPS + 1))
    np.testing.assert_allclose(loss.values, 9 / np.arange(1, NUM_STEPS + 1) + 1)
    assert run.last("val/miou_s2") == 0.6
    assert run.last("val/nothing") is None
    assert [(p.path.name, p.width, p.height) for p in run.pictures] == [
        (f"step_{step:07d}.png", 200, 100) for step in (0, NUM_STEPS // 2, NUM_STEPS)
    ]


def test_a_figure_that_a_run_going_on_computed_again_is_as_it_was_first(tmp_path: Path) -> None:
    figures = [{"event": "progress", "step": s, "samples": s, "metrics": {"a": value}} for s, value in ((1, 1.0), (2, 2.0))]
    again = [{"event": "progress", "step": s, "samples": s, "metrics": {"a": value}} for s, value in ((2, 9.0), (3, 3.0))]
    write_spool(
        tmp_path, {"event": "attempt", "number": 1, "step": 0}, *figures, {"event": "end", "status": "KILLED", "error": "x"}
    )
    assert read_run(tmp_path).error == "x"
    write_spool(tmp_path, {"event": "attempt", "number": 2, "step": 1}, {"event": "resumed", "step": 1}, *again)
    run = read_run(tmp_path)
    assert run.series["a"].values.tolist() == [1.0, 2.0, 3.0]
    assert (run.state, run.error, run.attempts) == ("no end recorded", None, 2)
    assert [incident.text for incident in run.incidents] == ["went on after step 1 from a checkpoint"]


def test_the_writer_of_spools_and_the_reader_agree(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spool.begin("a name", "an experiment")
        spool.append("progress", step=1, samples=4, metrics={"loss": float("nan")})
    run = read_run(tmp_path)
    assert run.name == "a name"
    assert np.isnan(run.last("loss") or 0)


def test_a_folder_without_a_spool_has_a_name_and_no_figures(tmp_path: Path) -> None:
    run = read_run(transfer_run(tmp_path / "scored"))
    assert (run.name, run.began, run.series) == ("scored", None, {})


@pytest.mark.parametrize(
    "event",
    [
        {"event": "progress", "step": "many", "samples": 1, "metrics": {}},
        {"event": "progress", "step": 1, "samples": 1, "metrics": {"a": [1]}},
        {"event": "progress", "step": 1, "samples": 1, "metrics": 3},
        {"event": "progress", "step": 1, "samples": 10**300, "metrics": {}},
        {"event": "end"},
        {"event": "tags", "values": None},
        {"event": "start", "total_samples": 1, "time": 1e300},
        {"event": "spike", "step": 3},
        {"kind": "none"},
    ],
    ids=json.dumps,
)
def test_a_line_that_no_run_writes_is_named(event: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).write_text(json.dumps({"time": 1.0, **event}) + "\n")
    with pytest.raises(StorageError, match="is no event of a run"):
        read_run(tmp_path)


def test_runs_are_found_at_any_depth_once_and_without_what_they_set_aside(tmp_path: Path) -> None:
    pretraining_run(tmp_path / "b" / "run", num_steps=1)
    write_spool(tmp_path / "b" / "run" / "before-1", {"event": "run", "name": "old", "run": "0"})
    transfer_run(tmp_path / "a" / "deep" / "run")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    found = find_runs([tmp_path, tmp_path / "b" / "run"])
    assert [str(run.relative_to(tmp_path)) for run in found] == ["a/deep/run", "b/run"]
    for folder in (tmp_path / "nothing", tmp_path / "b" / "run" / "panels"):
        with pytest.raises(ArchiveMissingError, match="no folder of a run, nor of runs"):
            find_runs([tmp_path, folder])


def test_pictures_that_do_not_decode_or_lie_elsewhere_are_not_shown(tmp_path: Path) -> None:
    run = pretraining_run(tmp_path / "run", num_steps=2)
    (run / "panels" / "cut.png").write_bytes(panel(tmp_path / "elsewhere.png").read_bytes()[:200])
    (run / "panels" / "text.png").write_text("no picture")
    (run / "panels" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    huge = bytearray(panel(tmp_path / "huge.png").read_bytes())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height
    (run / "panels" / "huge.png").write_bytes(huge)
    record = read_run(run)
    assert record.unreadable == ("cut.png", "huge.png", "link.png", "text.png")
    assert len(record.pictures) == 3

"""What a launcher shows of a run, from its events alone."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool, read_events
from cromss_dist.train.run.watch import watching


def test_events_become_lines_off_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with watching(tmp_path, Console(file=out, width=200)), Spool(tmp_path) as spool:
        spool.append("stage", text="2 x cpu")
        spool.append("start", total_samples=1000)
        for samples in range(10, 1010, 10):
            metrics = {"train/loss/total": 2.5, "perf/samples_per_s": 40.0}
            spool.append("progress", step=samples // 10, samples=samples, metrics=metrics)
        metrics = {"val/loss/total": 3.25, "val/miou_s1": 0.25, "val/miou_s2": 0.5}
        spool.append("validation", step=100, samples=1000, metrics=metrics)
        spool.append("an event of a later version", text="is passed over")
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "2 x cpu"
    assert sum("training" in line for line in lines) == 10
    assert "training 100%  1000 samples  loss 2.500  40.0/s" in lines[-2]
    assert "validation after 1000 samples: loss 3.250  mIoU, noisy labels: S1 0.250 S2 0.500" in lines[-1]
    assert "clean truth" not in out.getvalue()


def test_a_line_that_is_still_being_written_waits_for_its_end(tmp_path: Path) -> None:
    out = io.StringIO()
    path = tmp_path / EVENTS_FILE
    path.write_text('{"event": "stage", "te')
    with watching(tmp_path, Console(file=out)), path.open("a") as file:
        file.write('xt": "whole"}\n')
    assert out.getvalue().strip() == "whole"


def test_a_run_without_events_shows_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    with watching(tmp_path, Console(file=out)):
        pass
    assert out.getvalue() == ""


METRICS = {
    "train/loss/total": 2.5,
    "perf/samples_per_s": 40.0,
    "train/kept_s1": 0.625,
    "train/kept_s2": 0.5,
    "train/agreement": 0.81,
    "train/grad_norm": 1.234,
    "perf/data_wait_s": 0.02,
    "perf/step_s": 0.5,
    "train/skipped_steps": 2.0,
}
FIGURES = "loss 2.500  40.0/s  kept S1 62% S2 50%  agree 81%  gradient 1.23  data wait 4%  skipped 2"


def progress(samples: int, **metrics: float) -> dict[str, Any]:
    return {"event": "progress", "time": 10.0, "step": samples // 10, "samples": samples, "metrics": METRICS | metrics}


START = {"event": "start", "time": 0.0, "total_samples": 1000}


def shown(tmp_path: Path, events: list[dict[str, Any]], width: int, terminal: bool = False) -> str:
    """What a console shows of events, without the codes that move a terminal's cursor."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    with watching(tmp_path, console), (tmp_path / EVENTS_FILE).open("a") as file:
        for event in events:
            file.write(json.dumps(event) + "\n")
    return re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", out.getvalue().replace("\r", "\n")).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_shows_every_figure_whole_and_nothing_beyond_its_width(tmp_path: Path, width: int) -> None:
    saved = {"event": "checkpoint", "step": 120, "folder": "step-0000120", "seconds": 1.5}
    text = shown(tmp_path, [START, saved, progress(250)], width, terminal=True)
    lines = text.rstrip().splitlines()
    assert max(map(len, lines)) <= width
    last = text[text.rindex("training") :]
    for figure in [*FIGURES.split("  "), "saved step 120"]:
        assert sum(figure in line for line in last.splitlines()) == 1, figure
    assert len(last.splitlines()) == {40: 5, 80: 3, 200: 2}[width]


def test_off_a_terminal_a_line_has_all_figures_whatever_its_width(tmp_path: Path) -> None:
    text = shown(tmp_path, [START, progress(500)], width=40)
    assert text == f"  training  50%  500 samples  {FIGURES}\n"


def test_off_a_terminal_a_slow_run_has_a_line_every_ten_minutes(tmp_path: Path) -> None:
    events = [progress(minute) | {"time": 60.0 * minute} for minute in range(1, 35)]
    text = shown(tmp_path, [START, *events], width=200)
    assert re.findall(r"(\d+) samples", text) == ["10", "20", "30"]


def test_a_figure_that_a_run_does_not_have_is_left_out(tmp_path: Path) -> None:
    event = progress(500, **{"train/skipped_steps": 0.0})
    for name in ("train/grad_norm", "train/kept_s2", "train/loss/total"):  # an interval of skipped steps, say
        del event["metrics"][name]
    text = shown(tmp_path, [START, event], width=40)
    assert text == "  training  50%  500 samples  40.0/s  agree 81%  data wait 4%\n"


def test_what_goes_wrong_is_said_in_a_line_each(tmp_path: Path) -> None:
    events = [
        START,
        {"event": "resumed", "step": 20, "samples": 200, "folder": "step-0000020", "differences": ["4 ranks, not 2", "bf16"]},
        {"event": "bad_step", "step": 21, "reason": "loss is nan", "bundle": "my runs/a/replay/step-0000021"},
        {"event": "bad_step", "step": 22, "reason": "loss is inf", "bundle": None},
        {"event": "spike", "step": 23, "reason": "spike: loss is 99", "skipped": True, "bundle": None},
        {"event": "spike", "step": 24, "reason": "spike: loss is 98", "skipped": False, "bundle": None},
        {"event": "stopping", "step": 25, "reason": "SIGTERM"},
    ]
    assert shown(tmp_path, events, width=40).splitlines() == [
        "  goes on after step 20 from step-0000020, with 4 ranks, not 2, bf16",
        "  step 21 skipped: loss is nan; cromss replay 'my runs/a/replay/step-0000021'",
        "  step 22 skipped: loss is inf",
        "  step 23 skipped: spike: loss is 99",
        "  step 24: spike: loss is 98",
        "  stops after step 25: SIGTERM",
    ]


def test_what_a_folder_says_of_an_earlier_start_is_not_shown_again(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spool.append("stage", text="of before")
        spool.append("start", total_samples=1000)
    again = [START, progress(600)]
    text = shown(tmp_path, [*again, *again], width=200)
    assert text.count("training") == 1
    assert "of before" not in text
    assert [event["event"] for event in read_events(tmp_path)] == ["stage", "start", *["start", "progress"] * 2]

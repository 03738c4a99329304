"""What a launcher shows of a run, from its events alone."""

import io
from pathlib import Path

from rich.console import Console

from cromss_dist.train.record import EVENTS_FILE, append_event
from cromss_dist.train.watch import watching


def test_events_become_lines_off_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with watching(tmp_path, Console(file=out, width=200)), (tmp_path / EVENTS_FILE).open("a") as file:
        append_event(file, "stage", text="2 x cpu")
        append_event(file, "start", total_samples=1000)
        for samples in range(10, 1010, 10):
            metrics = {"train/loss/total": 2.5, "perf/samples_per_s": 40.0}
            append_event(file, "progress", step=samples // 10, samples=samples, metrics=metrics)
        metrics = {"val/loss/total": 3.25, "val/miou_s1": 0.25, "val/miou_s2": 0.5}
        append_event(file, "validation", step=100, samples=1000, metrics=metrics)
        append_event(file, "an event of a later version", text="is passed over")
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

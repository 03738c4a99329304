"""The synth command: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest

from cromss_dist.errors import main_guard
from tools import synth

TINY = ["--locations", "1", "--size-px", "48", "--workers", "1"]


def test_it_writes_the_archive_and_prints_its_main_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "archive"
    assert synth.main([str(out), *TINY, "--seed", "4", "--noise", "uniform"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["seed"] == 4
    assert report["config"]["noise"] == "uniform"
    assert f"{100 * report['report']['noise_rate']:.1f}" in printed
    assert "by confusion" in printed
    assert "| seed | 4 |" in (out / "README.md").read_text()


def test_an_existing_folder_is_refused_in_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main_guard(lambda: synth.main([str(tmp_path), *TINY]))
    error = capsys.readouterr().err
    assert code == 4
    assert error.startswith("OutputExistsError: ")
    assert error.count("\n") == 1


def test_a_size_that_does_not_divide_is_refused_with_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main_guard(lambda: synth.main([str(tmp_path / "new"), "--size-px", "256"]))
    assert code == 2
    assert "multiple of 6" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_help_explains_noise_and_shows_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        synth.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "image-only" in text
    assert "python tools/synth.py" in text

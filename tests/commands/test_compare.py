"""`cromss compare`: what it prints and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cromss_dist.cli import main
from tests.transfer.made_results import made_run, made_tiles


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two encoders, two seeds each, one of them without a partner."""
    for variant, accuracy, seeds in (("plain", 0.6, (0, 1, 2)), ("cromss", 0.7, (0, 1))):
        for seed in seeds:
            made_run(tmp_path / variant / f"seed{seed}", accuracy, variant=variant, seed=seed, tiles_seed=seed)
    return tmp_path


def test_tables_have_runs_differences_classes_and_the_papers_figures(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(runs / "cromss"), "--against", str(runs / "plain"), "--paper", "--classes", "--replicates", "200"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for text in (
        "deeplabv3plus", "10 %", "paper: CromSS, late fusion, 9 bands", "60.93 +- 0.60", "mF1", "over tiles",
        "cromss minus plain, in points", "2 / 0 of 2", "IoU crops", "left out of the differences: 1.",
    ):  # fmt: skip
        assert text in printed


def test_json_has_the_same_as_shares(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["compare", str(runs / "cromss"), str(runs / "plain"), "--against", str(runs / "plain"), "--paper", "--json"]) == 0
    )
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    by_name = {line["name"]: line for line in content["lines"]}
    assert [len(by_name[name]["runs"]) for name in ("cromss", "plain")] == [2, 3]  # given on both sides, counted once
    (comparison,) = content["comparisons"]
    difference = comparison["metrics"]["miou"]
    assert 0 < difference["interval"]["low"] < difference["spread"]["mean"] < difference["interval"]["high"] < 1
    assert {one["mode"] for one in content["paper"]} == {"frozen"}


def test_one_run_has_no_spread_and_says_so_by_null(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "plain" / "seed0"), "--json", "--among", "water, trees"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert line["spread"]["miou"]["std"] is None
    assert [*line["iou"]] == ["water", "trees"]


def test_what_makes_figures_less_than_they_seem_is_told_below_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, steps in enumerate((400, 400, 800)):
        made_run(tmp_path / str(number), tiles=made_tiles(0.6, number=1), steps=steps)
    assert main(["compare", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for note in ("there is one test tile", "runs of 400, 800 steps are taken together", "3 runs have label seed, seed and"):
        assert note in printed


def test_a_setting_that_the_paper_has_not_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "run", task="town")
    assert main(["compare", str(tmp_path), "--paper"]) == 0
    assert "No published figure is known here for town, s2, frozen." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["nowhere"], 23, "ResultError: nowhere has no scores.json"),
        (["plain", "--against", "plain"], 23, "ResultError: both sides are of plain"),
        (["plain", "--among", "wood"], 23, "ResultError: classes to score: wood"),
        (["plain", "--level", "95"], 2, "ConfigError: level=95.0 is not allowed"),
    ],
)
def test_errors_are_one_paragraph_and_an_exit_code(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int, told: str
) -> None:
    monkeypatch.chdir(runs)
    assert main(["compare", *words]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(told)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_what_anyone_wrote_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "one", 0.7, variant="\x1b[31m[bold]evil")
    made_run(tmp_path / "other", 0.6, variant="plain")
    assert main(["compare", str(tmp_path / "one"), "--against", str(tmp_path / "other")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[bold]evil" in printed


@pytest.mark.slow
def test_comparing_imports_no_torch(runs: Path) -> None:
    code = """
import sys
from cromss_dist.cli import main
code = main(["compare", sys.argv[1], "--json"])
print([name for name in ("torch", "deepspeed", "ray", "mlflow") if name in sys.modules], code)
"""
    done = subprocess.run([sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr

"""The tables and the figure of given findings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.method.findings import Findings
from benchmarks.method.page import draw, page
from benchmarks.method.plan import RANDOM, SIZES, Setting, pretraining_of
from benchmarks.method.verdict import gates, paired_differences
from cromss_dist.noise.detection import Cleaning, Detection, trivial_scores
from cromss_dist.schema import CLASS_NAMES, NOISE_KINDS
from cromss_dist.train.figures.scores import Scores
from cromss_dist.transfer.results import TransferResult
from cromss_dist.transfer.statistics import Resampling
from tests.transfer.made_results import NAMES, made_run

S2, TUNED = Setting("s2", "frozen", 8, "light"), Setting("s2", "finetuned", 32, "unet")
ACCURACY = {RANDOM: 0.4, "plain": 0.6, "cromss": 0.62, "clean": 0.8}
SIZE = replace(SIZES["smoke"], settings=(S2, TUNED), seeds=2, subsets=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Setting, list[TransferResult]]:
    """Of four variants and two seeds, alike in both settings."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        setting: [
            made_run(folder / setting.name / f"{variant}-{seed}", accuracy, seed=seed, variant=variant, decoder=setting.decoder)
            for variant, accuracy in ACCURACY.items()
            for seed in range(2)
        ]
        for setting in SIZE.settings
    }


@pytest.fixture(scope="module")
def found(results: dict[Setting, list[TransferResult]]) -> Findings:
    """What these results show, with a detector that knows a little."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (4, 4, 32, 32), np.uint8)
    wrong = rng.random(truth.shape) < 0.3
    label = np.where(wrong, (truth + 1) % 3, truth).astype(np.uint8)
    detection = Detection(CLASS_NAMES)
    score = np.clip(0.6 * wrong + 0.4 * rng.random(truth.shape), 0, 1)
    detection.add(label, truth, {"refined_s2": score} | trivial_scores(label), np.where(wrong, 2, 0).astype(np.uint8))
    detectors = {name: told.to_json() for name, told in detection.scores().items()}
    shares = dict.fromkeys(CLASS_NAMES, 1 / 9)
    report: dict[str, Any] = {
        "class_shares": shares,
        "noise_by_class": dict.fromkeys(CLASS_NAMES, None) | {"water": 0.1},
        "noise_rate": 0.3,
        "noise_by_kind": dict.fromkeys(NOISE_KINDS[1:], 0.07),
        "seasons_agree": 0.3,
        "noise_where_seasons_agree": 0.06,
    }
    names = [pretraining_of(variant, seed).name for variant in SIZE.variants for seed in range(2)]
    segmenter = Scores.of(np.eye(9, dtype=np.int64), CLASS_NAMES)
    differences = paired_differences(results, NAMES[:2], Resampling(replicates=100))
    return Findings(
        size=SIZE,
        data={"pretraining-default": {"report": report}, "test-default": {"report": report}},
        separability={"s1": {"oa": 0.4, "miou": 0.2}},
        common=NAMES[:2],
        segmenters={name: dict.fromkeys(("s1", "s2", "mean"), segmenter) for name in names},
        detection=dict.fromkeys(names, detectors),
        relabelling={name: {"drop": Cleaning(200, 60, 20, dropped=100).to_json()} for name in names},
        results=results,
        differences=differences,
        gates=gates(differences, [detectors]),
    )


def test_each_variant_is_held_against_none_against_plain_and_against_the_method_and_no_pair_comes_twice(found: Findings) -> None:
    pairs = set(found.differences[S2])
    assert pairs == {
        ("plain", RANDOM), ("cromss", RANDOM), ("clean", RANDOM), ("cromss", "plain"), ("clean", "plain"), ("clean", "cromss"),
    }  # fmt: skip


def test_differences_are_of_common_classes_and_of_runs_with_one_seed(found: Findings) -> None:
    of = {(run.name, run.seed): Scores.of(run.matrix, NAMES, found.common).mean_iou for run in found.results[S2]}
    expected = [of["clean", seed] - of["plain", seed] for seed in range(2)]
    assert found.differences[S2]["clean", "plain"].pairs == pytest.approx(expected)


def test_the_page_has_every_table_and_each_row_as_many_cells_as_its_header(found: Findings) -> None:
    lines = page(found)
    titles = [line for line in lines if line.startswith("## ")]
    assert len(titles) == 7
    width = 0
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            width = width if before.startswith("|") else line.count("|")
            assert line.count("|") == width
    assert "nan" not in " ".join(lines)
    assert any(line.startswith("| clean - cromss | ") for line in lines)
    assert "| cromss | drop | 30.0 | 20.0 | 50.0 | 0.0 | 0.0 |" in lines
    assert sum("other seasons" in line for line in lines if line.startswith("|")) == 1  # no model: the same for all


def test_the_page_says_whether_the_gates_hold(found: Findings) -> None:
    assert found.holds
    assert "**no**" not in " ".join(page(found))
    failed = replace(found, gates=[replace(gate, limit=1e3 if gate.at_least else -1) for gate in found.gates])
    assert not failed.holds
    assert " ".join(page(failed)).count("**no**") == len(failed.gates)


def test_what_is_written_for_scripts_is_json(found: Findings) -> None:
    told = found.to_json()
    assert told["differences"][S2.name]["clean - plain"]["positive"] == 2
    assert len(told["transfer"][TUNED.name]) == 8


def test_the_figure_shows_every_variant_in_every_setting(found: Findings, tmp_path: Path) -> None:
    figure = draw(found)
    scores, differences = figure.axes
    assert len(scores.lines) == 2 * 2 * 4 + 1  # dots and a mean of each; what parts the settings
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ACCURACY)
    assert len(differences.lines) == 2 * 2 * 2 + 1 + 2  # also zero and the limit
    figure.savefig(tmp_path / "figure.png")

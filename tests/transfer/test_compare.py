"""Only what shares all but the encoder is compared, and differences are those of the pairs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cromss_dist.errors import ResultError
from cromss_dist.transfer.compare import Difference, Setting, compare, summarise
from cromss_dist.transfer.results import LabelsUsed, TransferResult
from cromss_dist.transfer.statistics import Interval, Resampling
from tests.transfer.made_results import made_run

HOW = Resampling(replicates=200)
SEEDS = (0, 1, 2)


def side(folder: Path, variant: str, accuracy: float, seeds: tuple[int, ...] = SEEDS, **changed: Any) -> list[TransferResult]:
    """Runs of one variant, each seed with labels and test pixels of its own hardness."""
    return [
        made_run(folder / f"{variant}-{seed}", accuracy - 0.05 * seed, variant=variant, seed=seed, labels_seed=seed, **changed)
        for seed in seeds
    ]


@pytest.fixture
def plain(tmp_path: Path) -> list[TransferResult]:
    return side(tmp_path, "plain", 0.70)


@pytest.fixture
def cromss(tmp_path: Path) -> list[TransferResult]:
    return side(tmp_path, "cromss", 0.75)


def test_a_line_is_the_spread_over_the_runs_of_an_encoder(plain: list[TransferResult], cromss: list[TransferResult]) -> None:
    lines = summarise([*plain, *cromss], HOW)
    assert [line.name for line in lines] == ["cromss", "plain"]
    values = [run.scores.mean_iou for run in plain]
    assert lines[1].runs == tuple(plain)
    assert lines[1].spread["miou"].mean == pytest.approx(np.mean(values))
    assert lines[1].spread["miou"].std == pytest.approx(np.std(values, ddof=1))
    assert lines[1].interval["miou"].value == pytest.approx(np.mean(values))
    assert lines[1].iou["trees"].mean == pytest.approx(np.mean([run.scores.iou["trees"] for run in plain]))


def test_settings_are_not_mixed(tmp_path: Path, plain: list[TransferResult]) -> None:
    others = [
        made_run(tmp_path / "tuned", variant="plain", mode="finetuned"),
        made_run(tmp_path / "more", variant="plain", labels=LabelsUsed(200, "d")),
        made_run(tmp_path / "fpn", variant="plain", decoder="fpn"),
        made_run(tmp_path / "paper", variant="plain", protocol="paper"),
    ]
    lines = summarise([*plain, *others], HOW)
    assert sorted(len(line.runs) for line in lines) == [1, 1, 1, 1, 3]
    assert len({line.setting for line in lines}) == 5
    assert str(Setting.of(plain[0])) == "dw, s2, frozen, default protocol, deeplabv3plus, labels: 10 %"


def test_a_difference_is_that_of_the_pairs(plain: list[TransferResult], cromss: list[TransferResult]) -> None:
    (found,) = compare(cromss, plain[::-1], HOW)  # whatever the order
    expected = [one.scores.mean_iou - other.scores.mean_iou for one, other in zip(cromss, plain, strict=True)]
    difference = found.metrics["miou"]
    assert (found.first, found.second, found.alone) == ("cromss", "plain", 0)
    assert found.seeds == tuple((seed, seed, 0) for seed in SEEDS)
    assert difference.pairs == pytest.approx(tuple(expected))
    assert difference.spread.mean == pytest.approx(np.mean(expected))
    assert difference.spread.std == pytest.approx(np.std(expected, ddof=1))
    assert (difference.positive, difference.negative) == (3, 0)
    assert difference.interval.value == pytest.approx(np.mean(expected))
    assert difference.interval.low < difference.interval.value < difference.interval.high
    crops = [one.scores.iou["crops"] - other.scores.iou["crops"] for one, other in zip(cromss, plain, strict=True)]
    assert found.iou["crops"].pairs == pytest.approx(tuple(crops))
    # Accuracies fall from seed to seed by as much as the encoders differ: unpaired, the difference would drown.
    assert difference.spread.std < 0.5 * summarise(plain, HOW)[0].spread["miou"].std


def test_equal_differences_count_for_neither_side() -> None:
    difference = Difference.of([0.1, 0.0, -0.1, math.nan], Interval(0, 0, 0))
    assert (difference.positive, difference.negative, difference.spread.runs) == (1, 1, 3)


def test_common_classes_hold_on_both_sides(plain: list[TransferResult], cromss: list[TransferResult]) -> None:
    (found,) = compare(cromss, plain, HOW, among=["water", "crops"])
    assert [*found.iou] == ["water", "crops"]
    mean = (found.iou["water"].spread.mean + found.iou["crops"].spread.mean) / 2
    assert found.metrics["miou"].spread.mean == pytest.approx(mean)
    assert found.metrics["miou"].interval.value == pytest.approx(mean)
    assert [*summarise(plain, HOW, ["water"])[0].iou] == ["water"]


def test_runs_without_a_partner_are_told(tmp_path: Path, plain: list[TransferResult]) -> None:
    (found,) = compare(side(tmp_path, "cromss", 0.8, seeds=(1, 2, 5)), plain, HOW)
    assert [seeds[0] for seeds in found.seeds] == [1, 2]
    assert found.alone == 2


def test_replicates_of_the_pretraining_make_their_own_pairs(tmp_path: Path) -> None:
    runs = {
        name: [made_run(tmp_path / f"{name}{i}", accuracy, variant=name, replicate=i) for i in range(2)]
        for name, accuracy in (("one", 0.7), ("other", 0.6))
    }
    (found,) = compare(runs["one"], runs["other"], HOW)
    assert found.seeds == ((0, 0, 0), (0, 0, 1))


def test_every_encoder_is_held_against_every_other_of_the_second_side(
    plain: list[TransferResult], cromss: list[TransferResult], tmp_path: Path
) -> None:
    random = side(tmp_path, "random", 0.4)
    found = compare([*cromss, *plain, *random], [*plain, *random], HOW)
    assert sorted((one.first, one.second) for one in found) == [
        ("cromss", "plain"), ("cromss", "random"), ("plain", "random"), ("random", "plain"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"labels": LabelsUsed(20, "f" * 64, 0.1)}, "labels is LabelsUsed"),
        ({"train_digest": "x"}, "train_digest is"),
        ({"test_digest": "x"}, "test_digest is"),
        ({"class_names": ("sea", "trees", "crops")}, "class_names is"),
        ({"steps": 800}, "steps is 800 in one and 400 in the other"),
        ({"samples": 1}, "samples is 1 in one"),
        ({"mode": "finetuned"}, "no setting is on both sides.*finetuned.*against.*frozen"),
        ({"seed": 4}, r"no run of one side has.*\(0, 4, 0\).*against.*\(0, 0, 0\)"),
        ({"variant": "plain"}, "both sides are of plain"),
    ],
)
def test_what_cannot_be_paired_is_refused_and_says_why(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    other = made_run(tmp_path / "other", variant="plain")
    one = made_run(tmp_path / "one", **{"variant": "cromss"} | changed)
    with pytest.raises(ResultError, match=told):
        compare([one], [other], HOW)


def test_two_runs_that_could_be_of_one_pair_are_refused(tmp_path: Path, plain: list[TransferResult]) -> None:
    twice = [made_run(tmp_path / name, variant="cromss") for name in ("a", "b")]
    with pytest.raises(ResultError, match=r"cromss has 2 runs with label seed, seed and replicate \(0, 0, 0\)"):
        compare(twice, plain, HOW)


def test_a_line_over_different_test_sets_is_refused(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / name, seed=seed, test_digest=name * 64) for seed, name in enumerate("ab")]
    with pytest.raises(ResultError, match="cannot be taken together: test_digest"):
        summarise(runs, HOW)

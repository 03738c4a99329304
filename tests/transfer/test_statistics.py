"""Intervals against SciPy's bootstrap and known truth, and what may be taken together."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import bootstrap as scipy_bootstrap

from cromss_dist.errors import ConfigError, ResultError
from cromss_dist.train.figures.scores import METRICS, Scores, Values
from cromss_dist.transfer import statistics
from cromss_dist.transfer.results import EncoderUsed, LabelsUsed, Tiles
from cromss_dist.transfer.statistics import (
    Resampling,
    Spread,
    bootstrap,
    estimate,
    estimate_difference,
    evidence_of,
    resampled_sums,
)
from tests.transfer.made_results import NAMES, S2, made_result, made_tiles


def ratio(sums: npt.NDArray[Any]) -> Values:
    """Overall accuracy of (right, all) counts."""
    return np.asarray(sums[..., :1] / sums[..., 1:], np.float64)


@pytest.fixture(scope="module")
def counts() -> npt.NDArray[np.int64]:
    """Right and all pixels of 60 tiles that differ in size and difficulty."""
    generator = np.random.default_rng(3)
    everything = generator.integers(50, 400, 60)
    return np.stack([generator.binomial(everything, generator.beta(8, 4, 60)), everything], 1)


def test_the_interval_is_that_of_scipys_bootstrap(counts: npt.NDArray[np.int64]) -> None:
    low, high = bootstrap(counts, ratio, Resampling(level=0.9, replicates=20_000))
    theirs = scipy_bootstrap(
        (counts[:, 0], counts[:, 1]),
        lambda right, everything, axis: right.sum(axis) / everything.sum(axis),
        paired=True, vectorized=True, method="percentile", confidence_level=0.9, n_resamples=20_000, rng=1,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert low[0] == pytest.approx(theirs.low, abs=0.02 * width)
    assert high[0] == pytest.approx(theirs.high, abs=0.02 * width)


def test_an_interval_of_level_nine_tenths_covers_the_truth_about_nine_times_in_ten() -> None:
    generator, covered = np.random.default_rng(5), 0
    for trial in range(300):
        right = generator.binomial(100, generator.beta(8, 4, 100))  # the mean of beta(8, 4) is 2 / 3
        low, high = bootstrap(np.stack([right, np.full(100, 100)], 1), ratio, Resampling(0.9, 400, trial))
        covered += bool(low[0] <= 2 / 3 <= high[0])
    assert 0.86 <= covered / 300 <= 0.94


def test_drawn_sums_are_whole_test_sets_and_the_same_however_they_are_cut(
    counts: npt.NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Resampling(replicates=150, seed=4)
    (sums,) = resampled_sums(counts, how)
    drawn = np.random.default_rng(4).integers(60, size=(150, 60))
    assert (sums == np.stack([counts[tiles].sum(0) for tiles in drawn])).all()
    monkeypatch.setattr(statistics, "_BLOCK", 7 * 60)
    parts = [*resampled_sums(counts, how)]
    assert [len(part) for part in parts] == [*[7] * 21, 3]
    assert (np.concatenate(parts) == sums).all()
    assert (np.concatenate([*resampled_sums(counts, replace(how, seed=5))]) != sums).any()


def test_equal_tiles_have_no_width() -> None:
    tiles = Tiles.of({f"t{i}": np.array([[8, 1, 1], [2, 7, 1], [0, 0, 10]]) for i in range(5)})
    found = estimate([tiles], Resampling(replicates=100))
    for interval in (*found.metrics.values(), *found.iou):
        assert interval.low == pytest.approx(interval.value, abs=1e-12)
        assert interval.high == pytest.approx(interval.value, abs=1e-12)


def test_an_estimate_is_the_mean_of_the_runs_scores() -> None:
    runs = [made_tiles(0.5), made_tiles(0.8)]
    found, scores = estimate(runs, Resampling(replicates=200)), [Scores.of(run.confusion.sum(0), NAMES) for run in runs]
    for metric in METRICS:
        interval = found.metrics[metric]
        assert interval.value == pytest.approx(np.mean([s.metric(metric) for s in scores]), abs=1e-12)
        assert interval.low < interval.value < interval.high
    assert [iou.value for iou in found.iou] == pytest.approx([np.mean([s.iou[name] for s in scores]) for name in NAMES])


def test_what_makes_tiles_hard_for_both_cancels_in_a_difference() -> None:
    generator = np.random.default_rng(7)
    easy = generator.integers(20, 300, 40)  # right pixels of the second; the first has 10 more in every tile

    def tiles(right: npt.NDArray[np.int64]) -> Tiles:
        return Tiles.of({f"t{i:02}": np.array([[r, 320 - r], [0, 320]]) for i, r in enumerate(right)})

    first, second = tiles(easy + 10), tiles(easy)
    difference = estimate_difference([(first, second)], Resampling()).metrics["oa"]
    apart = estimate([first], Resampling()).metrics["oa"]
    assert difference.value == pytest.approx(10 / 640)
    assert difference.low == pytest.approx(difference.high) == pytest.approx(10 / 640)
    assert apart.high - apart.low > 0.05
    swapped = estimate_difference([(second, first)], Resampling()).metrics["miou"]
    straight = estimate_difference([(first, second)], Resampling()).metrics["miou"]
    assert (swapped.low, swapped.high) == pytest.approx((-straight.high, -straight.low))


def test_a_class_that_some_draws_lack_has_an_interval_of_the_others_and_one_in_no_tile_has_none() -> None:
    matrices = {f"t{i}": np.diag([9, 0, 0]) + np.eye(3, k=1, dtype=int) * [0, 1, 0] for i in range(4)}
    matrices["t0"] = np.array([[9, 0, 0], [3, 5, 0], [0, 0, 0]])  # trees are in this tile only
    found = estimate([Tiles.of(matrices)], Resampling(replicates=200))
    assert not math.isnan(found.iou[1].low)
    assert all(math.isnan(end) for end in (found.iou[2].value, found.iou[2].low, found.iou[2].high))


def test_runs_on_other_tiles_are_not_taken_together() -> None:
    with pytest.raises(ResultError, match=r"different tiles \(12 and 13, 1 of them in one only\)"):
        estimate([made_tiles(0.6), made_tiles(0.6, number=13)], Resampling())


def test_one_tile_has_a_figure_without_an_interval_and_is_no_evidence() -> None:
    tiles = made_tiles(0.6, number=1)
    found = estimate([tiles], Resampling()).metrics["oa"]
    assert found.value == pytest.approx(np.trace(tiles.total) / np.sum(tiles.total))
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    with pytest.raises(ResultError, match="an interval over 1 test tile says nothing"):
        bootstrap(tiles.confusion, lambda sums: sums.sum((1, 2))[:, None], Resampling())
    with pytest.raises(ResultError, match="score at least two"):
        evidence_of([made_result(tiles)], [tiles], "run")


@pytest.mark.parametrize("given", [{"level": 1.0}, {"level": 0.0}, {"replicates": 99}, {"seed": -1}])
def test_a_resampling_out_of_range_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}=.* is not allowed"):
        Resampling(**given)


def test_a_spread_is_the_sample_standard_deviation_of_what_has_a_figure() -> None:
    spread = Spread.of([0.5, 0.7, math.nan])
    assert (spread.mean, spread.std) == pytest.approx((0.6, math.sqrt(0.02)))
    assert spread.runs == 2
    assert math.isnan(Spread.of([0.5]).std)
    assert math.isnan(Spread.of([]).mean)


def test_evidence_is_the_mean_of_repeated_runs_with_its_interval() -> None:
    tiles = [made_tiles(0.6), made_tiles(0.7)]
    runs = [made_result(each, seed=seed) for seed, each in enumerate(tiles)]
    evidence = evidence_of(runs, tiles, "run7")
    found = estimate(tiles, Resampling()).metrics["miou"]
    assert (evidence.value, evidence.low, evidence.high) == (found.value, found.low, found.high)
    assert (evidence.key, evidence.runs, evidence.samples) == ("dw-10pct.frozen.miou", 2, 12)
    assert (evidence.manifest_digest, evidence.source) == ("b" * 64, "run7")
    for labels, dataset in ((LabelsUsed(9, ""), "dw"), (LabelsUsed(9, "", per_class=5), "dw-5shot")):
        run = made_result(tiles[0], labels=labels, mode="linear")
        assert evidence_of([run], tiles[:1], "x", "oa").key == f"{dataset}.linear.oa"
    paper = made_result(tiles[0], labels=LabelsUsed(9, ""), protocol="paper")
    assert evidence_of([paper], tiles[:1], "x").dataset == "dw-paper"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"encoders": {"s2": replace(S2, init="random")}}, "random resnet18, 3 bands is random"),
        ({"encoders": {"s2": S2, "s1": EncoderUsed("s1", "pretrained", "resnet18", ("VV",))}}, "is two together"),
        ({"mode": "knn"}, "mode 'knn' gives no evidence"),
    ],
)
def test_what_measures_no_one_encoder_gives_no_evidence(changed: dict[str, Any], told: str) -> None:
    tiles = made_tiles(0.6)
    with pytest.raises(ResultError, match=told):
        evidence_of([made_result(tiles, **changed)], [tiles], "x")


def test_runs_of_different_transfers_give_no_evidence_together() -> None:
    tiles = made_tiles(0.6)
    with pytest.raises(ResultError, match="2 runs of 2 different ones"):
        evidence_of([made_result(tiles), made_result(tiles, mode="finetuned")], [tiles] * 2, "x")

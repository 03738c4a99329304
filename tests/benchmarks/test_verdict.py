"""What the proof concludes from given differences."""

import math
from typing import Any

import pytest

from benchmarks.method.plan import RANDOM, SIZES, Setting
from benchmarks.method.verdict import Differences, Gate, able_settings, gates, in_words, pairs_of, points
from cromss_dist.transfer.compare import Difference
from cromss_dist.transfer.statistics import Interval

S2, S1 = Setting("s2", "frozen", 32, "light"), Setting("s1", "frozen", 32, "light")
TUNED = Setting("s2", "finetuned", 32, "unet")


def difference(*points: float) -> Difference:
    return Difference.of([point / 100 for point in points], Interval(math.nan, math.nan, math.nan))


def differences(method: float = 0.0, clean: float = 5.0, random: float = 10.0) -> Differences:
    """Equal in all settings."""
    of = {("cromss", "plain"): method, ("clean", "plain"): clean, ("cromss", RANDOM): random}
    return {setting: {pair: difference(mean - 1, mean + 1) for pair, mean in of.items()} for setting in (S2, S1, TUNED)}


def found(average_precision: float, wrong_in_selected: float) -> dict[str, Any]:
    overall = {"average_precision": average_precision, "base_rate": 0.3, "num_pixels": 10}
    return {"refined_s2": {"overall": overall, "wrong_in_selected": wrong_in_selected}}


def test_a_difference_is_told_by_mean_spread_and_signs() -> None:
    assert points((0.01, -0.01, 0.03)) == "+1.0 +- 2.0 (2 of 3)"
    assert points((-0.0125,)) == "-1.2 (0 of 1)"  # one pair has no spread


def test_settings_are_taken_together_pair_by_pair() -> None:
    both = {S2: {("cromss", "plain"): difference(1, 2, 3)}, S1: {("cromss", "plain"): difference(-2)}}
    assert pairs_of(both, "cromss", both) == pytest.approx((0.01, 0.02, 0.03, -0.02))


@pytest.mark.parametrize(("gain", "s2", "s1"), [(5.1, True, True), (4.9, False, True), (3.9, False, False)])
def test_a_frozen_encoder_has_to_beat_a_random_one_by_five_points_on_s2_and_four_on_s1(gain: float, s2: bool, s1: bool) -> None:
    by_claim = {gate.claim: gate.holds for gate in gates(differences(random=gain), [found(0.6, 0.1)])}
    assert by_claim[f"{S2.name}: cromss over random, points mIoU"] is s2
    assert by_claim[f"{S1.name}: cromss over random, points mIoU"] is s1
    assert not [claim for claim in by_claim if TUNED.name in claim]  # a trained encoder proves nothing of its start


def test_detection_is_held_against_the_base_rate_as_a_mean_over_seeds() -> None:
    assert all(gate.holds for gate in gates(differences(), [found(0.54, 0.19), found(0.57, 0.16)]))
    assert [gate.holds for gate in gates(differences(), [found(0.54, 0.19)])][-2:] == [False, False]


def test_a_figure_that_is_not_there_holds_no_gate() -> None:
    assert not Gate("", math.nan, 0.0).holds
    assert not Gate("", math.nan, 0.0, at_least=False).holds


@pytest.mark.parametrize(
    ("clean", "able"),
    [
        ((2.0, 4.2), True),  # 3.1, two standard errors are 2.2
        ((1.9, 3.9), False),  # 2.9 points
        ((0.0, 7.0), False),  # 3.5, two standard errors are 7.0
        ((0.0, 7.0) * 5, True),  # as wide, of ten pairs: 2.3
        ((9.0,), False),  # of one pair nobody knows how much of it is chance
    ],
)
def test_a_setting_ranks_methods_if_clean_labels_are_worth_enough_and_more_than_chance(
    clean: tuple[float, ...], able: bool
) -> None:
    assert able_settings({S2: {("clean", "plain"): difference(*clean)}}) == ([S2] if able else [])


def test_a_test_that_cannot_rank_methods_says_so() -> None:
    unable, able = (" ".join(in_words(differences(clean=clean))) for clean in (2.9, 3.1))
    assert "cannot rank" in unable
    assert "cannot rank" not in able


@pytest.mark.parametrize(("method", "told"), [(-2.9, "; not worse by"), (-3.1, "; worse by")])
def test_a_method_may_lose_three_points_of_the_mean_of_all_pairs(method: float, told: str) -> None:
    assert told in in_words(differences(method))[-1]


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_what_the_verdict_needs_and_no_run_twice(name: str) -> None:
    size = SIZES[name]
    assert {"plain", "cromss", "clean"} <= set(size.variants)
    assert max(setting.labels for setting in size.settings) <= size.labelled_places
    names = [run.name for run in size.pretrainings] + [run.name for run in size.transfers]
    assert len(set(names)) == len(names)

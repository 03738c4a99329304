"""What the proof concludes from given scores."""

import math

import pytest

from benchmarks.method.plan import RANDOM, SIZES, Setting, Transfer
from benchmarks.method.verdict import Difference, Gate, difference, gates, in_words

S2, S1 = Setting("s2", "frozen", 32, "light"), Setting("s1", "frozen", 32, "light")


def scored(points: dict[str, float], setting: Setting = S2) -> dict[Transfer, float]:
    """Two seeds, two choices of tiles, of which the second is 7 points harder for all."""
    return {
        Transfer(variant, seed, setting, subset): value + seed - 7 * subset
        for variant, value in points.items()
        for seed in range(2)
        for subset in range(2)
    }


def found(average_precision: float, wrong_in_selected: float) -> dict[str, object]:
    overall = {"average_precision": average_precision, "base_rate": 0.3, "num_pixels": 10}
    return {"refined_s2": {"overall": overall, "wrong_in_selected": wrong_in_selected}}


def test_differences_are_between_equal_settings_seeds_and_tiles() -> None:
    both = scored({"plain": 40, "cromss": 42}) | scored({"plain": 10, "cromss": 9}, S1)
    assert difference(both, "cromss", "plain", [S2.name]) == Difference((2, 2, 2, 2))  # the tiles' 7 points cancel
    of_all = difference(both, "cromss", "plain", [S2.name, S1.name])
    assert (of_all.mean, of_all.positive, len(of_all.pairs)) == (0.5, 4, 8)


def test_a_run_without_its_pair_is_no_difference() -> None:
    runs = scored({"plain": 40, "cromss": 42})
    del runs[Transfer("plain", 1, S2, 0)]
    with pytest.raises(KeyError):
        difference(runs, "cromss", "plain", [S2.name])


def test_spread_and_signs_of_a_difference() -> None:
    told = Difference((1.0, -1.0, 3.0))
    assert (told.mean, told.std, told.positive) == (1.0, 2.0, 2)
    assert str(told) == "+1.0 +- 2.0 (2 of 3)"


@pytest.mark.parametrize(("gain", "holds"), [(5.0, True), (4.9, False)])
def test_a_frozen_encoder_has_to_beat_a_random_one_by_five_points_on_s2(gain: float, holds: bool) -> None:
    first = gates(scored({RANDOM: 20, "cromss": 20 + gain}), [found(0.6, 0.1)])[0]
    assert first.holds is holds


def test_detection_gates_compare_with_the_base_rate() -> None:
    runs = scored({RANDOM: 20, "cromss": 30})
    assert [gate.holds for gate in gates(runs, [found(0.56, 0.17), found(0.56, 0.17)])] == [True, True, True]
    assert [gate.holds for gate in gates(runs, [found(0.54, 0.19)])] == [True, False, False]


def test_a_figure_that_is_not_there_holds_no_gate() -> None:
    assert not Gate("", math.nan, 0.0).holds
    assert not Gate("", math.nan, 0.0, at_least=False).holds


def test_a_test_without_power_says_so() -> None:
    unable = " ".join(in_words(scored({"plain": 40, "cromss": 45, "clean": 42.9, RANDOM: 20})))
    able = " ".join(in_words(scored({"plain": 40, "cromss": 36, "clean": 43, RANDOM: 20})))
    assert "cannot rank" in unable
    assert ": not worse by more than 3 points" in unable
    assert "cannot rank" not in able
    assert ": worse by more than 3 points" in able


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_what_the_verdict_needs(name: str) -> None:
    size = SIZES[name]
    assert {"plain", "cromss", "clean"} <= set(size.variants)
    assert max(setting.labels for setting in size.settings) <= size.labelled_places
    names = [run.name for run in size.pretrainings] + [run.name for run in size.transfers]
    assert len(set(names)) == len(names)

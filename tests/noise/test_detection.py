"""Average precision and its strata against scikit-learn and counting by hand."""

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

from cromss_dist.noise.detection import BINS, Cleaning, Detection, trivial_scores
from cromss_dist.schema import IGNORE, NOISE_KINDS

NAMES = ("water", "trees", "crops")
SHAPE = (5, 4, 24, 24)  # locations, seasons, H, W

Case = dict[str, npt.NDArray[np.uint8]]


@pytest.fixture(scope="module")
def case() -> Case:
    """Random labels of which a third is wrong, for one of four reasons; some pixels are ignored on either side."""
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 3, SHAPE, np.uint8)
    reference[:, 1:] = np.where(rng.random((5, 3, 24, 24)) < 0.8, reference[:, :1], reference[:, 1:])
    kind = np.where(rng.random(SHAPE) < 1 / 3, rng.integers(1, 5, SHAPE), 0).astype(np.uint8)
    label = np.where(kind > 0, (reference + rng.integers(1, 3, SHAPE)) % 3, reference).astype(np.uint8)
    label[rng.random(SHAPE) < 0.05] = IGNORE
    reference[rng.random(SHAPE) < 0.05] = IGNORE
    return {"label": label, "reference": reference, "kind": kind}


def scores_like(case: Case, seed: int = 1) -> npt.NDArray[np.float64]:
    """Suspicion that knows something of the truth, in 16 bits, with ties."""
    rng = np.random.default_rng(seed)
    known = np.clip(rng.normal(0.4 + 0.2 * (case["kind"] > 0), 0.2), 0, 1)
    return np.rint(known * 500) / 500


def test_average_precision_is_scikit_learns_on_scores_of_16_bits(case: Case) -> None:
    score = np.rint(scores_like(case) * (BINS - 1)) / (BINS - 1)
    detection = Detection(NAMES)
    for one in range(len(score)):  # location by location, as a dataset is read
        detection.add(case["label"][one], case["reference"][one], {"s": score[one]}, case["kind"][one])
    found = detection.scores()["s"]
    valid = (case["label"] != IGNORE) & (case["reference"] != IGNORE)
    wrong = case["label"] != case["reference"]

    def expected(where: npt.NDArray[np.bool_]) -> float:
        return float(average_precision_score(wrong[valid & where], score[valid & where]))

    assert found.overall.average_precision == pytest.approx(expected(valid), abs=1e-12)
    assert found.overall.base_rate == pytest.approx(wrong[valid].mean(), abs=1e-12)
    assert found.overall.num_pixels == valid.sum()
    for number, name in enumerate(NOISE_KINDS[1:], 1):
        where = (case["kind"] == number) | ~wrong
        assert found.by_kind[name].average_precision == pytest.approx(expected(where), abs=1e-12)
        assert found.by_kind[name].base_rate == pytest.approx(wrong[valid & where].mean(), abs=1e-12)
    masked = np.ma.masked_equal(case["label"], IGNORE)
    agree = np.broadcast_to((masked.max(1) == masked.min(1)).filled(True)[:, None], SHAPE)
    for name, where in (("seasons_agree", agree), ("seasons_differ", ~agree)):
        assert found.by_stratum[name].average_precision == pytest.approx(expected(where), abs=1e-12)
        assert found.by_stratum[name].num_pixels == (valid & where).sum()


def test_average_precision_of_floats_differs_from_scikit_learns_by_the_rounding_alone(case: Case) -> None:
    score = np.random.default_rng(3).random(SHAPE) ** (1 + (case["kind"] > 0))
    detection = Detection(NAMES)
    detection.add(case["label"], case["reference"], {"s": score})
    valid = (case["label"] != IGNORE) & (case["reference"] != IGNORE)
    exact = average_precision_score((case["label"] != case["reference"])[valid], score[valid])
    found = detection.scores()["s"]
    assert found.overall.average_precision == pytest.approx(exact, abs=1e-3)
    assert found.by_kind == {}


def test_the_selected_half_is_that_of_each_class_with_the_least_suspicion(case: Case) -> None:
    score = np.random.default_rng(4).permutation(np.prod(SHAPE)).reshape(SHAPE) / np.prod(SHAPE)  # no ties
    detection = Detection(NAMES)
    detection.add(case["label"], case["reference"], {"s": score})
    valid = (case["label"] != IGNORE) & (case["reference"] != IGNORE)
    selected = np.zeros(SHAPE, bool)
    for value in range(3):
        of_class = np.flatnonzero(valid & (case["label"] == value))
        order = np.argsort(score.flat[of_class])
        selected.flat[of_class[order[: len(order) // 2]]] = True
    wrong = case["label"] != case["reference"]
    found = detection.scores()["s"]
    assert found.wrong_in_selected == pytest.approx(wrong[selected].mean(), abs=1e-12)
    assert found.wrong_in_rest == pytest.approx(wrong[valid & ~selected].mean(), abs=1e-12)


def test_two_halves_of_the_data_add_up_to_the_whole(case: Case) -> None:
    score = scores_like(case)
    whole, first, second = Detection(NAMES), Detection(NAMES), Detection(NAMES)
    whole.add(case["label"], case["reference"], {"s": score}, case["kind"])
    for part, where in ((first, slice(0, 2)), (second, slice(2, 5))):
        part.add(case["label"][where], case["reference"][where], {"s": score[where]}, case["kind"][where])
    first += second
    assert first.scores() == whole.scores()
    json.dumps(whole.scores()["s"].to_json(), allow_nan=False)


def test_a_perfect_detector_has_1_and_detectors_are_told_best_first(case: Case) -> None:
    wrong = (case["label"] != case["reference"]).astype(float)
    detection = Detection(NAMES)
    detection.add(case["label"], case["reference"], {"blind": np.zeros(SHAPE), "oracle": wrong})
    found = detection.scores()
    assert list(found) == ["oracle", "blind"]
    assert found["oracle"].overall.average_precision == 1
    assert found["blind"].overall.average_precision == pytest.approx(found["blind"].overall.base_rate)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_scores_outside_0_to_1_are_refused(case: Case, bad: float) -> None:
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        Detection(NAMES).add(case["label"], case["reference"], {"s": np.full(SHAPE, bad)})


def test_labels_without_an_error_have_no_average_precision() -> None:
    label = np.zeros((1, 4, 4), np.uint8)
    detection = Detection(NAMES)
    detection.add(label, label, trivial_scores(label))
    found = detection.scores()["other_seasons"]
    assert math.isnan(found.overall.average_precision)
    assert found.to_json()["overall"] == {"average_precision": None, "base_rate": 0.0, "num_pixels": 16}


def test_the_trivial_detectors_see_other_seasons_and_distance_to_a_border() -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    label[:, :, 3:] = 1  # a border between columns 2 and 3
    label[0, 0, 0] = 2
    label[1, 0, 5] = IGNORE
    scores = trivial_scores(label)
    assert scores["other_seasons"][:, 0, 0].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert scores["other_seasons"][:, 0, 5].tolist() == [0, 0, 0, 0]
    assert scores["other_seasons"].sum() == pytest.approx(2)
    assert scores["near_border"][3, 2].tolist() == pytest.approx([1 / 3, 1 / 2, 1, 1, 1 / 2, 1 / 3])
    assert not trivial_scores(np.zeros((1, 4, 4), np.uint8))["near_border"].any()


def test_cleaning_counts_what_was_mended_spoilt_and_dropped() -> None:
    reference = np.array([0, 0, 0, 0, 1, 1, IGNORE, 1], np.uint8)
    label = np.array([0, 1, 1, 0, 1, 0, 0, IGNORE], np.uint8)
    cleaned = np.array([0, 0, 2, 1, IGNORE, IGNORE, 0, IGNORE], np.uint8)
    cleaning = Cleaning()
    cleaning.add(label, cleaned, reference)
    cleaning.add(label[:0], cleaned[:0], reference[:0])
    assert cleaning == Cleaning(pixels=6, wrong_before=3, wrong_after=2, dropped=2, mended=1, spoilt=1)
    assert (cleaning.noise_before, cleaning.noise_after) == (0.5, 0.5)
    assert Cleaning().to_json()["noise_after"] is None

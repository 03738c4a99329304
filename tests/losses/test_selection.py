import math

import pytest
import torch
from torch import Tensor

from cromss_dist.losses.confidence import refine
from cromss_dist.losses.selection import class_thresholds, consistency_weights, keep_ratio, ramp, selection_weights

NUM_CLASSES = 5


def alone(x: Tensor) -> Tensor:
    return x


def by_topk(confidence: Tensor, classes: Tensor, ratio: float) -> Tensor:
    """Oracle: a loop over modalities and classes with torch.topk."""
    thresholds = torch.full((len(confidence), NUM_CLASSES), torch.inf)
    for m, values in enumerate(confidence):
        for c in range(NUM_CLASSES):
            of_class = values[classes == c]
            k = int(len(of_class) * ratio)
            if k:
                thresholds[m, c] = torch.topk(of_class, k).values[-1]
    return thresholds


def draw(kind: str) -> tuple[Tensor, Tensor]:
    """Confidences (2, 3000) and classes: class 3 absent, class 4 seen once, a tenth not counted (5)."""
    generator = torch.Generator().manual_seed(11)
    classes = torch.randint(0, 3, (3000,), generator=generator)
    classes[torch.rand(3000, generator=generator) < 0.1] = NUM_CLASSES
    classes[17] = 4
    confidence = torch.rand(2, 3000, generator=generator)
    match kind:
        case "ties":
            confidence = (confidence * 4).floor() / 4
        case "tiny":
            confidence = confidence * 1e-42  # denormal
        case "saturated":
            confidence = 1 - confidence * 3e-7  # a handful of distinct floats below 1
        case "zeros":
            confidence = torch.where(confidence < 0.9, 0.0, confidence)
    return confidence, classes


@pytest.mark.parametrize("kind", ["uniform", "ties", "tiny", "saturated", "zeros"])
@pytest.mark.parametrize("ratio", [1e-3, 0.29, 0.5, 0.77, 0.9999, 1.0])
def test_thresholds_equal_topk_bit_for_bit(kind: str, ratio: float) -> None:
    confidence, classes = draw(kind)
    thresholds = class_thresholds(confidence, classes, NUM_CLASSES, ratio, alone)
    assert torch.equal(thresholds, by_topk(confidence, classes, ratio))


def test_thresholds_are_the_same_when_histograms_of_two_parts_are_added() -> None:
    confidence, classes = draw("ties")
    parts = [slice(0, 700), slice(700, 3000)]
    histograms: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        assert x.shape == (2 * NUM_CLASSES, 2048)
        histograms.append(x)
        return x

    whole = class_thresholds(confidence, classes, NUM_CLASSES, 0.5, record)
    first = sum(torch.bincount(classes[p], minlength=NUM_CLASSES)[:NUM_CLASSES] for p in parts)
    assert len(histograms) == 3
    assert torch.equal(histograms[0].sum(1).view(2, -1)[0], torch.as_tensor(first))
    assert torch.equal(whole, by_topk(confidence, classes, 0.5))


def test_weights_are_confidence_over_threshold_capped_at_one() -> None:
    confidence, classes = draw("uniform")
    weights = selection_weights(confidence.view(2, 3, 1000), classes.view(3, 1000), NUM_CLASSES, 0.4, alone).view(2, -1)
    thresholds = by_topk(confidence, classes, 0.4)
    for c in range(3):
        expected = (confidence[:, classes == c] / thresholds[:, c : c + 1]).clamp(0, 1)
        torch.testing.assert_close(weights[:, classes == c], expected)
        assert ((weights[:, classes == c] == 1).sum(1) == int((classes == c).sum() * 0.4)).all()
    assert not weights[:, classes == NUM_CLASSES].any()
    assert not weights[:, classes == 4].any()  # one pixel, k = floor(0.4) = 0


def test_zero_threshold_gives_weight_one_and_the_extremes_of_the_ratio_are_the_stated_ones() -> None:
    confidence = torch.tensor([[[0.0, 0.0, 0.0, 0.5]], [[0.2, 0.4, 0.0, 1.0]]])
    classes = torch.tensor([[0, 0, 0, NUM_CLASSES]])
    counted = classes < NUM_CLASSES
    assert torch.equal(selection_weights(confidence, classes, NUM_CLASSES, 0.7, alone)[0], counted.float())
    assert torch.equal(selection_weights(confidence, classes, NUM_CLASSES, 1.0, alone), counted.float().expand(2, 1, 4))
    assert torch.equal(selection_weights(confidence, classes, NUM_CLASSES, 0.0, alone), confidence * counted)


def test_no_counted_pixel_gives_no_weight() -> None:
    weights = selection_weights(torch.full((2, 1, 6), 0.3), torch.full((1, 6), NUM_CLASSES), NUM_CLASSES, 0.5, alone)
    assert not weights.any()


@pytest.mark.parametrize("kind", ["exp", "linear", "none"])
def test_ramp_of_no_length_is_one(kind: str) -> None:
    assert ramp(0.0, kind, 0.0) == 1.0  # type: ignore[arg-type]


def test_ramp_rises_between_whole_epochs() -> None:
    assert ramp(0.5, "exp", 80.0) == pytest.approx(math.exp(-5 * (79.5 / 80) ** 2))
    assert ramp(0.0, "exp", 80.0) < ramp(0.5, "exp", 80.0) < ramp(1.0, "exp", 80.0)


def test_after_the_ramp_the_ratio_is_the_kept_share_itself() -> None:
    assert keep_ratio(0.0, 0.0, 0.29, 80.0) == 1.0
    assert keep_ratio(80.0, 1.0, 0.29, 80.0) == pytest.approx(0.29)
    assert keep_ratio(80.1, 1.0, 0.29, 80.0) == 0.29


def test_consistency_weights_go_from_one_to_the_confidence() -> None:
    confidence = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(consistency_weights(confidence, 0.0), torch.ones_like(confidence))
    assert torch.equal(consistency_weights(confidence, 1.0), confidence)


def test_refinement_rewards_agreement_and_stays_in_range() -> None:
    sure, unsure = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    assert refine(torch.stack((sure, sure))).flatten().tolist() == [1.0, 1.0]
    assert refine(torch.stack((sure, unsure))).flatten().tolist() == [0.5, 0.0]

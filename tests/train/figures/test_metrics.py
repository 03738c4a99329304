"""Scores against scikit-learn on the same pixels."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score  # type: ignore[import-untyped]
from torch import Tensor

from cromss_dist.schema import CLASS_NAMES, IGNORE
from cromss_dist.train.figures.metrics import ConfusionMatrix
from cromss_dist.train.figures.scores import Scores


def scores_of(*batches: tuple[Tensor, Tensor, Tensor]) -> Scores:
    matrix = ConfusionMatrix(torch.device("cpu"))
    for label, prediction, weights in batches:
        matrix.add(label, prediction, weights)
    return matrix.scores(lambda x: x)


@pytest.fixture
def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 7, (6, 16, 16), generator=generator)  # classes 7 and 8 never occur
    prediction = torch.where(torch.rand(label.shape, generator=generator) < 0.5, label, 6 - label)
    label[torch.rand(label.shape, generator=generator) < 0.1] = IGNORE
    return label, prediction


def test_scores_equal_scikit_learns(pixels: tuple[Tensor, Tensor]) -> None:
    label, prediction = pixels
    scores = scores_of((label, prediction, torch.ones(6)))
    valid = (label != IGNORE).numpy()
    truth, guess = label.numpy()[valid], prediction.numpy()[valid]
    iou = jaccard_score(truth, guess, labels=np.arange(7), average=None)
    assert scores.overall_accuracy == pytest.approx(accuracy_score(truth, guess), abs=1e-12)
    assert scores.mean_iou == pytest.approx(iou.mean(), abs=1e-12)
    assert [scores.iou[name] for name in CLASS_NAMES[:7]] == pytest.approx(list(iou), abs=1e-12)
    assert math.isnan(scores.iou["snow"])


def test_any_cut_into_batches_gives_the_same_scores(pixels: tuple[Tensor, Tensor]) -> None:
    label, prediction = pixels
    whole = scores_of((label, prediction, torch.ones(6)))
    parts = scores_of(*((label[i : i + 1], prediction[i : i + 1], torch.ones(1)) for i in range(6)))
    assert repr(whole) == repr(parts)  # NaN is not equal to itself


def test_samples_of_weight_zero_do_not_count(pixels: tuple[Tensor, Tensor]) -> None:
    label, prediction = pixels
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0])
    assert repr(scores_of((label, prediction, weights))) == repr(scores_of((label[:4], prediction[:4], torch.ones(4))))


def test_a_class_that_is_only_predicted_scores_zero_and_stays_out_of_the_mean() -> None:
    label, prediction = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.int64)
    prediction[0, 0] = 8
    scores = scores_of((label, prediction, torch.ones(1)))
    assert scores.iou["snow"] == 0
    assert scores.mean_iou == pytest.approx(12 / 16)


def test_ranks_are_summed_before_the_division(pixels: tuple[Tensor, Tensor]) -> None:
    label, prediction = pixels
    one, other = ConfusionMatrix(torch.device("cpu")), ConfusionMatrix(torch.device("cpu"))
    one.add(label[:1], prediction[:1], torch.ones(1))
    other.add(label[1:], prediction[1:], torch.ones(5))
    assert repr(one.scores(lambda x: x + other.counts)) == repr(scores_of((label, prediction, torch.ones(6))))

"""Scores from confusion matrices against scikit-learn and torchmetrics on the same pixels."""

import importlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import (  # type: ignore[import-untyped]
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    recall_score,
)

from cromss_dist.errors import ResultError
from cromss_dist.schema import IGNORE
from cromss_dist.train.figures.metrics import tile_confusions
from cromss_dist.train.figures.scores import METRICS, Scores, class_scores, metric_values

NAMES = ("water", "trees", "grass", "crops", "built")
CLASSES = len(NAMES)
Pixels = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@pytest.fixture
def pixels() -> Pixels:
    generator = np.random.default_rng(0)
    label = generator.integers(0, CLASSES, 4000)
    return label, np.where(generator.random(4000) < 0.6, label, generator.integers(0, CLASSES, 4000))


def counted(label: npt.NDArray[Any], prediction: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(confusion_matrix(label, prediction, labels=np.arange(CLASSES)))


def test_every_figure_equals_scikit_learns(pixels: Pixels) -> None:
    scores = Scores.of(counted(*pixels), NAMES)
    assert scores.overall_accuracy == pytest.approx((pixels[0] == pixels[1]).mean(), abs=1e-12)
    assert scores.mean_accuracy == pytest.approx(balanced_accuracy_score(*pixels), abs=1e-12)
    assert scores.mean_iou == pytest.approx(jaccard_score(*pixels, average="macro"), abs=1e-12)
    assert scores.mean_f1 == pytest.approx(f1_score(*pixels, average="macro"), abs=1e-12)
    assert [*scores.iou.values()] == pytest.approx([*jaccard_score(*pixels, average=None)], abs=1e-12)
    assert [*scores.f1.values()] == pytest.approx([*f1_score(*pixels, average=None)], abs=1e-12)
    assert [*scores.accuracy.values()] == pytest.approx([*recall_score(*pixels, average=None)], abs=1e-12)
    assert scores.present == NAMES == (*scores.iou,)
    assert {name: scores.metric(name) for name in METRICS} == pytest.approx(
        {"oa": scores.overall_accuracy, "aa": scores.mean_accuracy, "miou": scores.mean_iou, "mf1": scores.mean_f1}
    )


@pytest.mark.slow  # torchmetrics takes seconds to import
def test_every_figure_equals_torchmetrics_with_ignored_pixels(pixels: Pixels) -> None:
    importlib.import_module("cromss_dist.models")  # torchmetrics imports torchvision, which needs this beside a CPU torch
    from torchmetrics.functional import classification

    label, prediction = (torch.from_numpy(values).view(10, 20, 20) for values in pixels)
    label[:, :3] = IGNORE
    scores = Scores.of(tile_confusions(label, prediction, CLASSES).sum(0).numpy(), NAMES)

    def theirs(name: str, average: str) -> Any:
        function = getattr(classification, f"multiclass_{name}")
        return function(prediction, label, num_classes=CLASSES, average=average, ignore_index=IGNORE)

    assert scores.overall_accuracy == pytest.approx(float(theirs("accuracy", "micro")), abs=1e-6)
    assert scores.mean_accuracy == pytest.approx(float(theirs("accuracy", "macro")), abs=1e-6)
    assert scores.mean_iou == pytest.approx(float(theirs("jaccard_index", "macro")), abs=1e-6)
    assert scores.mean_f1 == pytest.approx(float(theirs("f1_score", "macro")), abs=1e-6)
    assert [*scores.iou.values()] == pytest.approx(theirs("jaccard_index", "none").tolist(), abs=1e-6)


def test_tiles_have_the_matrices_that_scikit_learn_counts_in_each(pixels: Pixels) -> None:
    label, prediction = (torch.from_numpy(values).view(10, 20, 20) for values in pixels)
    label[3] = IGNORE  # a tile without a label
    label[5, :7] = IGNORE
    tiles = tile_confusions(label, prediction, CLASSES)
    assert tiles.shape == (10, CLASSES, CLASSES)
    for tile, truth, guess in zip(tiles.numpy(), label.numpy(), prediction.numpy(), strict=True):
        valid = truth != IGNORE
        expected = counted(truth[valid], guess[valid]) if valid.any() else np.zeros((CLASSES, CLASSES))
        assert (tile == expected).all()


def test_a_stack_of_matrices_scores_as_each_of_them_alone() -> None:
    stack = np.random.default_rng(1).integers(0, 50, (2, 3, CLASSES, CLASSES))
    stack[1, 2, 4] = 0  # a class without labels
    together, by_class = metric_values(stack), class_scores(stack)
    for place in np.ndindex(2, 3):
        alone = Scores.of(stack[place], NAMES)
        assert {name: together[name][place] for name in METRICS} == {name: alone.metric(name) for name in METRICS}
        assert [*alone.iou.values()] == by_class.iou[place].tolist()


def test_a_class_that_nothing_has_has_no_figure_and_no_say() -> None:
    counts = np.diag([5, 5, 5, 0, 0])
    counts[0, 4] = 5  # built is only predicted
    scores = Scores.of(counts, NAMES)
    assert scores.present == ("water", "trees", "grass")
    assert math.isnan(scores.iou["crops"])
    assert math.isnan(scores.accuracy["built"])
    assert scores.iou["built"] == scores.f1["built"] == 0
    assert scores.mean_iou == pytest.approx((0.5 + 1 + 1) / 3)
    assert "iou/crops" not in scores.figures()
    assert scores.figures()["iou/water"] == scores.iou["water"]
    assert scores.figures()["miou"] == scores.mean_iou


def test_common_classes_leave_the_others_out_of_means_and_accuracy_and_keep_them_as_errors(pixels: Pixels) -> None:
    label, prediction = pixels
    counts, common = counted(label, prediction), ("trees", "water")
    scores, everything = Scores.of(counts, NAMES, common), Scores.of(counts, NAMES)
    assert scores.iou == {name: everything.iou[name] for name in ("water", "trees")}  # in the order of the classes
    assert scores.mean_iou == pytest.approx(jaccard_score(label, prediction, labels=[0, 1], average="macro"), abs=1e-12)
    assert scores.mean_f1 == pytest.approx(f1_score(label, prediction, labels=[0, 1], average="macro"), abs=1e-12)
    assert scores.overall_accuracy == pytest.approx((label == prediction)[label < 2].mean(), abs=1e-12)
    assert scores.present == ("water", "trees")


@pytest.mark.parametrize(("among", "told"), [(("wood",), "wood is not among them"), ((), "none is given")])
def test_unknown_common_classes_are_refused_with_the_known_ones(among: tuple[str, ...], told: str) -> None:
    with pytest.raises(ResultError, match=f"{told}.*choose from water, trees"):
        Scores.of(np.eye(CLASSES), NAMES, among)


def test_where_no_pixel_counts_there_is_no_figure() -> None:
    assert all(math.isnan(values) for values in metric_values(np.zeros((CLASSES, CLASSES))).values())
    assert Scores.of(np.zeros((CLASSES, CLASSES)), NAMES).figures() == {}

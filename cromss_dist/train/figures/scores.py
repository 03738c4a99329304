"""Segmentation scores from confusion matrices, one or a stack of them: counts are summed first, divided after.

Layer 3, without torch, so that what only reads results starts at once. Shapes: C classes; rows are the label, columns the
prediction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from cromss_dist.errors import ResultError

Metric: TypeAlias = Literal["oa", "aa", "miou", "mf1"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Values: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class in [0, 1], float64 (..., C); NaN where a quotient is 0 / 0.

    Args:
        accuracy: Share of the class's labelled pixels that are found (recall, producer's accuracy); NaN if it has none.
        iou: Intersection over union; NaN for a class in neither label nor prediction.
        f1: Harmonic mean of recall and precision; NaN likewise.
        present: bool (..., C): the class occurs in the labels.
    """

    accuracy: Values
    iou: Values
    f1: Values
    present: npt.NDArray[np.bool_]


def class_scores(confusion: npt.NDArray[Any]) -> ClassScores:
    """The scores of each class.

    Args:
        confusion: Counts (..., C, C), integers or whole floats.
    """
    counts = confusion.astype(np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    of_label, of_prediction = counts.sum(-1), counts.sum(-2)
    return ClassScores(
        accuracy=_quotient(hits, of_label),
        iou=_quotient(hits, of_label + of_prediction - hits),
        f1=_quotient(2 * hits, of_label + of_prediction),
        present=of_label > 0,
    )


def metric_values(confusion: npt.NDArray[Any], among: Sequence[int] | None = None) -> dict[Metric, Values]:
    """The four figures of each matrix in a stack, float64 (...), in [0, 1].

    Means are over the classes that occur in that matrix's labels: a class that is only predicted has already cost the
    others, and one that cannot be found has no say. NaN where no pixel counts.

    Args:
        confusion: Counts (..., C, C).
        among: Indices of the classes that count, as "common classes"; None = all. The others leave the means, and their
            labelled pixels leave the overall accuracy; predicting one of them on a pixel that counts stays an error.
    """
    chosen = np.zeros(confusion.shape[-1], dtype=np.bool_)
    chosen[slice(None) if among is None else list(among)] = True
    classes = class_scores(confusion)
    taking_part = classes.present & chosen

    def mean(values: Values) -> Values:
        return _quotient(np.where(taking_part, values, 0.0).sum(-1), taking_part.sum(-1).astype(np.float64))

    counts = confusion.astype(np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return {
        "oa": _quotient(hits[..., chosen].sum(-1), counts[..., chosen, :].sum((-2, -1))),
        "aa": mean(classes.accuracy),
        "miou": mean(classes.iou),
        "mf1": mean(classes.f1),
    }


def _quotient(dividend: Values, divisor: Values) -> Values:
    """NaN where the divisor is 0."""
    quotient: Values = np.divide(dividend, divisor, out=np.full(np.shape(dividend), np.nan), where=divisor > 0)
    return quotient


@dataclass(frozen=True)
class Scores:
    """Scores in [0, 1] of one confusion matrix; the definitions are those of `class_scores` and `metric_values`.

    `overall_accuracy` is the share of right pixels; the means are over the `present` classes, those that occur in the labels.
    Figures by class are NaN where there is nothing to divide by.

    Departs: scikit-learn and torchmetrics also average over classes that are predicted and never labelled, as 0.
    """

    overall_accuracy: float
    mean_accuracy: float
    mean_iou: float
    mean_f1: float
    accuracy: dict[str, float]
    iou: dict[str, float]
    f1: dict[str, float]
    present: tuple[str, ...]

    @classmethod
    def of(cls, confusion: npt.NDArray[Any], class_names: Sequence[str], among: Sequence[str] | None = None) -> "Scores":
        """The scores of one matrix.

        Args:
            confusion: Counts (C, C).
            class_names: C of them.
            among: Names of the classes that count; see `metric_values`. Figures by class are of these only. None = all.

        Raises:
            ResultError: `among` names an unknown class, or none.
        """
        names = tuple(class_names)
        index = range(len(names)) if among is None else class_indices(among, names)
        by_class, means = class_scores(confusion), metric_values(confusion, index)

        def named(values: Values) -> dict[str, float]:
            return {names[i]: float(values[i]) for i in index}

        return cls(
            overall_accuracy=float(means["oa"]),
            mean_accuracy=float(means["aa"]),
            mean_iou=float(means["miou"]),
            mean_f1=float(means["mf1"]),
            accuracy=named(by_class.accuracy),
            iou=named(by_class.iou),
            f1=named(by_class.f1),
            present=tuple(names[i] for i in index if by_class.present[i]),
        )

    def metric(self, name: Metric) -> float:
        """The figure by its short name."""
        return {"oa": self.overall_accuracy, "aa": self.mean_accuracy, "miou": self.mean_iou, "mf1": self.mean_f1}[name]

    def figures(self) -> dict[str, float]:
        """All that are numbers, under the names that MLflow shows: 'miou', 'iou/water'."""
        values: dict[str, float] = {name: self.metric(name) for name in METRICS}
        for kind, by_class in (("accuracy", self.accuracy), ("iou", self.iou), ("f1", self.f1)):
            values |= {f"{kind}/{name}": value for name, value in by_class.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}


def class_indices(among: Sequence[str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Where the classes of `among` are in `class_names`, in the latter's order.

    Raises:
        ResultError: one is unknown, or there is none.
    """
    unknown = sorted(set(among) - set(class_names))
    if unknown or not among:
        problem = f"{', '.join(unknown)} is not among them" if unknown else "none is given"
        raise ResultError(f"classes to score: {problem}; choose from {', '.join(class_names)}.")
    return tuple(i for i, name in enumerate(class_names) if name in among)

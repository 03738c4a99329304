"""Segmentation metrics from one confusion matrix: counts are summed over batches and ranks first, divided after.

Layer 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cromss_dist.schema import CLASS_NAMES, IGNORE, NUM_CLASSES


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, int64 (C, C), rows the label; pixels with label 255 do not count."""

    def __init__(self, device: torch.device, num_classes: int = NUM_CLASSES) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, label: Tensor, prediction: Tensor, weights: Tensor) -> None:
        """Counts a batch.

        Args:
            label: int64 (B, H, W), 0 .. C-1 or 255.
            prediction: int64 (B, H, W), 0 .. C-1.
            weights: float32 (B,); samples of weight 0 only fill the batch and do not count.
        """
        valid = (label != IGNORE) & (weights > 0)[:, None, None]
        pair = torch.where(valid, label * self.num_classes + prediction, self.num_classes**2)
        counts = torch.bincount(pair.flatten(), minlength=self.num_classes**2 + 1)
        self.counts += counts[:-1].view(self.num_classes, self.num_classes)

    def scores(self, reduce_sum: Callable[[Tensor], Tensor]) -> "Scores":
        """The scores of all ranks' counts; a collective call."""
        counts = reduce_sum(self.counts).double().cpu()
        hits = counts.diagonal()
        of_label, of_prediction = counts.sum(1), counts.sum(0)
        union = of_label + of_prediction - hits
        present = of_label > 0
        iou = torch.where(union > 0, hits / union.clamp(min=1), torch.nan)
        return Scores(
            overall_accuracy=float(hits.sum() / counts.sum().clamp(min=1)),
            mean_iou=float(iou[present].mean()) if bool(present.any()) else float("nan"),
            iou={name: float(value) for name, value in zip(CLASS_NAMES, iou, strict=True)},
        )


@dataclass(frozen=True)
class Scores:
    """Scores in [0, 1].

    `mean_iou` is over the classes that occur in the labels; `iou` is NaN for a class in neither label nor prediction.
    """

    overall_accuracy: float
    mean_iou: float
    iou: dict[str, float]

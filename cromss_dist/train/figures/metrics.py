"""Confusion matrices on the training device: one for each tile, and their sum over batches and ranks.

Layer 3.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cromss_dist.schema import CLASS_NAMES, IGNORE
from cromss_dist.train.figures.scores import Scores


def tile_confusions(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Counts of (label, prediction) pairs in each tile; pixels with label 255 do not count.

    Args:
        label: int64 (B, H, W), 0 .. C-1 or 255.
        prediction: int64 (B, H, W), 0 .. C-1.
        num_classes: C.

    Returns:
        int64 (B, C, C), rows the label.
    """
    tiles, pairs = len(label), num_classes**2
    first = torch.arange(tiles, device=label.device)[:, None, None] * pairs
    cell = torch.where(label != IGNORE, first + label * num_classes + prediction, tiles * pairs)
    counts = torch.bincount(cell.flatten(), minlength=tiles * pairs + 1)
    return counts[:-1].view(tiles, num_classes, num_classes)


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, int64 (C, C), rows the label; pixels with label 255 do not count."""

    def __init__(self, device: torch.device, class_names: Sequence[str] = CLASS_NAMES) -> None:
        self.class_names = tuple(class_names)
        self.counts = torch.zeros(len(class_names), len(class_names), dtype=torch.int64, device=device)

    def add(self, label: Tensor, prediction: Tensor, weights: Tensor) -> None:
        """Counts a batch.

        Args:
            label: int64 (B, H, W), 0 .. C-1 or 255.
            prediction: int64 (B, H, W), 0 .. C-1.
            weights: float32 (B,); samples of weight 0 only fill the batch and do not count.
        """
        counted = torch.where((weights > 0)[:, None, None], label, IGNORE)
        self.counts += tile_confusions(counted, prediction, len(self.class_names)).sum(0)

    def scores(self, reduce_sum: Callable[[Tensor], Tensor]) -> Scores:
        """The scores of all ranks' counts; a collective call."""
        return Scores.of(reduce_sum(self.counts).cpu().numpy(), self.class_names)

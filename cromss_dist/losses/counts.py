"""What selection did and where the branches agree, counted for the log.

Shapes: B batch, C classes, H x W px; index 0 is S1, 1 is S2. Nothing here carries a gradient or waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """Sums over this rank's pixels, to be added up over micro batches and ranks before anything is divided.

    Args:
        sums: float64 (5 C + 2,): `weight`, `kept`, `labelled`, `agreed`, `valid`, one after the other.
    """

    sums: Tensor

    def __add__(self, other: Counts) -> Counts:
        """Of the pixels of both."""
        return Counts(self.sums + other.sums)

    @property
    def num_classes(self) -> int:
        """C."""
        return (len(self.sums) - 2) // 5

    @property
    def weight(self) -> Tensor:
        """float64 (2, C): sum of the selection weights of each noisy class's pixels."""
        return self.sums[: 2 * self.num_classes].view(2, -1)

    @property
    def kept(self) -> Tensor:
        """float64 (2, C): pixels of each noisy class that are kept whole, at weight 1."""
        return self.sums[2 * self.num_classes : 4 * self.num_classes].view(2, -1)

    @property
    def labelled(self) -> Tensor:
        """float64 (C,): pixels of each noisy class."""
        return self.sums[4 * self.num_classes : -2]

    @property
    def agreed(self) -> Tensor:
        """float64 scalar: pixels for which both branches predict the same class, labelled or not."""
        return self.sums[-2]

    @property
    def valid(self) -> Tensor:
        """float64 scalar: pixels of samples that have a part in the loss, labelled or not."""
        return self.sums[-1]


@torch.no_grad()
def count(predicted: tuple[Tensor, Tensor], classes: Tensor, num_classes: int, weights: Tensor, valid: Tensor) -> Counts:
    """Counts a batch.

    Args:
        predicted: int32 (B, H, W), each branch's class.
        classes: int64 (B, H, W), noisy class, or C for a pixel without a label.
        num_classes: C.
        weights: float32 (2, B, H, W) in [0, 1], selection weights; 0 where a pixel has no label.
        valid: bool (B, H, W), pixels of samples that have a part in the loss.
    """
    C = num_classes
    values = torch.cat((weights, weights == 1, (classes < C)[None]))
    # Line by line first: float32 is exact enough for a line's sum, and a GPU's threads do not queue for a few addresses.
    lines = values.new_zeros(*values.shape[:-1], C + 1).scatter_add_(-1, classes.expand(values.shape), values)
    of_classes = lines.sum((1, 2), dtype=torch.float64)[:, :C]
    totals = torch.stack(((predicted[0] == predicted[1]) & valid, valid)).sum((1, 2, 3), dtype=torch.float64)
    return Counts(torch.cat((of_classes.flatten(), totals)))

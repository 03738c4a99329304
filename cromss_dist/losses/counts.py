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
def count(probs: tuple[Tensor, Tensor], classes: Tensor, weights: Tensor, valid: Tensor) -> Counts:
    """Counts a batch.

    Args:
        probs: float32 (B, C, H, W) of each branch; anything that sorts like them does.
        classes: int64 (B, H, W), noisy class, or C for a pixel without a label.
        weights: float32 (2, B, H, W) in [0, 1], selection weights; 0 where a pixel has no label.
        valid: bool (B, H, W), pixels of samples that have a part in the loss.
    """
    C = probs[0].shape[1]
    onehot_BCP = (classes[:, None] == torch.arange(C, device=classes.device)[:, None, None]).flatten(2)
    rows_5BP = torch.cat((weights, weights == 1, (classes < C)[None])).flatten(2)
    sums_5C = torch.stack([(onehot_BCP * row_BP[:, None]).sum(-1).sum(0, dtype=torch.float64) for row_BP in rows_5BP])
    agreed = (probs[0].argmax(1) == probs[1].argmax(1)) & valid
    return Counts(torch.cat((sums_5C.flatten(), agreed.sum(dtype=torch.float64)[None], valid.sum(dtype=torch.float64)[None])))

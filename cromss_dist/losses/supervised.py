"""The loss of one segmentation network on hard labels: what `CromssLoss` is for two branches, without selection and consistency.

Everything is first a sum over pixels, then summed over ranks, then divided, as there. B batch, C classes, H x W px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cromss_dist.losses import segmentation
from cromss_dist.losses.selection import ReduceSum
from cromss_dist.schema import IGNORE

Term: TypeAlias = Literal["ce", "dice", "focal"]

_NUM_SCALARS = 3  # entries of the sums before the 3 x C of Dice


@dataclass(frozen=True)
class SupervisedOutput:
    """The loss of what one call sees.

    Args:
        total: float32 scalar; its gradient is scaled by the world size, see SupervisedLoss.
        parts: Detached float32 scalars: 'ce', 'dice', 'focal', those configured.
        counts: float64 (2,), of this rank's pixels: labelled ones, and those among them that are predicted right.
    """

    total: Tensor
    parts: dict[str, Tensor]
    counts: Tensor


class SupervisedLoss:
    """The sum of cross-entropy, soft Dice and focal loss over the labelled pixels of the global batch.

    Computed in float32. With `reduce_sum` every quotient sees all ranks' pixels: `total` is the loss of the global batch, the
    same on every rank; its gradient is this rank's exact part times `world_size`, since gradient engines average over ranks.

    Args:
        terms: What is added up, one or more distinct.
        num_classes: C.
        reduce_sum: Sum of a detached float64 tensor over ranks; None in one process.
        world_size: Number of ranks that `reduce_sum` sums over.

    Reference: CromSS, section V-A, and its code: smp's Dice and torch's cross-entropy, both with ignored pixels.
    Departs: those see one device's batch.
    """

    def __init__(self, terms: Sequence[Term], num_classes: int, reduce_sum: ReduceSum | None = None, world_size: int = 1) -> None:
        self.terms, self.num_classes = tuple(terms), num_classes
        self.reduce_sum: ReduceSum = reduce_sum or (lambda x: x)
        self.world_size = 1 if reduce_sum is None else world_size

    def __call__(self, logits: Tensor, label: Tensor, sample_weights: Tensor | None = None) -> SupervisedOutput:
        """The loss; a collective call with `reduce_sum`.

        Args:
            logits: float (B, C, H, W), any float type.
            label: int64 (B, H, W), 255 = ignored.
            sample_weights: float32 (B,), 1, or 0 for a sample without any part in the loss; None for all 1.
        """
        labelled = _labelled(label, sample_weights)
        local = self._sums(logits.float(), label, labelled)
        # The value is the global sum, the gradient the local one: no collective in the backward pass.
        sums = local + (self.reduce_sum(local.detach()) - local.detach())
        parts = self._from_sums(sums)
        total = torch.stack(list(parts.values())).sum()
        total = total + (self.world_size - 1) * (total - total.detach())
        right = (logits.detach().argmax(1) == label) & labelled
        return SupervisedOutput(
            total=total.float(),
            parts={name: part.detach().float() for name, part in parts.items()},
            counts=torch.stack((labelled.sum(), right.sum())).double(),
        )

    @torch.no_grad()
    def validation_sums(self, logits: Tensor, label: Tensor, sample_weights: Tensor | None = None) -> Tensor:
        """A batch's part of the loss of a whole set, to be added up over batches and ranks: float64 (3 + 3 C,)."""
        return self._sums(logits.float(), label, _labelled(label, sample_weights))

    def validation_loss(self, sums: Tensor) -> dict[str, Tensor]:
        """The loss of a whole set from its `validation_sums`, added up: float64 scalars, `total` and its parts."""
        parts = self._from_sums(sums)
        return {"total": torch.stack(list(parts.values())).sum()} | parts

    def _sums(self, logits: Tensor, label: Tensor, labelled: Tensor) -> Tensor:
        """All sums over this rank's pixels, float64 (3 + 3 C,)."""
        log_probs = F.log_softmax(logits, 1)
        weights = labelled.float()
        target = segmentation.soft_label(label.where(labelled, 0), None, self.num_classes, 0.0, 0.0) * weights[:, None]
        zero = torch.zeros((), dtype=torch.float64, device=label.device)
        ce = segmentation.cross_entropy_sum(log_probs, target) if "ce" in self.terms else zero
        focal = segmentation.focal_sum(logits, target, weights) if "focal" in self.terms else zero
        dice = (
            segmentation.dice_sums(log_probs.exp(), target, weights) if "dice" in self.terms else zero.expand(3, self.num_classes)
        )
        return torch.cat((torch.stack((segmentation.pixel_sum(weights), ce, focal)), dice.flatten()))

    def _from_sums(self, sums: Tensor) -> dict[str, Tensor]:
        num_labelled, ce, focal = sums[:_NUM_SCALARS]
        count = num_labelled.clamp_min(1)  # a batch without labels has loss 0
        parts = {
            "ce": ce / count,
            "dice": segmentation.dice_loss(sums[_NUM_SCALARS:].view(3, self.num_classes)),
            "focal": focal / count,
        }
        return {name: parts[name] for name in self.terms}


def _labelled(label: Tensor, sample_weights: Tensor | None) -> Tensor:
    """bool (B, H, W): pixels with a label, of samples that have a part in the loss."""
    labelled = label != IGNORE
    return labelled if sample_weights is None else labelled & (sample_weights > 0)[:, None, None]

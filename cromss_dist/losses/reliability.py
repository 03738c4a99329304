"""How far each branch may pull the other: as far as labels confirm what it predicts, against what the other one predicts.

Shapes: B batch, C classes, H x W px; index 0 is S1, 1 is S2. Nothing here carries a gradient or waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cromss_dist.losses.selection import ReduceSum
from cromss_dist.schema import MODALITIES

# Confirmed pixels at which a pair of predicted classes is trusted by half; neighbouring pixels tell much the same.
DOUBT_PX = 32


@dataclass(frozen=True)
class Reliability:
    """Of each branch as the other one's teacher.

    Args:
        weights: float32 (2, B, H, W) in [0, 1], factors of the weights of the consistency loss.
        of_class: float32 (2, C) in [0, 1], their mean over the labelled pixels of all ranks for which the branch predicts the
            class; 0 where there is none.
    """

    weights: Tensor
    of_class: Tensor

    def figures(self, class_names: Sequence[str]) -> dict[str, Tensor]:
        """`of_class` as float32 scalars `reliability_s1/<class>` and `reliability_s2/<class>`."""
        return {
            f"reliability_{modality}/{name}": value
            for modality, of_class in zip(MODALITIES, self.of_class, strict=True)
            for name, value in zip(class_names, of_class, strict=True)
        }


@torch.no_grad()
def reliability(predicted: tuple[Tensor, Tensor], classes: Tensor, num_classes: int, reduce_sum: ReduceSum) -> Reliability:
    """Compares the branches, pair by pair of the classes (a, b) that S1 and S2 predict for a pixel.

    Of the labelled pixels of all ranks with that pair, n_S1 are labelled a and n_S2 are labelled b. For every pixel with it,
    labelled or not, branch d has the weight n_d / (max(n_S1, n_S2) + n_0): about 1 for the branch that the labels confirm more
    often than the other, or as often, and the ratio of the two for the other. n_0 = 32 px doubts what was hardly seen. So
    nothing is pulled to a class that a branch always predicts wrongly, and a branch that cannot see a class hardly pulls one
    that can away from it.

    Args:
        predicted: int32 (B, H, W), each branch's class, from `confidence.predicted_class`.
        classes: int64 (B, H, W), noisy class, or C for a pixel without a label.
        num_classes: C.
        reduce_sum: Sum of a float64 tensor over ranks. Counts are whole numbers, so their sum is exact in any order.

    Departs: not in CromSS, which weighs by the entropy of the prediction alone.
    """
    C = num_classes
    pair = predicted[0] * C + predicted[1]
    triple = (pair * (C + 1) + classes).flatten(1)
    ones = torch.ones((), device=triple.device).expand(triple.shape)
    # Each sample by itself: its counts are exact in float32, and a GPU's threads do not all queue for one address.
    of_samples = ones.new_zeros(len(triple), C * C * (C + 1)).scatter_add_(1, triple, ones)
    counts = reduce_sum(of_samples.sum(0, dtype=torch.float64)).view(C, C, C + 1)[..., :C]  # a, b, label
    confirmed = torch.stack((counts.diagonal(dim1=0, dim2=2).T, counts.diagonal(dim1=1, dim2=2)))
    table = confirmed / (confirmed.amax(0) + DOUBT_PX)
    weights = table.float().flatten(1).index_select(1, pair.flatten()).view(2, *pair.shape)
    labelled = counts.sum(2)
    weighted = table * labelled
    # Over the other branch's class: rows are S1's, columns are S2's.
    sums = torch.stack((weighted[0], weighted[1].T, labelled, labelled.T)).sum(2)
    return Reliability(weights, of_class=(sums[:2] / sums[2:].clamp_min(1)).float())

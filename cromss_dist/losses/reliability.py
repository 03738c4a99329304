"""How far each branch may pull the other: as far as labels confirm what it predicts, against what the other one predicts.

Shapes: B batch, C classes, H x W px; index 0 is S1, 1 is S2. Nothing here carries a gradient or waits for the device.
"""

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
        mean: float32 (2,) in [0, 1], mean weight over the labelled pixels of all ranks; 0 without any.
        of_class: float32 (2, C) in [0, 1], the same over those for which the branch predicts the class.
    """

    weights: Tensor
    mean: Tensor
    of_class: Tensor

    def figures(self) -> dict[str, Tensor]:
        """Float32 scalars for the log: `reliability_s1`, of each class `reliability_s1/0` to `/C-1`, and the same for s2."""
        names = [f"reliability_{modality}" for modality in MODALITIES]
        figures = dict(zip(names, self.mean, strict=True))
        for name, of_class in zip(names, self.of_class, strict=True):
            figures |= {f"{name}/{number}": value for number, value in enumerate(of_class)}
        return figures


@torch.no_grad()
def reliability(probs: tuple[Tensor, Tensor], classes: Tensor, reduce_sum: ReduceSum) -> Reliability:
    """Compares the branches, pair by pair of the classes (a, b) that S1 and S2 predict for a pixel.

    Over the labelled pixels of all ranks with that pair, n_S1 are labelled a and n_S2 are labelled b. A branch's weight for
    all pixels with that pair is n_d / (max(n_S1, n_S2) + n_0): 1 for the branch that the labels confirm more often, or as
    often, as the other one, and the ratio of the two for the other; n_0 = 32 px doubts what was hardly seen. So a class that
    a branch always predicts wrongly has weight 0, and one that it cannot see is not pulled away from a branch that can.

    Args:
        probs: float32 (B, C, H, W) of each branch.
        classes: int64 (B, H, W), noisy class, or C for a pixel without a label.
        reduce_sum: Sum of a float64 tensor over ranks. Counts are whole numbers, so their sum is exact in any order.

    Departs: not in CromSS, which weighs by the entropy of the prediction alone.
    """
    C = probs[0].shape[1]
    first, second = (predicted_class(p) for p in probs)
    pair = first * C + second
    values = torch.stack((classes == first, classes == second, classes < C)).float()
    # Line by line first, as in `counts`: exact in float32, and a GPU's threads do not queue for a few addresses.
    lines = values.new_zeros(*values.shape[:-1], C * C).scatter_add_(-1, pair.expand(values.shape), values)
    counts = reduce_sum(lines.sum(2).sum(1, dtype=torch.float64)).view(3, C, C)  # (..., class of S1, class of S2)
    confirmed, labelled = counts[:2], counts[2]
    table = confirmed / (confirmed.amax(0) + DOUBT_PX)
    weights = table.float().flatten(1).index_select(1, pair.flatten())
    weighted = table * labelled
    of_class = torch.stack((weighted[0], weighted[1].T, labelled, labelled.T)).sum(2)  # by the branch's own class
    of_all = of_class.sum(1)
    return Reliability(
        weights=weights.view(2, *pair.shape),
        mean=(of_all[:2] / of_all[2:].clamp_min(1)).float(),
        of_class=(of_class[:2] / of_class[2:].clamp_min(1)).float(),
    )


def predicted_class(probs: Tensor) -> Tensor:
    """The class of the largest probability, of equal ones the last; 0 where it is NaN.

    Args:
        probs: float32 (B, C, H, W), sums to 1 over C.

    Returns:
        int64 (B, H, W).
    """
    # In place of argmax, which on a CPU takes a quarter of the time of the whole loss: where a probability is not the largest,
    # which is 1/C at least, 2^40 times their distance outweighs every class number.
    number = torch.arange(probs.shape[1], dtype=probs.dtype, device=probs.device)[:, None, None]
    return torch.add(number, probs - probs.amax(1, keepdim=True), alpha=2.0**40).amax(1).nan_to_num().long()

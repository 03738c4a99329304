"""The loss that ties one branch's prediction to the other's.

Shapes: B batch, C classes, H x W px.
"""

from typing import Literal

from torch import Tensor

from cromss_dist.losses.confidence import entropy
from cromss_dist.losses.segmentation import cross_entropy_sum, pixel_sum


def consistency_sum(
    kind: Literal["ce", "kl", "mse"],
    probs: Tensor,
    log_probs: Tensor,
    other_probs: Tensor,
    other_log_probs: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sum over pixels of w * D(P of the other branch, Q of this one); the gradient goes into this branch only.

    D is cross-entropy ('ce'), Kullback-Leibler divergence ('kl', the same gradient) or the squared difference summed over
    classes ('mse').

    Args:
        kind: D.
        probs: float32 (B, C, H, W), Q.
        log_probs: float32 (B, C, H, W), log Q.
        other_probs: float32 (B, C, H, W), P, detached.
        other_log_probs: float32 (B, C, H, W), log P, detached.
        weights: float32 (B, H, W), W_e of the other branch.

    Returns:
        float64 scalar.

    Reference: CromSS, section III-A.
    """
    if kind == "mse":
        return pixel_sum((probs - other_probs).square().sum(1) * weights)
    cross_entropy = cross_entropy_sum(log_probs, other_probs * weights[:, None])
    return cross_entropy if kind == "ce" else cross_entropy - pixel_sum(entropy(other_probs, other_log_probs) * weights)

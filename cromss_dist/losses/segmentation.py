"""Segmentation terms on soft labels, as sums: what a rank adds up before anything is divided.

Shapes: B batch, C classes, H x W px. Sums run in float32 over the pixels of a sample, where they are short, and in float64
from there on, so that neither batch nor rank boundaries show in them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DICE_EPS = 1e-7
FOCAL_GAMMA = 2


def pixel_sum(values: Tensor) -> Tensor:
    """Sum over the pixels of all samples: float32 (B, ..., H, W) to float64 (...)."""
    return values.sum((-2, -1)).sum(0, dtype=torch.float64)


def soft_label(label: Tensor, prior: Tensor | None, num_classes: int, prior_weight: float, uniform_weight: float) -> Tensor:
    """Z' = (1 - a - b) onehot(label) + a prior + b / C; without a prior the one-hot label itself.

    Args:
        label: int64 (B, H, W), classes 0..C-1.
        prior: float32 (B, C, H, W), sums to 1 over C, or None.
        num_classes: C.
        prior_weight: a.
        uniform_weight: b.

    Returns:
        float32 (B, C, H, W), sums to 1 over C.

    Reference: CromSS, section III-B.
    """
    B, H, W = label.shape
    if prior is None:
        return torch.zeros(B, num_classes, H, W, device=label.device).scatter_(1, label[:, None], 1.0)
    target = (prior.float() * prior_weight).add_(uniform_weight / num_classes)
    hard = target.new_full((), 1 - prior_weight - uniform_weight)
    return target.scatter_add_(1, label[:, None], hard.expand(B, 1, H, W))


def cross_entropy_sum(log_probs: Tensor, weighted_target: Tensor) -> Tensor:
    """Sum over pixels of w * CE(Q; Z').

    Args:
        log_probs: float32 (B, C, H, W), log Q.
        weighted_target: float32 (B, C, H, W), w * Z'.

    Returns:
        float64 scalar.
    """
    return -pixel_sum(log_probs * weighted_target).sum()


def focal_sum(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Sum over pixels of w * mean over classes of (1 - exp(-l))^2 l, l the binary cross-entropy of sigmoid(logit).

    The sigmoid (one against the rest), gamma = 2 and the mean over classes are what the published numbers show; with
    hard labels exp(-l) is the probability of the right answer.

    Args:
        logits: float32 (B, C, H, W).
        target: float32 (B, C, H, W), Z'.
        weights: float32 (B, H, W).

    Returns:
        float64 scalar.

    Reference: Lin et al., "Focal loss for dense object detection" (2017).
    """
    binary = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return pixel_sum((torch.expm1(-binary) ** FOCAL_GAMMA * binary).mean(1) * weights)


def dice_sums(probs: Tensor, weighted_target: Tensor, weights: Tensor) -> Tensor:
    """Per class: sum w q z, sum w q, sum w z over all pixels.

    Args:
        probs: float32 (B, C, H, W), Q.
        weighted_target: float32 (B, C, H, W), w * Z'.
        weights: float32 (B, H, W), w.

    Returns:
        float64 (3, C).
    """
    return torch.stack((pixel_sum(probs * weighted_target), pixel_sum(probs * weights[:, None]), pixel_sum(weighted_target)))


def dice_loss(sums: Tensor) -> Tensor:
    """Soft Dice from its sums: the mean over classes of 1 - 2 sum w q z / (sum w q + sum w z).

    A class without label mass gives 0.

    Args:
        sums: float64 (..., 3, C), as from `dice_sums`.

    Returns:
        float64 (...), in [0, 1].
    """
    intersection, predicted, labelled = sums.unbind(-2)
    loss = 1 - 2 * intersection / (predicted + labelled).clamp_min(DICE_EPS)
    return (loss * (labelled > 0)).mean(-1)

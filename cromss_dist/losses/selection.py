"""Which pixels count, and how much: the ramp, class-balanced selection, consistency weights.

Shapes: M modalities, N pixels, C classes. Nothing here carries a gradient, and nothing waits for the device.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]

# Digits (width, shift) of a float's 32 bits, the most significant first.
_DIGITS = ((11, 21), (11, 10), (10, 0))
HISTOGRAM_BINS = 2**11  # of the widest digit


def ramp(progress: float, kind: Literal["exp", "linear", "none"], ramp_epochs: float) -> float:
    """How far selection has set in, in [0, 1].

    Args:
        progress: Epochs trained, a real number.
        kind: 'exp' exp(-5 (1 - e / E)^2), 'linear' e / E, 'none' 1 from the start.
        ramp_epochs: E, epochs until the ramp is 1; 0 is no ramp.
    """
    if kind == "none" or progress >= ramp_epochs:
        return 1.0
    share = progress / ramp_epochs
    return share if kind == "linear" else math.exp(-5 * (1 - share) ** 2)


def keep_ratio(progress: float, progress_ramp: float, keep_share: float, ramp_epochs: float) -> float:
    """Share r of each class to keep: 1 - ramp (1 - rho) until epoch E, then rho itself.

    Args:
        progress: Epochs trained.
        progress_ramp: The ramp's value there, in [0, 1].
        keep_share: rho, in [0, 1].
        ramp_epochs: E, epochs.
    """
    # Not the same at the end of the ramp: 1 - (1 - 0.29) > 0.29 in binary, and k = floor(100 r) shows it.
    return 1 - progress_ramp * (1 - keep_share) if progress <= ramp_epochs else keep_share


def class_thresholds(confidence: Tensor, classes: Tensor, num_classes: int, ratio: float, reduce_sum: ReduceSum) -> Tensor:
    """The k-th largest confidence of each class in each modality over all ranks, k = floor(pixels of the class * ratio).

    Exact, by radix selection: non-negative floats sort like their bit patterns, so three histograms of 11, 11 and 10 bits
    find the k-th. Only the histograms, (M, C, 2048) counts, travel between ranks.

    Args:
        confidence: float32 (M, N), not negative.
        classes: int64 (N,), 0..C-1, or C for a pixel that does not count.
        num_classes: C.
        ratio: r, share of each class to keep, in [0, 1].
        reduce_sum: Sum of an int64 tensor over ranks.

    Returns:
        float32 (M, C); inf where k = 0.
    """
    M = len(confidence)
    num_groups = M * num_classes
    bits = confidence.contiguous().view(torch.int32)
    modality = torch.arange(M, device=classes.device)[:, None]
    # A pixel's group is its modality and class; pixels out of the race are in the spare last group.
    group = torch.where(classes < num_classes, modality * num_classes + classes, num_groups)
    one = torch.ones((), dtype=torch.int64, device=classes.device).expand(group.numel())
    prefix = torch.zeros(num_groups, dtype=torch.int64, device=classes.device)
    keep = rank = prefix  # set from the first histogram
    for width, shift in _DIGITS:
        digit = (bits >> shift) & (2**width - 1)
        counts = torch.zeros((num_groups + 1) * HISTOGRAM_BINS, dtype=torch.int64, device=classes.device)
        # scatter_add, not bincount: bincount waits for the GPU to learn the number of bins.
        counts.scatter_add_(0, (group * HISTOGRAM_BINS + digit).flatten(), one)
        counts = reduce_sum(counts.view(num_groups + 1, HISTOGRAM_BINS)[:-1])
        at_or_above = counts.flip(1).cumsum(1).flip(1)
        if shift == _DIGITS[0][1]:
            keep = rank = (at_or_above[:, 0].double() * ratio).floor().long()
        chosen = (at_or_above >= rank[:, None]).sum(1, keepdim=True) - 1  # the digit that the k-th largest has
        rank = rank - (at_or_above - counts).gather(1, chosen)[:, 0]
        prefix = (prefix << width) | chosen[:, 0]
        chosen_digit = torch.cat((chosen[:, 0], chosen.new_zeros(1))).take(group)
        group = torch.where(digit == chosen_digit, group, num_groups)
    threshold = torch.where(keep > 0, prefix.int().view(torch.float32), torch.inf)
    return threshold.view(M, num_classes)


def selection_weights(confidence: Tensor, classes: Tensor, num_classes: int, ratio: float, reduce_sum: ReduceSum) -> Tensor:
    """Weights W_l of the segmentation loss: 1 for the surest share of each noisy class, less below.

    At theta, the k-th largest confidence of the class over all ranks, and above the weight is 1; below it is confidence / theta.
    All weights are 1 for ratio 1, and the confidence itself for ratio 0.

    Args:
        confidence: float32 (M, B, H, W) in [0, 1], refined label confidence.
        classes: int64 (B, H, W), noisy class, or C for a pixel that does not count.
        num_classes: C.
        ratio: r, share of each class to keep, in [0, 1].
        reduce_sum: Sum of an int64 tensor over ranks.

    Returns:
        float32 (M, B, H, W) in [0, 1]; 0 where a pixel does not count.

    Reference: CromSS, section III-C.
    Departs: thresholds see the global batch when `reduce_sum` does, not one device's.
    """
    if ratio == 1 or ratio == 0:
        weights = torch.ones_like(confidence) if ratio == 1 else confidence
        return weights * (classes < num_classes)
    flat = confidence.flatten(1)
    threshold = class_thresholds(flat, classes.flatten(), num_classes, ratio, reduce_sum)
    # k = 0 and pixels that do not count have theta = inf, so weight 0; theta = 0 gives 1, as nothing is below it.
    per_pixel = torch.cat((threshold, threshold.new_full((len(flat), 1), torch.inf)), 1).index_select(1, classes.flatten())
    return torch.where(flat >= per_pixel, 1.0, flat / per_pixel).view_as(confidence)


def consistency_weights(confidence: Tensor, progress_ramp: float) -> Tensor:
    """Weights W_e of the consistency loss: from 1 to the refined prediction confidence along the ramp.

    Args:
        confidence: float32 (M, B, H, W) in [0, 1].
        progress_ramp: The ramp's value, in [0, 1].

    Returns:
        float32 (M, B, H, W) in [0, 1].
    """
    return (1 - progress_ramp) + progress_ramp * confidence

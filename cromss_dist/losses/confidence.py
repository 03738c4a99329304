"""How sure a branch is of a pixel, and what the two branches agree on.

Shapes: M modalities, B batch, C classes, H x W px. Inputs are float32 and carry no gradient.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def entropy(probs: Tensor, log_probs: Tensor) -> Tensor:
    """Shannon entropy per pixel, nats: (B, C, H, W) to (B, H, W), in [0, log C]."""
    return -(probs * log_probs).sum(1)


def prediction_confidence(probs: Tensor, log_probs: Tensor, kind: Literal["entropy", "gini"] = "entropy") -> Tensor:
    """Confidence c^p from the prediction alone: 1 - H / log C ('entropy') or sum P^2 ('gini').

    Args:
        probs: float32 (B, C, H, W), softmax of the logits.
        log_probs: float32 (B, C, H, W), its logarithm.
        kind: The measure.

    Returns:
        float32 (B, H, W) in [0, 1].

    Reference: CromSS, section III-C.
    """
    match kind:
        case "gini":
            confidence = probs.square().sum(1)
        case "entropy":
            confidence = 1 - entropy(probs, log_probs) / math.log(probs.shape[1])
    return confidence.clamp(0, 1)


def label_confidence(probs: Tensor, label: Tensor) -> Tensor:
    """Confidence c^l in the noisy label: the predicted probability of that class.

    Args:
        probs: float32 (B, C, H, W).
        label: int64 (B, H, W), classes 0..C-1.

    Returns:
        float32 (B, H, W) in [0, 1].
    """
    return probs.gather(1, label[:, None])[:, 0]


def refine(confidence: Tensor) -> Tensor:
    """Raises each modality's confidence by what both agree on: (c_d + c_1 c_2) / 2.

    Args:
        confidence: float32 (2, B, H, W) in [0, 1].

    Returns:
        float32 (2, B, H, W) in [0, 1].

    Reference: CromSS, section III-C.
    """
    return (confidence + torch.prod(confidence, dim=0)) / 2


def predicted_class(probs: Tensor) -> Tensor:
    """The class of the largest probability; the last one of those that equal it in all bits but the last few.

    Args:
        probs: float32 (B, C, H, W), sums to 1 over C.

    Returns:
        int32 (B, H, W) in [0, C), for NaN, too.
    """
    # In place of argmax, which on a CPU takes a quarter of the time of the whole loss: floats above 0 sort like their bit
    # patterns, and the last bits, 4 of 23 for nine classes, give way to the number of the class.
    C = probs.shape[1]
    last = 2 ** (C - 1).bit_length() - 1
    number = torch.arange(C, dtype=torch.int32, device=probs.device)[:, None, None]
    return probs.view(torch.int32).bitwise_and(~last).bitwise_or_(number).amax(1).bitwise_and_(last)

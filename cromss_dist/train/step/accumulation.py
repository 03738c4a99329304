"""The gradient of one optimiser step from its micro batches.

Layer 3. Selection, Dice and every quotient of the loss see all pixels at once, so the loss of a global batch is not a mean
over micro batches. At scope 'global' it is computed exactly, in three acts: logits of all micro batches without gradient, the
loss on the joined logits with its gradient at them, and a second forward pass of each micro batch that is fed with its part.

Memory at 9 classes, for each pixel of all micro batches of this rank: 72 bytes of logits and, while the loss works on them,
450 more (measured, float32), when no activation of a network is alive; then 72 of their gradient. Time: one forward pass more.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from cromss_dist.losses import CromssLoss, LossOutput
from cromss_dist.schema import Example
from cromss_dist.train.figures.meter import Phase

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Timer = Callable[[Phase], AbstractContextManager[None]]


class Differentiates(Protocol):
    """What is asked of an engine; `Engine` has it."""

    def backward(self, loss: Tensor) -> None:
        """Adds up a micro batch's gradient; a step's is the mean over its micro batches and the ranks."""

    def frozen_statistics(self) -> AbstractContextManager[None]:
        """In which a forward pass leaves the running statistics of batch norms alone."""


def accumulated_step(
    forward: Forward,
    micro_batches: Sequence[Example],
    loss: CromssLoss,
    progress: float,
    engine: Differentiates,
    phase: Timer = lambda _: nullcontext(),
) -> LossOutput:
    """Adds up the gradient of one optimiser step, and leaves moving the weights to the caller.

    Scope 'global' with several micro batches: loss and gradient are those of one batch of all of them, up to the order of
    sums. What batch norms normalise by is still one micro batch; each moves their running statistics once. Random numbers
    (dropout) are the same in both passes. Other scopes, or one micro batch: the mean over micro batches, in one pass.

    Args:
        forward: Logits of both branches for S1 and S2 images, in the engine's arithmetic.
        micro_batches: Of this rank; equally many, and equally many samples in each, on all ranks.
        loss: CromSS.
        progress: Epochs trained, as for the loss.
        engine: Whose `backward` is called once a micro batch.
        phase: Times 'forward', 'loss' and 'backward': `Meter.phase`. The gradient at joined logits is part of 'loss'.

    Returns:
        The loss of all micro batches without gradient: selection weights of all samples in their order, counts added up.
        `total` and `parts` are means over micro batches where the scope is not 'global'.
    """
    if loss.config.scope == "global" and len(micro_batches) > 1:
        return _two_passes(forward, micro_batches, loss, progress, engine, phase)
    outputs = []
    for example in micro_batches:
        with phase("forward"):
            logits = forward(example.s1, example.s2)
        with phase("loss"):
            output = loss(*logits, example.label, example.prior, progress, example.weights)
        with phase("backward"):
            engine.backward(output.total)
        outputs.append(output)
    return LossOutput(
        total=torch.stack([output.total.detach() for output in outputs]).mean(),
        parts={name: torch.stack([output.parts[name] for output in outputs]).mean() for name in outputs[0].parts},
        selection_s1=torch.cat([output.selection_s1 for output in outputs]),
        selection_s2=torch.cat([output.selection_s2 for output in outputs]),
        counts=reduce(add, [output.counts for output in outputs]),
    )


def _two_passes(
    forward: Forward,
    micro_batches: Sequence[Example],
    loss: CromssLoss,
    progress: float,
    engine: Differentiates,
    phase: Timer,
) -> LossOutput:
    device = micro_batches[0].s1.device
    # Leaving fork_rng puts the generators back, so that the second pass draws what the first one drew.
    draws_again = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with phase("forward"), draws_again, torch.no_grad(), engine.frozen_statistics():
        pairs = [forward(example.s1, example.s2) for example in micro_batches]
        # In float32, so that the gradient is rounded to the logits' type only after the engine's loss scale, as in one pass.
        logits_s1, logits_s2 = (torch.cat(list(branch)).float() for branch in zip(*pairs, strict=True))
        del pairs
    with phase("loss"):
        output, slopes = _slopes(logits_s1, logits_s2, micro_batches, loss, progress)
        del logits_s1, logits_s2
    for example, parts in zip(micro_batches, slopes, strict=True):
        with phase("forward"):
            logits = forward(example.s1, example.s2)
        with phase("backward"):
            # Its gradient at the logits is `parts`; the engine takes a mean over micro batches, hence their number.
            pairings = [(x.float() * slope).sum() for x, slope in zip(logits, parts, strict=True)]
            engine.backward(len(micro_batches) * (pairings[0] + pairings[1]))
    return output


def _slopes(
    logits_s1: Tensor, logits_s2: Tensor, micro_batches: Sequence[Example], loss: CromssLoss, progress: float
) -> tuple[LossOutput, list[tuple[Tensor, ...]]]:
    """The loss of all micro batches, and its gradient at both logits of each; keeps nothing else alive."""
    logits_s1.requires_grad_()
    logits_s2.requires_grad_()
    priors = [example.prior for example in micro_batches if example.prior is not None]
    output = loss(
        logits_s1,
        logits_s2,
        torch.cat([example.label for example in micro_batches]),
        torch.cat(priors) if priors else None,
        progress,
        torch.cat([example.weights for example in micro_batches]),
    )
    slopes = torch.autograd.grad(output.total, (logits_s1, logits_s2))
    sizes = [len(example.label) for example in micro_batches]
    per_micro_batch = list(zip(*(torch.split(slope, sizes) for slope in slopes), strict=True))
    return replace(output, total=output.total.detach()), per_micro_batch

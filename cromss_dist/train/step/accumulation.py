"""The gradient of one optimiser step from its micro batches.

Layer 3. Selection, Dice and every quotient of the loss see all pixels at once, so the loss of a global batch is not a mean
over micro batches. At scope 'global' it is computed exactly, in three acts: logits of all micro batches without gradient, the
loss on the joined logits with its gradient at them, and a second forward pass of each micro batch that is fed with its part.

Memory at 9 classes, for each pixel of all micro batches of this rank: 72 bytes of logits and, while the loss works on them,
450 more (measured, float32), when no activation of a network is alive; then 72 of their gradient. Time: one forward pass more.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from cromss_dist.schema import Example
from cromss_dist.train.figures.meter import Phase

Scope: TypeAlias = Literal["global", "micro", "local"]
"""What a call of a loss sees: all micro batches of a step on all ranks, one of each rank, or one rank's."""
Forward: TypeAlias = Callable[..., tuple[Tensor, ...]]
Timer: TypeAlias = Callable[[Phase], AbstractContextManager[None]]


@dataclass(frozen=True)
class StepLoss:
    """The loss of what one call sees: a micro batch, or all micro batches of a step."""

    total: Tensor  # float32 scalar; its gradient is this rank's part times the number of ranks that it sees
    parts: dict[str, Tensor]  # detached float32 scalars by name, see `Meter.add`
    counts: Tensor  # float64 (N,) of this rank's pixels, to be added up over steps and ranks before anything is divided


class Loss(Protocol):
    """What is asked of a loss."""

    @property
    def scope(self) -> Scope:
        """What one call sees."""

    def __call__(self, logits: Sequence[Tensor], example: Example, progress: float) -> StepLoss:
        """The training loss; a collective call where it sees other ranks' pixels.

        Args:
            logits: What the networks return: float (B, C, h, w) each.
            example: Labels and weights, of the same samples.
            progress: Epochs trained.
        """


class Differentiates(Protocol):
    """What is asked of an engine; `Engine` has it."""

    def backward(self, loss: Tensor) -> None:
        """Adds up a micro batch's gradient; a step's is the mean over its micro batches and the ranks."""

    def frozen_statistics(self) -> AbstractContextManager[None]:
        """In which a forward pass leaves the running statistics of batch norms alone."""


def accumulated_step(
    forward: Forward,
    micro_batches: Sequence[Example],
    loss: Loss,
    progress: float,
    engine: Differentiates,
    phase: Timer = lambda _: nullcontext(),
) -> StepLoss:
    """Adds up the gradient of one optimiser step, and leaves moving the weights to the caller.

    Scope 'global' with several micro batches: loss and gradient are those of one batch of all of them, up to the order of
    sums. What batch norms normalise by is still one micro batch; each moves their running statistics once. Random numbers
    (dropout) are the same in both passes. Other scopes, or one micro batch: the mean over micro batches, in one pass.

    Args:
        forward: Logits for the images of an example, in the engine's arithmetic.
        micro_batches: Of this rank; equally many, and equally many samples in each, on all ranks.
        loss: Of the task.
        progress: Epochs trained, as for the loss.
        engine: Whose `backward` is called once a micro batch.
        phase: Times 'forward', 'loss' and 'backward': `Meter.phase`. The gradient at joined logits is part of 'loss'.

    Returns:
        The loss of all micro batches without gradient: counts are added up, `total` and `parts` are means over micro batches
        where the scope is not 'global'.
    """
    if loss.scope == "global" and len(micro_batches) > 1:
        return _two_passes(forward, micro_batches, loss, progress, engine, phase)
    outputs = []
    for example in micro_batches:
        with phase("forward"):
            logits = forward(*example.images.values())
        with phase("loss"):
            output = loss(logits, example, progress)
        with phase("backward"):
            engine.backward(output.total)
        outputs.append(output)
    return StepLoss(
        total=torch.stack([output.total.detach() for output in outputs]).mean(),
        parts={name: torch.stack([output.parts[name] for output in outputs]).mean() for name in outputs[0].parts},
        counts=reduce(add, [output.counts for output in outputs]),
    )


def _two_passes(
    forward: Forward,
    micro_batches: Sequence[Example],
    loss: Loss,
    progress: float,
    engine: Differentiates,
    phase: Timer,
) -> StepLoss:
    device = micro_batches[0].label.device
    # Leaving fork_rng puts the generators back, so that the second pass draws what the first one drew.
    draws_again = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with phase("forward"), draws_again, torch.no_grad(), engine.frozen_statistics():
        parts = [forward(*example.images.values()) for example in micro_batches]
        # In float32, so that the gradient is rounded to the logits' type only after the engine's loss scale, as in one pass.
        joined = [torch.cat(branch).float() for branch in zip(*parts, strict=True)]
        del parts
    with phase("loss"):
        output, slopes = _slopes(joined, micro_batches, loss, progress)
        del joined
    for example, slope in zip(micro_batches, slopes, strict=True):
        with phase("forward"):
            logits = forward(*example.images.values())
        with phase("backward"):
            # Its gradient at the logits is `slope`; the engine takes a mean over micro batches, hence their number.
            pairings = [(x.float() * of_branch).sum() for x, of_branch in zip(logits, slope, strict=True)]
            engine.backward(len(micro_batches) * reduce(add, pairings))
    return output


def _slopes(
    logits: Sequence[Tensor], micro_batches: Sequence[Example], loss: Loss, progress: float
) -> tuple[StepLoss, list[tuple[Tensor, ...]]]:
    """The loss of all micro batches, and its gradient at the logits of each; keeps nothing else alive."""
    for branch in logits:
        branch.requires_grad_()
    output = loss(logits, join_examples(micro_batches), progress)
    slopes = torch.autograd.grad(output.total, list(logits))
    sizes = [len(example.label) for example in micro_batches]
    per_micro_batch = list(zip(*(torch.split(slope, sizes) for slope in slopes), strict=True))
    return replace(output, total=output.total.detach()), per_micro_batch


def join_examples(parts: Sequence[Example]) -> Example:
    """The samples of all parts, but for their images, of which no loss asks."""
    priors = [part.prior for part in parts if part.prior is not None]
    return Example(
        images={},
        label=torch.cat([part.label for part in parts]),
        prior=torch.cat(priors) if priors else None,
        reference=None,
        weights=torch.cat([part.weights for part in parts]),
    )

"""Time and learning rate as functions of the samples seen, never of steps or ranks.

Layer 3.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cromss_dist.config import BaseRunConfig, TrainConfig


@dataclass(frozen=True)
class Timeline:
    """A run in optimiser steps, from lengths in epochs of samples.

    Steps are rounded so that at least one is taken; `total_samples` is what the steps really consume.
    """

    epoch_samples: int  # of the training line
    global_batch: int
    total_steps: int
    validate_every_steps: int
    save_every_steps: int

    @classmethod
    def of(cls, config: BaseRunConfig, epoch_samples: int) -> "Timeline":
        """The timeline of a config whose epochs have `epoch_samples` samples."""
        batch = config.engine.global_batch

        def steps(epochs: float) -> int:
            return max(1, round(epochs * epoch_samples / batch))

        lengths = (config.train.epochs, config.train.validate_every_epochs, config.checkpoint.every_epochs)
        return cls(epoch_samples, batch, *map(steps, lengths))

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows `step` steps: none, each interval and the end, but not twice in a row there.

        The end may lie behind: a run can be made shorter than it is already.
        """
        left = self.total_steps - step
        return step == 0 or left <= 0 or (step % self.validate_every_steps == 0 and left >= self.validate_every_steps / 2)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows `step` steps: each interval and the end."""
        return step == self.total_steps or step % self.save_every_steps == 0

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.total_steps * self.global_batch

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps an epoch; not whole where batches run on over the end of an epoch."""
        return self.epoch_samples / self.global_batch

    def epochs(self, samples: int) -> float:
        """Progress in epochs after `samples`."""
        return samples / self.epoch_samples


def lr_factor(train: TrainConfig, timeline: Timeline, samples: int) -> float:
    """Factor of the learning rate after `samples`: linear warm-up, then 1 ('plateau') or a cosine down to min_lr.

    Returns:
        The factor of `train.lr`, in [0, 1]. The first step of a warm-up is not 0.
    """
    warmup = train.warmup_epochs * timeline.epoch_samples
    if samples < warmup:
        return min(1.0, (samples + timeline.global_batch) / warmup)
    if train.schedule == "plateau":
        return 1.0
    end = timeline.total_samples if train.decay_epochs is None else train.decay_epochs * timeline.epoch_samples
    share = (samples - warmup) / max(1.0, end - warmup)
    floor = train.min_lr / train.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class Plateau:
    """Factor of the learning rate that falls when the validation loss stalls; 1 for ever where the schedule is another.

    torch's ReduceLROnPlateau, run on a stand-in optimiser whose rate is the factor, so that it combines with a warm-up.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._in_use = train.schedule == "plateau"
        self._factor = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._factor, factor=train.plateau_factor, patience=train.plateau_patience, min_lr=train.min_lr / train.lr
        )

    def update(self, validation_loss: float) -> None:
        """Takes the loss of one validation."""
        if self._in_use:
            self._rule.step(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        """All that later factors depend on; JSON types, exact."""
        best = float(self._rule.best)
        return {
            "factor": self.factor,
            "best": best if math.isfinite(best) else None,  # none before the first validation
            "num_bad": self._rule.num_bad_epochs,
            "num_validations": self._rule.last_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what `state_dict` gave."""
        self._factor.param_groups[0]["lr"] = state["factor"]
        self._rule.best = math.inf if state["best"] is None else state["best"]
        self._rule.num_bad_epochs, self._rule.last_epoch = state["num_bad"], state["num_validations"]

    @property
    def factor(self) -> float:
        """Factor of `train.lr`, in (0, 1]."""
        return float(self._factor.param_groups[0]["lr"])

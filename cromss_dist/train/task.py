"""What a run trains: all that the training loop asks of a task, whatever it is.

Layer 3. Order, steps, checkpoints, guards, figures of time and what a user sees of a run are the same for every task; networks,
examples, loss, scores and what is left at the end are the task's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from cromss_dist.config import BaseRunConfig, BatchPlan, ReadingConfig
from cromss_dist.data.loading.plan import TrainPlan
from cromss_dist.schema import Batch, Example
from cromss_dist.train.run.folder import RunSummary
from cromss_dist.train.run.record import Record
from cromss_dist.train.step.accumulation import Loss
from cromss_dist.train.step.engine import Engine
from cromss_dist.train.step.schedule import Timeline
from cromss_dist.world import World

GoesOn: TypeAlias = Callable[[str], bool]
"""Called on every rank before each batch of a long evaluation, with the place; false gives it up, on all ranks."""


class TaskLoss(Loss, Protocol):
    """The loss of a task over the ranks of a run."""

    def figures(self, counts: Tensor) -> dict[str, float]:
        """What added-up `StepLoss.counts` say, under MLflow's names. What has no pixel has no figure."""

    def validation_sums(self, logits: Sequence[Tensor], example: Example) -> Tensor:
        """A batch's part of the validation loss, to be added up over batches and ranks: float64 (N,), without gradient."""

    def validation_loss(self, sums: Tensor) -> dict[str, Tensor]:
        """The validation loss of added-up sums: float64 scalars, `total` among them."""


class Validation(Protocol):
    """Scores on what is held out; the same on every rank."""

    @property
    def loss(self) -> float:
        """By which a plateau is seen."""

    def metrics(self) -> dict[str, float]:
        """Finite figures, under MLflow's names: `val/...`."""

    def draw(self) -> Figure:
        """A picture of it, on rank 0."""


class Validator(Protocol):
    """Scores the networks on what is held out."""

    def run(self, progress_epochs: float, goes_on: GoesOn) -> Validation | None:
        """Scores all of it once over all ranks; a collective call.

        Args:
            progress_epochs: Epochs trained.
            goes_on: See there.

        Returns:
            The scores; None where it was given up. The networks are in training mode again.
        """


@dataclass(frozen=True)
class Trained:
    """A run whose steps are all taken, on this rank."""

    world: World
    engine: Engine
    run_dir: Path
    record: Record | None  # on rank 0
    samples: int  # of the training line that were consumed, of all ranks
    samples_per_s: float
    before: dict[str, float]  # validation metrics before the first step; none where nothing is held out
    after: dict[str, float]  # and after the last
    beat: Callable[[str], None]  # a sign of life, with what comes next: a part of what follows must not take longer than
    # `faults.hang_timeout_s`


class Task(Protocol):
    """What is trained, known before the run starts; the same on every rank."""

    @property
    def config(self) -> BaseRunConfig:
        """The whole run; its class says what of it makes another run."""

    @property
    def plan(self) -> BatchPlan:
        """Batch arithmetic."""

    @property
    def timeline(self) -> Timeline:
        """Lengths in steps."""

    @property
    def datasets(self) -> Mapping[str, str]:
        """Location and digest of each dataset that is learnt from, in the order in which samples are numbered."""

    def describe(self) -> str:
        """What `--dry-run` prints."""

    def build_model(self) -> nn.Module:
        """The networks, drawn from the run's seed: images (B, bands, h, w) of each modality in turn to a tuple of logits.

        Parameters without `requires_grad` stay as they are, and so do the statistics of batch norms that its `train()` leaves
        in evaluation mode.
        """

    @property
    def reading(self) -> ReadingConfig:
        """How training samples get from files into batches."""

    def train_plan(self, plan: BatchPlan, rank: int = 0) -> TrainPlan:
        """What a rank trains on, and when."""

    def example(self, batch: Batch, device: torch.device) -> Example:
        """What networks and loss see of a training batch."""

    def loss(self, world: World) -> TaskLoss:
        """The loss over the ranks."""

    def validator(self, world: World, engine: Engine) -> Validator | None:
        """What scores the networks; None where nothing is held out, and then `train.schedule` cannot be 'plateau'."""

    def finish(self, trained: Trained) -> RunSummary | None:
        """What follows the last step: scores, files, the end of the record and the summary; a collective call.

        It may be called again, on a run that was stopped in it.

        Returns:
            On rank 0 the summary, which is written; None elsewhere.
        """

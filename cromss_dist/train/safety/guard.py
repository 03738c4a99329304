"""Steps that went wrong: one vote of all ranks on each, and the memory of the last ones.

Layer 3. What is decided depends on sums over ranks and on numbers that are equal on all of them, so all ranks decide alike.
"""

import math
import shlex
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cromss_dist.config import FaultConfig
from cromss_dist.errors import DivergenceError
from cromss_dist.train.safety.bundle import FOLDER as BUNDLES_FOLDER
from cromss_dist.train.step.engine import StepResult
from cromss_dist.world import World

# A level that the loss keeps for longer is no spike: warm-ups end, ramps of the selection rise, rates change.
MAX_SPIKES_IN_A_ROW = 2


class Verdict(NamedTuple):
    """What all ranks found out about a step before the optimiser moves; equal on all of them."""

    loss: float
    """Mean over the ranks, nan or inf where it is not finite on one of them."""
    finite: bool
    spike: bool
    stop: bool
    """Whether some rank was asked to stop."""
    skip: bool
    """Whether the optimiser must not move: `engine.step(veto=verdict.skip)`."""


class Guard:
    """Judges each step before the optimiser moves, and counts what went wrong after it.

    Args:
        config: What is a fault and what becomes of it.
        world: This process among the others.
    """

    def __init__(self, config: FaultConfig, world: World) -> None:
        self.config = config
        self._world = world
        self._window: deque[float] = deque(maxlen=config.spike_window)  # losses of good steps
        self._spikes_in_a_row = 0
        self._bad_in_a_row = 0
        self._bad_since = 0
        self._bad_reason = ""
        self._skipped_steps = 0
        self._spikes = 0
        self._overflows = 0

    def judge(self, loss: Tensor, stop: bool) -> Verdict:
        """All ranks' verdict on a step whose gradient is there and not used yet; a collective call.

        One sum of two numbers over the ranks, and the one wait for the device.

        Args:
            loss: Float scalar: this rank's loss of the step, the mean over its micro batches.
            stop: Whether this rank was asked to stop.
        """
        # A rank's nan or inf makes the sum one, too; float64 holds any sum of float32.
        votes = torch.stack([loss.detach().double(), torch.full_like(loss, float(stop), dtype=torch.float64)])
        total, stops = self._world.reduce_sum(votes).tolist()
        mean = total / self._world.size
        finite = math.isfinite(mean)
        spike = self._is_high(mean) and self._spikes_in_a_row < MAX_SPIKES_IN_A_ROW
        return Verdict(mean, finite, spike, stops > 0, not finite or (spike and self.config.spike == "skip"))

    def settle(self, verdict: Verdict, result: StepResult, step: int) -> str | None:
        """Counts a step that is over, for the next verdicts.

        A step is bad if its loss or gradient is not finite. An fp16 overflow is not bad, since the next step has another loss
        scale; it ends no row of bad steps either.

        Args:
            verdict: Of this step.
            result: Of this step; equal on all ranks.
            step: Its number.

        Returns:
            Why this step is worth a replay bundle; None for a good one.
        """
        if not verdict.finite:
            return self._bad(f"loss is {verdict.loss}", step)
        if not (result.applied or result.overflow or verdict.skip):
            return self._bad(f"gradient is not finite, loss is {verdict.loss:.6g}", step)
        if result.overflow:
            self._overflows += 1
        else:
            self._bad_in_a_row = 0
        if verdict.spike:
            level = median(self._window)
            self._spikes += 1
            self._spikes_in_a_row += 1
            self._skipped_steps += verdict.skip
            return f"spike: loss is {verdict.loss:.6g}, {verdict.loss / level:.3g} times the median {level:.6g}"
        if self._is_high(verdict.loss):  # after as many spikes as there may be
            self._window.clear()
        self._spikes_in_a_row = 0
        self._window.append(verdict.loss)
        return None

    def check(self, run_dir: Path, last_checkpoint: int | None) -> None:
        """Ends a run that only takes bad steps; to be called after `settle` and after its replay bundle is written.

        Args:
            run_dir: Folder of the run.
            last_checkpoint: Step of the newest checkpoint, if there is one.

        Raises:
            DivergenceError: the last `max_bad_steps` steps were bad.
        """
        if self._bad_in_a_row < self.config.max_bad_steps:
            return
        kept = (
            "no checkpoint is from before them"
            if last_checkpoint is None
            else f"the newest checkpoint is of step {last_checkpoint}"
        )
        bundles = shlex.quote(str(run_dir / BUNDLES_FOLDER))
        raise DivergenceError(
            f"The last {self._bad_in_a_row} steps, from step {self._bad_since} on, were not finite ({self._bad_reason}); "
            f"faults.max_bad_steps={self.config.max_bad_steps} ends the run. None of them moved the weights; {kept}. To find out "
            f"why, give `cromss replay` a folder in {bundles}; to go on, a smaller --train.lr, --engine.grad_clip or "
            "--engine.precision fp32 may help."
        )

    @property
    def in_streak(self) -> bool:
        """Whether the last step was bad: such a state is not saved."""
        return self._bad_in_a_row > 0

    @property
    def counters(self) -> dict[str, float]:
        """What the run's figures show: counts since its first step."""
        return {
            "train/skipped_steps": self._skipped_steps,
            "train/spikes": self._spikes,
            "train/overflows": self._overflows,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that later verdicts depend on; JSON types, exact."""
        return {
            "window": list(self._window),
            "spikes_in_a_row": self._spikes_in_a_row,
            "skipped_steps": self._skipped_steps,
            "spikes": self._spikes,
            "overflows": self._overflows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what `state_dict` gave; with another `spike_window`, with the last ones of its losses.

        A row of bad steps does not go on: none is saved.
        """
        self._window = deque(state["window"], maxlen=self.config.spike_window)
        self._spikes_in_a_row = state["spikes_in_a_row"]
        self._skipped_steps, self._spikes, self._overflows = state["skipped_steps"], state["spikes"], state["overflows"]
        self._bad_in_a_row = 0

    def _is_high(self, loss: float) -> bool:
        if self.config.spike == "off" or len(self._window) < self.config.spike_window / 4:
            return False
        return loss > self.config.spike_factor * median(self._window)  # never true of nan

    def _bad(self, reason: str, step: int) -> str:
        if self._bad_in_a_row == 0:
            self._bad_since = step
        self._bad_in_a_row += 1
        self._bad_reason = reason
        self._skipped_steps += 1
        return reason

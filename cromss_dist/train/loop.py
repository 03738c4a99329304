"""The training loop of every task: batches, steps, checkpoints, validation; every length is in samples.

Layer 3. Runs alike on every rank; only rank 0 holds a Record. A run can be cut anywhere and goes on from its last checkpoint as
if it had not been: what comes next is a function of the state that `_state` lists and of nothing else.
"""

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from cromss_dist.data.loading.draws import hash64
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.errors import PreemptedError, StorageError, TrainingError
from cromss_dist.schema import Example
from cromss_dist.train.checkpoint.reader import Saved
from cromss_dist.train.checkpoint.store import Checkpoints
from cromss_dist.train.figures.meter import Meter
from cromss_dist.train.figures.profile import Profile
from cromss_dist.train.run.record import Record
from cromss_dist.train.safety.bundle import Bundles
from cromss_dist.train.safety.guard import Guard, Verdict
from cromss_dist.train.safety.hang import HangWatch
from cromss_dist.train.safety.stop import StopRequest
from cromss_dist.train.step.accumulation import accumulated_step
from cromss_dist.train.step.engine import Engine, StepResult
from cromss_dist.train.step.schedule import Plateau, lr_factor
from cromss_dist.train.task import Task, Trained
from cromss_dist.world import World


@dataclass(frozen=True)
class Safeguards:
    """What keeps a run from being lost.

    Args:
        checkpoints: Where it is saved.
        stop: Who may ask it to stop.
        hang: Who sees that it hangs.
    """

    checkpoints: Checkpoints
    stop: StopRequest
    hang: HangWatch


class Training:
    """One run on this rank.

    Args:
        task: What is trained.
        world: This process among the others.
        engine: Model and optimiser.
        safeguards: See there.
        profile: Of a few steps.
        record: On rank 0, where figures and pictures go.
    """

    def __init__(
        self,
        task: Task,
        world: World,
        engine: Engine,
        safeguards: Safeguards,
        profile: Profile,
        record: Record | None,
    ) -> None:
        self.task, self.world, self.engine, self.loss = task, world, engine, task.loss(world)
        self.safeguards, self.profile, self.record = safeguards, profile, record
        self.config, self.timeline = task.config, task.timeline
        self.plateau = Plateau(self.config.train)
        self.guard = Guard(self.config.faults, world)
        self.bundles = Bundles(safeguards.hang.run_dir, task, world, engine)
        self.validator = task.validator(world, engine)
        self.meter = Meter(world.device, self.timeline.global_batch, self.loss.figures)
        self.loader = TrainLoader.of(task.train_plan(task.plan, world.rank), task.reading, pin_memory=world.device.type == "cuda")
        self.step = 0
        """Optimiser steps taken or skipped."""
        self.validated_step = -1
        self.before: dict[str, float] = {}
        """Validation before the first step."""
        self.after: dict[str, float] = {}
        """The last validation."""
        self.samples_per_s = 0.0  # of the last interval that was logged; the run's throughput once warmed up
        self._replaced_before = 0
        self._saved_step = -1

    @property
    def samples(self) -> int:
        """Samples of the training line that were consumed, of all ranks."""
        return self.step * self.timeline.global_batch

    @property
    def epochs(self) -> float:
        """The same in epochs."""
        return self.timeline.epochs(self.samples)

    def resume(self, saved: Saved) -> None:
        """Goes on where a checkpoint was saved, on any number of ranks; a collective call.

        Raises:
            CheckpointError: it is of other networks.
            ConfigError: it is of another order of samples.
        """
        self._tell_of_savings()  # of newer ones that do not verify
        state = saved.state
        self.loader.load_state_dict(state["loader"])
        self.engine.restore(saved.tensors, state["engine"])
        self.plateau.load_state_dict(state["plateau"])
        self.guard.load_state_dict(state["guard"])
        self.step = self._saved_step = saved.step
        self.validated_step = state["validated_step"]
        self.before, self.after = state["before"], state["after"]
        self.samples_per_s = state["samples_per_s"]
        self._replaced_before = state["replaced"] if self.world.is_main else 0  # the sum over ranks

    def run(self) -> None:
        """Trains to the end.

        Raises:
            PreemptedError: someone asked the run to stop; it is saved.
            DivergenceError: too many steps in a row were not finite.
            TrainingError: the validation loss is not finite.
            StorageError: it cannot be saved, and `checkpoint.on_failure` is 'stop'.
        """
        with self.loader, self.profile:
            self._validate()
            while self.step < self.timeline.total_steps:
                verdict = self._train_step()
                if self.step % self.config.train.log_every_steps == 0 or self.step == self.timeline.total_steps:
                    self._log()
                if verdict.stop:
                    self._stop()
                self._validate()
                if self.timeline.saves_after(self.step) and not self.guard.in_streak:
                    self._save()
                self.profile.step()
            self._finish_saving()

    @property
    def trained(self) -> Trained:
        """What the task ends the run with."""
        return Trained(
            world=self.world,
            engine=self.engine,
            run_dir=self.safeguards.hang.run_dir,
            record=self.record,
            samples=self.samples,
            samples_per_s=self.samples_per_s,
            before=self.before,
            after=self.after,
            beat=self.safeguards.hang.beat,
        )

    def _train_step(self) -> Verdict:
        meter, engine = self.meter, self.engine
        torch.manual_seed(int(hash64(self.config.seed, self.step, self.world.rank)[0]))
        engine.lr = self.config.train.lr * lr_factor(self.config.train, self.timeline, self.samples) * self.plateau.factor
        progress = self.epochs
        examples = [self._next_example() for _ in range(self.task.plan.accumulation_steps)]
        out = accumulated_step(engine.forward, examples, self.loss, progress, engine, meter.phase)
        with meter.phase("optimizer"):
            self._beat("the vote on a step")
            verdict = self.guard.judge(out.total, self.safeguards.stop.wanted)
            result = engine.step(veto=verdict.skip)
        self.step += 1
        meter.add(out)
        meter.step_done(result.grad_norm, result.applied)
        if reason := self.guard.settle(verdict, result, self.step):
            self._tell_of_bad_step(reason, verdict, result, progress)
            if self.guard.in_streak:  # what the run would go on from
                self._finish_saving()
            self.guard.check(self.safeguards.hang.run_dir, self.safeguards.checkpoints.last_committed)
        return verdict

    def _next_example(self) -> Example:
        with self.meter.phase("data"):
            self._beat("reading a batch")
            batch = next(self.loader)
        self._beat("computing a step")
        with self.meter.phase("transforms"):
            return self.task.example(batch, self.world.device)

    def _beat(self, place: str) -> None:
        self.safeguards.hang.beat(f"{place}, step {self.step + 1}")

    @property
    def _num_replaced(self) -> int:
        return self._replaced_before + len(self.loader.replaced)

    def _log(self) -> None:
        values = self.meter.read(
            self.world,
            lr=self.engine.lr,
            epochs=self.epochs,
            loss_scale=self.engine.loss_scale if self.engine.precision == "fp16" else None,
            num_replaced=self._num_replaced if self.loader.replaces else None,
            counters=self.guard.counters,
        )
        self.samples_per_s = values["perf/samples_per_s"]
        if self.record:
            self.record.metrics(values, self.step, self.samples)
        if not self.world.any(not self.safeguards.checkpoints.ended):  # it takes no waiting
            self._finish_saving()

    def _validate(self) -> None:
        """Validates where that is due and was not done, also after a resume."""
        if self.validator is None or not self.timeline.validates_after(self.step) or self.validated_step == self.step:
            return
        with self.meter.phase("validation"):
            validation = self.validator.run(self.epochs, self._goes_on)
        if validation is None:
            self._stop()
        if not math.isfinite(loss := validation.loss):
            self._finish_saving()
            raise TrainingError(
                f"The validation loss is {loss} at step {self.step}; a smaller train.lr, engine.grad_clip or "
                "engine.precision=fp32 may help."
            )
        self.after = validation.metrics()
        self.before = self.before or self.after
        self.validated_step = self.step
        self.plateau.update(loss)
        with self.meter.phase("validation"):
            if self.record:
                self.record.validation(self.after, self.step, self.samples)
                self.record.picture(f"panels/step_{self.step:07d}.png", validation.draw())
            self.world.barrier()  # else drawing, which takes seconds, were part of the other ranks' next step

    def _goes_on(self, place: str) -> bool:
        self._beat(place)
        return not self.world.any(self.safeguards.stop.wanted)

    def _save(self) -> None:
        """Takes a snapshot and has it written while training goes on."""
        self._beat("saving")
        self._saved_step = self.step
        with self.meter.phase("checkpoint"):
            self.safeguards.checkpoints.wait()  # else two snapshots were in memory
            self.safeguards.checkpoints.save(self.step, self._state(), self.engine.snapshot())
        self._tell_of_savings()

    def _state(self) -> dict[str, Any]:
        """All that what comes next depends on, beside the tensors: JSON types; a collective call."""
        replaced = torch.tensor([self._num_replaced], dtype=torch.float64, device=self.world.device)
        return {
            "config": self.config.to_dict(),
            "loader": self.loader.state_dict(),
            "engine": self.engine.state(),
            "plateau": self.plateau.state_dict(),
            "guard": self.guard.state_dict(),
            "validated_step": self.validated_step,
            "before": self.before,
            "after": self.after,
            "samples_per_s": self.samples_per_s,
            "replaced": int(self.world.reduce_sum(replaced)),
        }

    def _stop(self) -> NoReturn:
        """Saves, and ends the run so that it can go on."""
        checkpoints = self.safeguards.checkpoints
        if self.record:
            self.record.stopping(self.step, "it was asked to")
        if self._saved_step != self.step and not self.guard.in_streak:
            self._save()
        self._beat("waiting for the checkpoint")
        self._finish_saving()
        kept = checkpoints.last_committed
        state = "nothing of it is saved" if kept is None else f"it is saved up to step {kept}"
        raise PreemptedError(f"The run was asked to stop after step {self.step}; {state}.")

    def _finish_saving(self) -> None:
        """Waits until what is being saved is on disk, and tells of it; a collective call."""
        self.safeguards.checkpoints.wait()
        self._tell_of_savings()

    def _tell_of_savings(self) -> None:
        """Events of what was saved, and of what could not be, once each."""
        news = self.safeguards.checkpoints.take_news()
        if self.record:
            self.record.savings(news)

    def _tell_of_bad_step(self, reason: str, verdict: Verdict, result: StepResult, progress: float) -> None:
        """An event, and a replay bundle while there is room for one; a collective call."""
        folder = None
        try:
            folder = self.bundles.keep(reason, self.step, progress, verdict.loss, result)
        except StorageError as error:  # the run needs no bundle
            if self.record:
                self.record.event("stage", text=str(error))
        bundle = str(folder) if folder else None
        if self.record and verdict.spike:
            self.record.spike(self.step, reason, not result.applied, bundle)
        elif self.record:
            self.record.bad_step(self.step, reason, bundle)

"""Figures of training between two log lines: loss, selection, and where the time of a step goes, without a sync per step.

Layer 3.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from cromss_dist.world import World

Phase: TypeAlias = Literal["data", "transforms", "forward", "loss", "backward", "optimizer", "checkpoint", "validation"]
STEP_PHASES: dict[Phase, str] = {
    "data": "perf/data_wait_s",
    "transforms": "perf/transforms_s",
    "forward": "perf/forward_s",
    "loss": "perf/loss_s",
    "backward": "perf/backward_s",
    "optimizer": "perf/optimizer_s",
}
PAUSES: dict[Phase, str] = {"checkpoint": "perf/checkpoint_s", "validation": "perf/validation_s"}  # of a run, not of its steps
_PHASES = (*STEP_PHASES, *PAUSES)
_ON_DEVICE: tuple[Phase, ...] = ("transforms", "forward", "loss", "backward", "optimizer")
_GIB = 2**30


class Reported(Protocol):
    """What a loss reports; `StepLoss` does."""

    @property
    def total(self) -> Tensor:
        """float32 scalar."""

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """float32 scalars by name."""

    @property
    def counts(self) -> Tensor:
        """float64 (N,)."""


class Meter:
    """Adds up what the loss reports on the device, and times the phases of a step.

    A GPU's phases are timed by events in its stream, all others by the host's clock. Phases are also ranges of a profile,
    `cromss::<phase>`.

    Args:
        device: Of the networks.
        global_batch: Samples of one optimiser step over all ranks.
        figures: What the counts of all steps and ranks say, under MLflow's names.
    """

    def __init__(self, device: torch.device, global_batch: int, figures: Callable[[Tensor], Mapping[str, float]]) -> None:
        self.device, self.global_batch, self._figures = device, global_batch, figures
        self._started: float | None = None  # by the first phase
        self._restart()

    def _restart(self) -> None:
        self._names: tuple[str, ...] = ()
        self._step: list[Tensor] = []  # of the step that is being computed
        self._sums: Tensor | None = None  # of the steps that were taken
        self._num_added = 0
        self._num_steps = 0
        self._grad_norms: list[float] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Times a part of a step, or a pause between steps; a phase may come several times a step. Does not nest."""
        if self._started is None:
            self._started = time.perf_counter()
        with torch.profiler.record_function(f"cromss::{name}"):
            if self.device.type == "cuda" and name in _ON_DEVICE:
                start, end = _event(), _event()
                start.record()
                yield
                end.record()
                self._events.append((name, start, end))
            else:
                started = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - started

    def add(self, out: Reported) -> None:
        """Takes the loss of one micro batch, or of a whole step where it is computed at once.

        A part is shown as `train/loss/<name>`; one whose name has a group, as `reliability_s1/water`, as `train/<name>`.
        """
        parts = {"total": out.total, **out.parts}
        self._names = tuple(f"train/{name}" if "/" in name else f"train/loss/{name}" for name in parts)
        self._step.append(torch.cat((torch.stack(list(parts.values())).detach().double(), out.counts)))

    def step_done(self, grad_norm: float | None, applied: bool = True) -> None:
        """Ends an optimiser step.

        Args:
            grad_norm: Norm of the gradient before clipping, the same on every rank; None where it is not computed.
            applied: Whether the weights moved, the same on every rank. Of a skipped step only the time counts: one NaN would
                be the mean of all.
        """
        self._num_steps += 1
        if applied:
            self._num_added += len(self._step)
            step = torch.stack(self._step).sum(0)
            self._sums = step if self._sums is None else self._sums + step
            if grad_norm is not None and math.isfinite(grad_norm):
                self._grad_norms.append(grad_norm)
        self._step = []

    def read(
        self,
        world: World,
        lr: float,
        epochs: float,
        loss_scale: float | None = None,
        num_replaced: int | None = None,
        counters: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Figures of the steps since the last reading, under MLflow's names, and starts over; a collective call.

        Counts and seconds are summed over ranks by one all-reduce, then divided. What has no pixel or step has no figure.

        Args:
            world: The ranks.
            lr: Learning rate.
            epochs: Epochs trained, a real number.
            loss_scale: Of fp16; None where nothing is scaled.
            num_replaced: Damaged samples that a neighbour stood in for on this rank, since the start; None where that stops
                the run.
            counters: Figures that are the same on every rank already, by name.
        """
        seconds = self._read_clocks()
        local = torch.tensor(
            [*(seconds[name] for name in ("all", *_PHASES)), num_replaced or 0, self._num_added], dtype=torch.float64
        )
        peaks = torch.zeros(world.size, dtype=torch.float64)  # a place for each rank, so that the sum brings the largest
        peaks[world.rank] = _peak_memory_bytes(self.device)
        sums = torch.empty(0, dtype=torch.float64) if self._sums is None else self._sums
        parts = [part.to(world.device) for part in (local, peaks, sums)]
        reduced = world.reduce_sum(torch.cat(parts)).cpu()  # waits for the device
        local, peaks, sums = torch.split(reduced, [len(part) for part in parts])
        *times, replaced, num_added = local.tolist()
        values = {"train/lr": lr, "train/epoch": epochs}
        if num_added:
            values |= self._training_figures(sums, num_added)
        if self._grad_norms:
            values["train/grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
        if loss_scale is not None:
            values["train/loss_scale"] = loss_scale
        if num_replaced is not None:
            values["data/replaced_samples"] = replaced
        values |= self._time_figures(dict(zip(("all", *_PHASES), (t / world.size for t in times), strict=True)))
        values["perf/memory_gib"] = float(peaks.max()) / _GIB
        self._restart()
        return values | dict(counters or {})

    def _read_clocks(self) -> dict[str, float]:
        """Seconds of all and of each phase; waits for the device, so that its work is in all."""
        seconds = self._seconds
        if self._events:
            self._events[-1][2].synchronize()
        for name, start, end in self._events:
            seconds[name] += start.elapsed_time(end) / 1000
        now = time.perf_counter()
        seconds["all"] = now - (now if self._started is None else self._started)
        self._started = now
        return seconds

    def _training_figures(self, sums: Tensor, num_added: float) -> dict[str, float]:
        means, counts = sums[: len(self._names)] / num_added, sums[len(self._names) :]
        return {**dict(zip(self._names, means.tolist(), strict=True)), **self._figures(counts)}

    def _time_figures(self, seconds: Mapping[str, float]) -> dict[str, float]:
        values = {name: seconds[phase] for phase, name in PAUSES.items() if seconds[phase]}
        if self._num_steps and seconds["all"]:
            step_s = (seconds["all"] - sum(seconds[phase] for phase in PAUSES)) / self._num_steps
            values["perf/step_s"] = step_s
            values["perf/samples_per_s"] = self.global_batch / step_s
            values |= {name: seconds[phase] / self._num_steps for phase, name in STEP_PHASES.items()}
        return values


def _peak_memory_bytes(device: torch.device) -> int:
    """The most that torch held on the GPU, or this process in memory, since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, which starts from what the parent process held.
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

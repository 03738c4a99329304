"""A trace of a few steps and a table of what they spent their time on: `--profile`.

Layer 3. Ranges of the trace are the phases of `train/figures/meter.py`; Perfetto (ui.perfetto.dev) and chrome://tracing show it.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

PROFILE_FOLDER = "profile"
SKIPPED_STEPS = 3  # the first ones build kernels and grow memory
_WARM_UP_STEPS = 1  # take the profiler's own first costs
_UNTRACED_STEPS = SKIPPED_STEPS + _WARM_UP_STEPS
_NUM_OPS = 20
_RANGE = "cromss::"
_COLLECTIVES = ("gloo:", "nccl:")


class Profile:
    """Traces some steps of this rank: a context manager around a run, told of each step.

    Leaves `profile/rank00000.json.gz` (Chrome's trace format) and `profile/rank00000.txt` in the run's folder, where 00000 is
    the rank. A run that ends before it could be traced says so in the text.

    Args:
        run_dir: Folder of the run; None where no trace is asked for, and all of this does nothing.
        rank: This rank.
        active_steps: Optimiser steps that are traced, after the first few.
    """

    def __init__(self, run_dir: Path | None, rank: int, active_steps: int = 3) -> None:
        self._place = None if run_dir is None else run_dir / PROFILE_FOLDER / f"rank{rank:05d}"
        self._active_steps = active_steps
        self._num_steps = 0
        self._profiler: profile | None = None

    def __enter__(self) -> Self:
        if self._place is not None:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self._profiler = profile(
                activities=activities,
                schedule=schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=_WARM_UP_STEPS, active=self._active_steps, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,  # there is one cycle; without this torch warns of the next
            )
            self._profiler.start()
        return self

    def step(self) -> None:
        """Marks the end of an optimiser step."""
        if self._profiler is None:
            return
        self._num_steps += 1
        self._profiler.step()
        if self._num_steps == _UNTRACED_STEPS + self._active_steps:  # all is written
            self._profiler.stop()
            self._profiler = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profiler is None or self._place is None:
            return
        too_short = self._num_steps <= _UNTRACED_STEPS
        if too_short or kind is not None:  # a file that cannot be written must not hide the error that ended the run
            self._profiler.on_trace_ready = None
        self._profiler.stop()
        if too_short and kind is None:
            self._place.with_suffix(".txt").write_text(
                f"No step was traced: the run took {self._num_steps}, and the first {_UNTRACED_STEPS} are left out. Profile a "
                "longer one.\n"
            )

    def _write(self, profiler: profile) -> None:
        assert self._place is not None
        trace = self._place.with_suffix(".json.gz")
        hidden = trace.with_name(f".{trace.name}")
        profiler.export_chrome_trace(str(hidden))
        hidden.rename(trace)
        self._place.with_suffix(".txt").write_text(summary(profiler))


def summary(profiler: profile) -> str:
    """A table of a trace: its ranges as shares of a step, and the most expensive operations.

    Ranges are timed by the host, on which a GPU's work is only asked for; operations by the GPU where there is one. What
    collectives take is part of the ranges. Times of operations leave out those that they call.
    """
    rows = profiler.key_averages()
    on_host = [row for row in rows if row.device_type.name == "CPU"]
    steps = next(row for row in on_host if row.key.startswith("ProfilerStep"))
    collectives = [row for row in on_host if row.key.startswith(_COLLECTIVES)]
    ranges = [(row.key.removeprefix(_RANGE), row.cpu_time_total) for row in on_host if row.key.startswith(_RANGE)]
    total = steps.cpu_time_total
    lines = [f"{steps.count} steps, {total / steps.count / 1000:.2f} ms each", "", f"{'range':<60}{'ms a step':>12}{'share':>8}"]
    for name, time in sorted(ranges, key=lambda item: -item[1]):
        lines.append(f"{name:<60}{_ms(time / steps.count)}{time / total:>8.1%}")
    time = sum(row.cpu_time_total for row in collectives)
    lines.append(f"{'collectives, within these':<60}{_ms(time / steps.count)}{time / total:>8.1%}")

    operations = [row for row in rows if not row.is_user_annotation]
    on_device = any(row.self_device_time_total for row in operations)
    own = [(row.key, row.count, row.self_device_time_total if on_device else row.self_cpu_time_total) for row in operations]
    total = sum(time for *_, time in own)
    title = f"operation, on the {'GPU' if on_device else 'CPU'}"
    lines += ["", f"{title:<50}{'calls':>10}{'ms a step':>12}{'share':>8}"]
    for name, count, time in sorted(own, key=lambda item: -item[2])[:_NUM_OPS]:
        lines.append(f"{name[:48]:<50}{count:>10}{_ms(time / steps.count)}{time / total:>8.1%}")
    return "\n".join(lines) + "\n"


def _ms(microseconds: Any) -> str:
    return f"{microseconds / 1000:>12.2f}"

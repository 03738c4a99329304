"""A plan as tables for people, and as JSON for scripts.

Layer 4.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cromss_dist.config import valid_worlds
from cromss_dist.plan.plan import STAGES, Plan, lr_advice
from cromss_dist.plan.predict import Range

_GIB, _MIB = 2**30, 2**20


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    batches, time, step = plan.batches, plan.timeline, plan.step
    rows = [
        ("machine", f"{plan.machine.name}; {plan.machine.source}"),
        ("ranks", f"{plan.layout.nodes} nodes x {plan.layout.per_node} = {plan.layout.world}, {plan.machine.precision}"),
        (
            "batch",
            f"{batches.global_batch} = micro batch {batches.micro_batch} x accumulation {batches.accumulation_steps} x world "
            f"{batches.world_size}",
        ),
        ("steps", f"{time.steps_per_epoch:.2f} an epoch of {time.epoch_samples} samples, {time.total_steps} in all"),
        ("rate", lr_advice(plan.config)),
        ("a step", _seconds(step.total)),
        ("an epoch", f"{_seconds(plan.epoch)}, of which a validation {_seconds(plan.validation)}"),
        ("the run", f"{_seconds(plan.run)}, {plan.config.train.epochs:g} epochs"),
        ("device hours", _between(plan.device_hours)),
        ("samples/s", _between(_rate(plan))),
    ]
    if plan.price is not None:
        rows.append(("cost", f"{_between(plan.device_hours.times(plan.price))} at {plan.price:g} an hour and device"))
    rows += [
        ("checkpoint", f"{plan.checkpoint_bytes / 1e6:.0f} MB, on disk after {plan.checkpoint_s:.1f} s, beside the training"),
        ("reading", f"{plan.needed_bytes_per_s / 1e6:.1f} MB/s each rank; {_shards(plan)}"),
        (
            "networks",
            f"{plan.networks.parameters:,} weights, {plan.networks.flops(1) / 1e9:.0f} GFLOP a sample, forward and backward",
        ),
    ]
    _print(console, "Plan: expected (from-to)", ("", ""), rows)
    parts = step.parts | {f"sums: {name}": seconds for name, seconds in step.sums.items()}
    told = [
        (name, f"{1e3 * seconds:.1f}", f"{100 * seconds / step.total.value:.0f} %", _traffic(plan, name))
        for name, seconds in parts.items()
    ]
    _print(console, "A step", ("part", "ms", "share", "collective calls"), told)
    needs = [
        (
            f"{stage}{' *' if stage == plan.config.engine.zero_stage else ''}",
            *(f"{value / _GIB:.2f}" for value in asdict(memory).values()),
            f"{memory.total / _GIB:.2f}",
            "yes" if memory.total <= plan.machine.memory_bytes else "NO",
        )
        for stage, memory in zip(STAGES, plan.memory, strict=True)
    ]
    again = ", activations computed again" if plan.recomputing else ""
    header = ("stage", *asdict(plan.memory[0]), "sum", f"of {plan.machine.memory_bytes / _GIB:.0f}")
    _print(console, f"Memory of a rank by ZeRO stage, GiB{again}", header, needs)
    for flag in plan.flags:
        console.print(f"! {flag}", markup=False, highlight=False, soft_wrap=True)


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as JSON types; seconds and bytes."""
    return {
        "machine": {"name": plan.machine.name, "source": plan.machine.source, "precision": plan.machine.precision},
        "nodes": plan.layout.nodes,
        "per_node": plan.layout.per_node,
        "batch": asdict(plan.batches),
        "valid_worlds": list(valid_worlds(plan.config.engine, 1, 2 * plan.layout.world)),
        "steps_per_epoch": plan.timeline.steps_per_epoch,
        "total_steps": plan.timeline.total_steps,
        "learning_rate": lr_advice(plan.config),
        "step_s": asdict(plan.step.total),
        "parts_s": plan.step.parts,
        "sums_s": plan.step.sums,
        "traffic": {name: asdict(part) for name, part in plan.step.traffic.items()},
        "validation_s": asdict(plan.validation),
        "epoch_s": asdict(plan.epoch),
        "run_s": asdict(plan.run),
        "device_hours": asdict(plan.device_hours),
        "cost": None if plan.price is None else asdict(plan.device_hours.times(plan.price)),
        "parameters": plan.networks.parameters,
        "flops_per_sample": plan.networks.flops(1),
        "memory_bytes": {
            str(stage): {**asdict(memory), "total": memory.total} for stage, memory in zip(STAGES, plan.memory, strict=True)
        },
        "recomputing": plan.recomputing,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_s": plan.checkpoint_s,
        "reading_bytes_per_s": plan.needed_bytes_per_s,
        "num_shards": plan.samples.num_shards,
        "flags": list(plan.flags),
    }


def scaling_rows(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """A line for each plan: ranks, batch, steps an epoch, ms a step, share of sums, samples/s, efficiency, hours, device hours.

    Efficiency is samples/s a rank over those of the first plan.
    """
    first = _rate(plans[0]).value / plans[0].layout.world
    rows = []
    for plan in plans:
        rate, talk = _rate(plan), sum(plan.step.sums.values()) / plan.step.total.value
        cells = [str(plan.layout.world), str(plan.batches.global_batch), str(plan.batches.micro_batch)]
        cells += [f"{plan.timeline.steps_per_epoch:.1f}", f"{1e3 * plan.step.total.value:.1f}", f"{100 * talk:.0f} %"]
        cells += [f"{rate.value:.0f}", f"{100 * rate.value / plan.layout.world / first:.0f} %"]
        cells += [_between(plan.run.times(1 / 3600)), f"{plan.device_hours.value:.0f}"]
        cells.append(f"{plan.memory[plan.config.engine.zero_stage].total / _GIB:.1f}")
        rows.append(tuple(cells))
    return rows


SCALING_HEADER = (
    "ranks", "batch", "a rank", "steps/epoch", "ms/step", "sums", "samples/s", "efficiency", "hours", "device hours", "GiB",
)  # fmt: skip


def show_scaling(plans: Sequence[Plan], console: Console) -> None:
    """Prints a table over numbers of ranks."""
    _print(console, f"{plans[0].machine.name}; {plans[0].machine.source}", SCALING_HEADER, scaling_rows(plans))


def _rate(plan: Plan) -> Range:
    step, batch = plan.step.total, plan.batches.global_batch
    return Range(batch / step.value, batch / step.high, batch / step.low)


def _shards(plan: Plan) -> str:
    if not plan.samples.num_shards:
        return "shards unknown, the data was not opened"
    return f"{plan.samples.num_shards} shards, {plan.samples.num_shards / plan.layout.world:.1f} a worker"


def _traffic(plan: Plan, part: str) -> str:
    traffic = plan.step.traffic.get(part.removeprefix("sums: ")) if part.startswith("sums: ") else None
    return f"{traffic.calls} of {traffic.bytes / _MIB:.2f} MiB" if traffic else ""


def _seconds(span: Range) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if span.value >= 2 * size:
            return f"{_between(span.times(1 / size))} {unit}"
    return f"{_between(span.times(1000))} ms"


def _between(span: Range) -> str:
    return f"{span.value:.3g} ({span.low:.3g}-{span.high:.3g})"


def _print(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*header, title=title, show_header=any(header), title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)

"""Seconds of a training step, from what is to be done and what a machine can do. Formulas: docs/scaling.md.

Layer 4.
"""

import math
from dataclasses import dataclass

from cromss_dist.config import BatchPlan, RunConfig
from cromss_dist.plan.collectives import Layout, Traffic, links_of, seconds_of, traffic_of
from cromss_dist.plan.machine import Machine
from cromss_dist.plan.work import Networks

COMPUTE_ERROR = 0.10  # smallest relative error that is claimed
LINK_ERROR, ASSUMED_LINK_ERROR = 0.3, 0.5  # of links that were measured, and that were not
DEVIATIONS = 2  # of the residual, on either side


@dataclass(frozen=True)
class Range:
    """A prediction: what is expected, and between what."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Range":
        """This many of them."""
        return Range(self.value * factor, self.low * factor, self.high * factor)

    def __add__(self, other: "Range") -> "Range":
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step on every rank.

    Args:
        parts: By what is done: 'networks', 'recomputation', 'second pass', 'loss and prior', 'images', 'optimizer', and
            'reading', the wait for samples that come slower than they are used.
        sums: Of collective calls, by what they are for.
        traffic: The same in calls and bytes.
        total: All of it.
    """

    parts: dict[str, float]
    sums: dict[str, float]
    traffic: dict[str, Traffic]
    total: Range


def sample_bytes(patch_px: int, num_seasons: int) -> int:
    """Bytes that are read for a sample: all 13 + 2 bands of a season at their resolution, and every season's labels."""
    return patch_px**2 * (2 + 4 + num_seasons) + 6 * (patch_px // 2) ** 2 + 3 * (patch_px // 6) ** 2


def step_time(
    config: RunConfig,
    plan: BatchPlan,
    networks: Networks,
    machine: Machine,
    layout: Layout,
    recomputing: bool,
    bytes_a_sample: int,
) -> StepTime:
    """Predicts an optimiser step.

    Args:
        config: The run.
        plan: Its batch arithmetic for all ranks of `layout`.
        networks: As counted.
        machine: Of each node.
        layout: Ranks.
        recomputing: Whether activations are computed again.
        bytes_a_sample: What reading a sample takes.
    """
    passes, micro = plan.accumulation_steps, plan.micro_batch
    crowding = machine.crowding_of(layout.per_node)
    forward, backward = (machine.network_seconds(work) for work in (networks.forward_of(micro), networks.backward_of(micro)))
    two_passes = config.loss.scope == "global" and passes > 1
    pixels = micro * config.data.crop_px**2
    bands = len(config.data.s1_bands) + len(config.data.s2_bands) + 1
    sources = {"ts": 1.0, "t": 0.5, "s": 0.5, "none": 0.0}[config.loss.prior]
    prior = machine.prior.seconds(sources * pixels) if sources else 0.0
    loss = machine.loss.seconds(passes * pixels) if two_passes else passes * machine.loss.seconds(pixels)
    partition = layout.world if config.engine.zero_stage else 1
    parts = {
        "networks": passes * (forward + backward),
        "second pass": passes * forward * two_passes,
        "recomputation": passes * forward * recomputing,
        "loss and prior": passes * prior + loss,
        "images": passes * machine.images.seconds(bands * pixels),
        "optimizer": machine.optimizer.seconds(networks.parameters / partition),
    }
    parts = {name: crowding * seconds for name, seconds in parts.items() if seconds}
    traffic = traffic_of(config, plan, networks, recomputing)
    sums = {name: seconds_of(part, machine, layout) for name, part in traffic.items()}
    busy = sum(parts.values()) + sum(sums.values())
    reading = config.data.reading
    readers = reading.threads * max(1, reading.workers)
    read_s = passes * micro * bytes_a_sample / (machine.read_bytes_per_s * readers)
    if read_s > busy:
        parts["reading"] = read_s - busy
    return StepTime(parts, sums, traffic, _with_error(sum(parts.values()), sum(sums.values()), machine, layout))


def _with_error(compute_s: float, sums_s: float, machine: Machine, layout: Layout) -> Range:
    inside, between = links_of(machine)
    assumed = (inside.assumed and layout.per_node > 1) or (between.assumed and layout.nodes > 1)
    of_compute = max(COMPUTE_ERROR, 1 - math.exp(-DEVIATIONS * machine.residual))
    of_sums = ASSUMED_LINK_ERROR if assumed else LINK_ERROR
    down = compute_s * (1 - of_compute) + sums_s * (1 - of_sums)
    up = compute_s / (1 - of_compute) + sums_s / (1 - of_sums)
    return Range(compute_s + sums_s, down, up)

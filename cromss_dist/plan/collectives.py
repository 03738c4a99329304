"""What ranks tell each other in a training step, and how long that takes.

Layer 4.
"""

import math
from dataclasses import dataclass

from cromss_dist.config import BatchPlan, RunConfig
from cromss_dist.losses.selection import HISTOGRAM_BINS
from cromss_dist.plan.machine import Link, Machine
from cromss_dist.plan.memory import BUCKET_NUMBERS
from cromss_dist.plan.work import Networks
from cromss_dist.schema import MODALITIES, NUM_CLASSES

HISTOGRAM_BYTES = len(MODALITIES) * NUM_CLASSES * HISTOGRAM_BINS * 8  # counts are int64
NUM_HISTOGRAMS = 3
SUMS_BYTES = len(MODALITIES) * (6 + 3 * NUM_CLASSES) * 8  # losses/cromss.py: float64
VOTE_BYTES = 24  # train/safety/guard.py
# Without a measurement: PCIe 4 x16 carries 32 GB/s, of which a ring of GPUs gets about half; 10 Gbit/s Ethernet is 1.25 GB/s.
ASSUMED_INSIDE = Link(10e-6, 12e9, assumed=True)
ASSUMED_BETWEEN = Link(50e-6, 1.25e9, assumed=True)


@dataclass(frozen=True)
class Layout:
    """Ranks: `nodes` times `per_node`."""

    nodes: int
    per_node: int

    @property
    def world(self) -> int:
        """All of them."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Traffic:
    """Collective calls of one kind in a step of one rank.

    Args:
        calls: How many.
        bytes: Of all of them together.
        rings: How often the bytes go round, in all-reduces; an all-gather or reduce-scatter is half of one.
    """

    calls: int
    bytes: int
    rings: float = 1.0


def traffic_of(config: RunConfig, plan: BatchPlan, networks: Networks, recomputing: bool) -> dict[str, Traffic]:
    """The collective calls of a step, by what they are for; nothing on one rank."""
    if plan.world_size == 1:
        return {}
    passes = plan.accumulation_steps
    two_passes = config.loss.scope == "global" and passes > 1
    traffic: dict[str, Traffic] = {}
    if config.engine.batch_norm == "global":
        # Forward: means and squares; backward: two sums. Both float64, two numbers a channel.
        forwards = passes * (1 + two_passes + recomputing)
        rounds = forwards + passes
        traffic["batch norms"] = Traffic(rounds * len(networks.norm_channels), rounds * 16 * sum(networks.norm_channels))
    if config.loss.scope != "local":
        times = 1 if two_passes else passes
        histograms = NUM_HISTOGRAMS if config.loss.select else 0
        traffic["loss"] = Traffic(times * (histograms + 1), times * (histograms * HISTOGRAM_BYTES + SUMS_BYTES))
    votes = 1 if config.engine.zero_stage == 0 else 2  # the gradient's norm is of partitions then
    traffic["votes"] = Traffic(votes, votes * VOTE_BYTES)
    traffic["gradients"] = _gradients(config.engine.zero_stage, passes, two_passes, recomputing, networks)
    return traffic


def _gradients(stage: int, passes: int, two_passes: bool, recomputing: bool, networks: Networks) -> Traffic:
    """What DeepSpeed sends of gradients and weights, all float32; it overlaps none of it with the backward pass below stage 3.

    Stages 1 and 2 sum whole buckets (use_multi_rank_bucket_allreduce) and gather the new weights; stage 2 sums after every
    micro batch. Stage 3 gathers weights in every pass and scatters gradients after each backward pass.
    """
    size = 4 * networks.parameters
    buckets = math.ceil(networks.parameters / BUCKET_NUMBERS)
    match stage:
        case 0:
            return Traffic(buckets, size)
        case 1:
            return Traffic(2 * buckets, size, rings=1.5)
        case 2:
            return Traffic((passes + 1) * buckets, size, rings=passes + 0.5)
        case _:
            gathers = passes * (2 + two_passes + recomputing)
            # A gather of its own for each layer; weights and biases of one go together.
            return Traffic((gathers + passes) * networks.tensors // 2, size, rings=0.5 * (gathers + passes))


def seconds_of(traffic: Traffic, machine: Machine, layout: Layout) -> float:
    """Seconds of collective calls, one after the other."""
    ranks = layout.world
    if ranks == 1:
        return 0.0
    inside, between = links_of(machine)
    used = [inside] * (layout.per_node > 1) + [between] * (layout.nodes > 1)
    ring_s = 2 * (ranks - 1) / ranks * traffic.bytes / min(link.bytes_per_s for link in used)
    return traffic.calls * _call_s(machine, layout) + traffic.rings * ring_s


def _call_s(machine: Machine, layout: Layout) -> float:
    """Seconds of an all-reduce of nothing."""
    inside, between = links_of(machine)
    if machine.tree:  # up and down again
        return 2 * (math.ceil(math.log2(layout.per_node)) * inside.hop_s + math.ceil(math.log2(layout.nodes)) * between.hop_s)
    slowest = max(inside.hop_s * (layout.per_node > 1), between.hop_s * (layout.nodes > 1))
    return 2 * (layout.world - 1) * slowest


def links_of(machine: Machine) -> tuple[Link, Link]:
    """Links inside a node and between nodes, assumed where nobody has measured them."""
    return machine.inside or ASSUMED_INSIDE, machine.between or ASSUMED_BETWEEN

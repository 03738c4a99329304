"""All that can be said of a run before it starts, and what of it should give pause.

Layer 4.
"""

import math
from dataclasses import dataclass, replace

from cromss_dist.config import BatchPlan, RunConfig, plan_batches, valid_worlds
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.errors import BatchError
from cromss_dist.plan.collectives import Layout, links_of
from cromss_dist.plan.machine import Machine
from cromss_dist.plan.memory import Memory, memory_of, must_recompute
from cromss_dist.plan.predict import Range, StepTime, sample_bytes, step_time
from cromss_dist.plan.work import Networks
from cromss_dist.schema import NUM_SEASONS
from cromss_dist.train.step.schedule import Timeline

STAGES = (0, 1, 2, 3)
PATCH_PX = 264  # of the published dataset; of one that is not here
PUBLISHED_BATCH, PUBLISHED_LR = 128, 5e-3  # CromSS, section IV-A
FEW_STEPS = 20  # an epoch, below which a step sees a large share of all data
FEW_SAMPLES = 4  # a rank and step, below which a GPU has little to do
MUCH_TALK = 0.3  # share of a step that collective calls take
FULL = 0.9  # share of a device's memory


@dataclass(frozen=True)
class Samples:
    """What a plan needs to know of the data.

    Args:
        epoch: Samples of an epoch.
        validation: Samples of a validation, seasons counted singly.
        patch_px: Side of a patch at 10 m, px.
        num_seasons: Of a location.
        num_shards: Files that are read; 0 where the data is not here.
    """

    epoch: int
    validation: int
    patch_px: int = PATCH_PX
    num_seasons: int = NUM_SEASONS
    num_shards: int = 0

    @classmethod
    def of(cls, config: RunConfig, locations: int | None) -> "Samples":
        """Of the config's datasets, or, without opening them, of so many locations before any are held out.

        Raises:
            ShardError, DownloadError, ConfigError: see RunData.open.
        """
        if locations is not None:
            held_out = max(1, round(config.data.val_fraction * locations))
            return cls(max(1, locations - held_out), held_out * len(config.data.val_seasons))
        data = RunData.open(config.data, config.seed)
        one = BatchPlan(config.engine.global_batch, config.engine.global_batch, 1, 1)
        shards = sum(len(source.dataset.shard_sizes) for source in data.train)
        epoch, pairs = data.train_plan(one).order.epoch_samples, len(data.eval_plan(one).pairs)
        return cls(epoch, pairs, data.dataset.patch_px, data.dataset.num_seasons, shards)


@dataclass(frozen=True)
class Plan:
    """A run on so many ranks of a machine.

    Args:
        config: The run.
        machine: Of each node.
        layout: Ranks.
        batches: Batch arithmetic.
        timeline: In steps.
        samples: Of the data.
        networks: As counted.
        step: Seconds of an optimiser step.
        validation: Seconds of a validation.
        recomputing: Whether activations are computed again.
        memory: Of a device, for each of STAGES.
        price: Of a device and hour, in any currency; None where it was not given.
    """

    config: RunConfig
    machine: Machine
    layout: Layout
    batches: BatchPlan
    timeline: Timeline
    samples: Samples
    networks: Networks
    step: StepTime
    validation: Range
    recomputing: bool
    memory: tuple[Memory, ...]
    price: float | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        machine: Machine,
        layout: Layout,
        samples: Samples,
        price: float | None = None,
        networks: Networks | None = None,
    ) -> "Plan":
        """Plans a run; computes nothing but counts.

        Args:
            config: The run.
            machine: Of each node.
            layout: Ranks.
            samples: Of the data.
            price: Of a device and hour.
            networks: Counted before, for several layouts with one rank, or with many.

        Raises:
            BatchError: the batch does not divide over the ranks; names the worlds that it divides over.
            ConfigError: the encoder cannot be built.
        """
        try:
            batches = plan_batches(config.engine, layout.world)
        except BatchError as error:
            worlds = ", ".join(map(str, valid_worlds(config.engine, 1, 2 * layout.world)))
            raise BatchError(
                f"{error} It divides over {worlds or 'no number of'} workers, of up to {2 * layout.world}."
            ) from error
        networks = networks or Networks.of(config, machine.precision, layout.world > 1)
        gpu = machine.device == "cuda"
        recomputing = must_recompute(config, batches, networks, machine.memory_bytes, gpu)
        size = sample_bytes(samples.patch_px, samples.num_seasons)
        step = step_time(config, batches, networks, machine, layout, recomputing, size)
        # Of a validation sample the passes forward and the loss, without their gradients, which is about a third of both.
        a_third = step.parts["networks"] + step.parts.get("loss and prior", 0.0)
        share = samples.validation / config.engine.global_batch / 3
        spread = replace(
            step.total,
            value=a_third,
            low=a_third * step.total.low / step.total.value,
            high=a_third * step.total.high / step.total.value,
        )
        return cls(
            config,
            machine,
            layout,
            batches,
            Timeline.of(config, samples.epoch),
            samples,
            networks,
            step,
            spread.times(share),
            recomputing,
            tuple(memory_of(config, batches, networks, stage, recomputing, gpu) for stage in STAGES),
            price,
        )

    @property
    def epoch(self) -> Range:
        """Seconds of an epoch, validations included, checkpoints not: they are written beside the training."""
        return self.step.total.times(self.timeline.steps_per_epoch) + self.validation.times(
            self.timeline.steps_per_epoch / self.timeline.validate_every_steps
        )

    @property
    def run(self) -> Range:
        """Seconds of the run, start not included."""
        return self.epoch.times(self.timeline.total_steps / self.timeline.steps_per_epoch)

    @property
    def device_hours(self) -> Range:
        """Of all ranks."""
        return self.run.times(self.layout.world / 3600)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, both moments and buffers."""
        return 12 * self.networks.parameters + self.networks.buffer_bytes

    @property
    def checkpoint_s(self) -> float:
        """Seconds until a checkpoint is on one disk that all ranks share, written beside the training."""
        return self.checkpoint_bytes / self.machine.write_bytes_per_s

    @property
    def needed_bytes_per_s(self) -> float:
        """What each rank must read."""
        size = sample_bytes(self.samples.patch_px, self.samples.num_seasons)
        return size * self.config.engine.global_batch / self.layout.world / self.step.total.value

    @property
    def flags(self) -> tuple[str, ...]:
        """What degenerates, each with what to do."""
        return tuple(_flags(self))


def lr_advice(config: RunConfig) -> str:
    """What rate the published one becomes at another batch: advice, no rule of ours.

    Reference: Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms" (2022): Adam's rate goes with the
    square root of the batch. Goyal et al. (2017) have it go with the batch, for SGD.
    """
    batch, lr = config.engine.global_batch, config.train.lr
    if batch == PUBLISHED_BATCH:
        return f"batch {batch} is the published one, whose rate is {PUBLISHED_LR:g}; train.lr is {lr:g}"
    ratio = batch / PUBLISHED_BATCH
    root, linear = PUBLISHED_LR * math.sqrt(ratio), PUBLISHED_LR * ratio
    warm_up = "; with a warm-up (train.warmup_epochs)" if ratio > 1 and not config.train.warmup_epochs else ""
    return (
        f"published: {PUBLISHED_LR:g} at batch {PUBLISHED_BATCH}; at {batch} Adam's square-root rule gives {root:.2g}, the "
        f"linear one {linear:.2g}; train.lr is {lr:g}{warm_up}"
    )


def _flags(plan: Plan) -> list[str]:
    config, batches, machine = plan.config, plan.batches, plan.machine
    found = []
    steps = plan.timeline.steps_per_epoch
    if steps < FEW_STEPS:
        found.append(f"{steps:.3g} steps an epoch: a step sees much of all data; lower engine.global_batch")
    micro = batches.micro_batch
    if micro == 1:
        found.append("a micro batch of one sample: batch norms of one rank see one sample, and a device idles; use fewer workers")
    elif micro * batches.accumulation_steps < FEW_SAMPLES:
        found.append(f"{micro * batches.accumulation_steps} samples a rank and step: a device idles; use fewer workers")
    talk = sum(plan.step.sums.values()) / plan.step.total.value
    if talk > MUCH_TALK:
        most = max(plan.step.sums, key=lambda name: plan.step.sums[name])
        mend = "engine.batch_norm=local changes results" if most == "batch norms" else "more samples a rank need fewer"
        found.append(f"{100 * talk:.0f} % of a step are sums over ranks, {most} most: larger engine.global_batch; {mend}")
    if "reading" in plan.step.parts:
        found.append("samples are read slower than they are used: raise data.reading.threads or data.reading.workers")
    stage = config.engine.zero_stage
    if plan.memory[stage].total > FULL * machine.memory_bytes:
        fits = [number for number in STAGES if plan.memory[number].total <= FULL * machine.memory_bytes]
        mend = f"engine.zero_stage={fits[0]} would fit" if fits else "lower engine.micro_batch, or recompute activations"
        found.append(f"a rank needs {plan.memory[stage].total / 2**30:.1f} GiB of {machine.memory_bytes / 2**30:.1f}: {mend}")
    if 0 < plan.samples.num_shards < plan.layout.world:
        found.append(f"{plan.samples.num_shards} shards for {plan.layout.world} workers: they read the same ones; shard smaller")
    if plan.layout.per_node > max(machine.crowding, default=1) and machine.device == "cpu":
        found.append(f"{plan.layout.per_node} workers on a node were not measured, {max(machine.crowding)} were: expect less")
    if config.engine.precision not in ("auto", machine.precision):
        found.append(f"the machine was measured in {machine.precision}, the run is {config.engine.precision}: probe it there")
    for link, used, key in zip(
        links_of(machine), (plan.layout.per_node > 1, plan.layout.nodes > 1), ("inside", "between"), strict=True
    ):
        if link.assumed and used:
            found.append(
                f"the link {key} nodes was not measured: {link.bytes_per_s / 1e9:.3g} GB/s, {1e6 * link.hop_s:.3g} us assumed"
            )
    return found

"""How a step is computed, and how its batch is cut.

Layer 1.
"""

from dataclasses import dataclass
from typing import Literal

from cromss_dist.config.check import require
from cromss_dist.errors import BatchError


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed. The DeepSpeed dictionary is generated from this.

    Args:
        global_batch: Samples of one optimiser step over all ranks.
        micro_batch: Samples of one forward pass on one rank; null derives it from the other two.
        accumulation_steps: Forward passes that one optimiser step adds up on each rank; null is 1, or follows from
            `micro_batch`, so that fewer ranks make more passes of the same size.
        precision: Arithmetic of the networks; losses, weights and batch norms are always float32. 'auto': bf16 on a GPU that
            has it, else fp16 on a GPU, fp32 on a CPU. fp16 scales the loss, dynamically.
        zero_stage: DeepSpeed ZeRO stage, 0-3.
        grad_clip: Largest norm of the gradient, 0 = no clipping.
        device: 'auto' takes a GPU where torch finds one.
        batch_norm: What batch norms normalise by: 'global', all ranks' pixels of a micro step; 'local', one rank's, as
            published.
        channels_last: Whether channels come last in the memory of images and activations; 'auto' is true on a GPU.
        activation_checkpointing: Whether activations are computed again in the backward pass instead of kept; 'auto' does it
            on a GPU where they would not fit.
        compile: Whether torch.compile builds the networks' kernels, which takes minutes; 'auto' is false.
        fused_optimizer: Whether Adam is one kernel; 'auto' is true.
    """

    global_batch: int = 128
    micro_batch: int | None = None
    accumulation_steps: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: int = 0
    grad_clip: float = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_norm: Literal["global", "local"] = "global"
    channels_last: Literal["auto"] | bool = "auto"
    activation_checkpointing: Literal["auto"] | bool = "auto"
    compile: Literal["auto"] | bool = "auto"
    fused_optimizer: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        require(self.global_batch >= 1, "engine.global_batch", self.global_batch, "give at least 1")
        require(
            self.micro_batch is None or self.micro_batch >= 1, "engine.micro_batch", self.micro_batch, "give at least 1 or null"
        )
        ok = self.accumulation_steps is None or self.accumulation_steps >= 1
        require(ok, "engine.accumulation_steps", self.accumulation_steps, "give at least 1 or null")
        require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "give 0, 1, 2 or 3")
        require(self.grad_clip >= 0, "engine.grad_clip", self.grad_clip, "give 0 or more")


@dataclass(frozen=True)
class BatchPlan:
    """How one optimiser step is cut: global_batch = micro_batch x accumulation_steps x world_size, in samples."""

    global_batch: int
    micro_batch: int
    accumulation_steps: int
    world_size: int


def plan_batches(engine: EngineConfig, world_size: int) -> BatchPlan:
    """The batch arithmetic of a run on `world_size` ranks.

    Raises:
        BatchError: the numbers do not multiply.
    """
    if engine.accumulation_steps is None and engine.micro_batch is not None:
        passes, left = divmod(engine.global_batch, engine.micro_batch * world_size)
        if left:
            raise BatchError(
                f"engine.global_batch={engine.global_batch} does not divide by micro_batch {engine.micro_batch} x world "
                f"{world_size} = {engine.micro_batch * world_size}; set engine.global_batch to a multiple of that, or change "
                "engine.micro_batch or the number of workers."
            )
        return BatchPlan(engine.global_batch, engine.micro_batch, passes, world_size)
    accumulation = engine.accumulation_steps or 1
    parts = accumulation * world_size
    micro = engine.micro_batch if engine.micro_batch is not None else engine.global_batch // parts
    if micro * parts != engine.global_batch:
        if engine.micro_batch is None:
            below, above = micro * parts, (micro + 1) * parts
            raise BatchError(
                f"engine.global_batch={engine.global_batch} does not divide by accumulation {accumulation} x "
                f"world {world_size} = {parts}; set engine.global_batch to {f'{below} or ' if below else ''}{above}, or change "
                "engine.accumulation_steps or launch.workers."
            )
        raise BatchError(
            f"engine.global_batch={engine.global_batch} is not micro_batch {micro} x accumulation {accumulation} x "
            f"world {world_size} = {micro * parts}; set engine.global_batch to {micro * parts}, or change engine.micro_batch "
            "(null derives it) or engine.accumulation_steps."
        )
    return BatchPlan(engine.global_batch, micro, accumulation, world_size)


def valid_worlds(engine: EngineConfig, least: int, most: int) -> tuple[int, ...]:
    """Numbers of ranks from `least` to `most` that the batch divides over, in this order."""
    worlds = []
    for world in range(least, most + 1):
        try:
            plan_batches(engine, world)
        except BatchError:
            continue
        worlds.append(world)
    return tuple(worlds)

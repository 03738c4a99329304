"""Bytes of one device in a training step.

Layer 4.
"""

from dataclasses import dataclass

from cromss_dist.config import BatchPlan, RunConfig
from cromss_dist.plan.work import Networks
from cromss_dist.train.step.memory import FREE_SHARE

BUCKET_NUMBERS = 500_000_000  # DeepSpeed's reduce_bucket_size, a buffer of float32 at stages 1 and 2
LOGIT_BYTES, LOSS_BYTES = 72, 450  # a pixel: both branches' logits; what the loss works with. train/step/accumulation.py
CONTEXT_BYTES = 1 << 30  # assumption: what CUDA, cuDNN and NCCL take of a GPU


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step on one device, by what they are.

    Args:
        weights: Float32, and the flat copies of them that DeepSpeed keeps at stages 1 and 2.
        gradients: Float32.
        adam: Both moments.
        buckets: In which gradients travel.
        activations: Kept from the forward pass of one micro batch.
        loss: Logits and what the loss works with.
        context: Of the driver and its libraries; 0 on a CPU.
    """

    weights: int
    gradients: int
    adam: int
    buckets: int
    activations: int
    loss: int
    context: int

    @property
    def total(self) -> int:
        """All of it: an upper bound, since not all is alive at once."""
        return self.weights + self.gradients + self.adam + self.buckets + self.activations + self.loss + self.context


def memory_of(config: RunConfig, plan: BatchPlan, networks: Networks, stage: int, recomputing: bool, gpu: bool) -> Memory:
    """What a rank needs at a ZeRO stage."""
    size, ranks = 4 * networks.parameters, plan.world_size
    two_passes = config.loss.scope == "global" and plan.accumulation_steps > 1
    pixels = plan.micro_batch * config.data.crop_px**2 * (plan.accumulation_steps if two_passes else 1)
    weights = size // ranks if stage == 3 else size
    return Memory(
        weights=weights + (size // ranks if stage in (1, 2) else 0) + networks.buffer_bytes,
        gradients=size // ranks if stage >= 2 else size,
        adam=2 * size // (ranks if stage >= 1 else 1),
        buckets=0 if ranks == 1 else 4 * BUCKET_NUMBERS if stage in (1, 2) else min(size, 4 * BUCKET_NUMBERS),
        activations=networks.activation_bytes(plan.micro_batch, recomputing),
        loss=pixels * (LOGIT_BYTES + LOSS_BYTES),
        context=CONTEXT_BYTES if gpu else 0,
    )


def must_recompute(config: RunConfig, plan: BatchPlan, networks: Networks, memory_bytes: int, gpu: bool) -> bool:
    """Whether activations are computed again: what `engine.activation_checkpointing` says, or what 'auto' will find on a GPU."""
    wish = config.engine.activation_checkpointing
    if wish != "auto":
        return wish
    kept = memory_of(config, plan, networks, config.engine.zero_stage, False, gpu)
    free = memory_bytes - (kept.weights + kept.adam + kept.context)  # what the engine finds free before the first step
    return gpu and kept.activations > FREE_SHARE * free

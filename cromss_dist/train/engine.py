"""The training step, computed by DeepSpeed. The only file that imports it.

Layer 3. Its dictionary is generated from `EngineConfig`; nobody writes one by hand. Mixed precision is torch's
autocast for both bf16 and fp16 (fp32 master weights and batch norms, dynamic loss scaling for fp16): DeepSpeed's own
`bf16` block casts parameters but not the buffers of batch norms, which then fail.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cromss_dist.config import BatchPlan, EngineConfig, TrainConfig
from cromss_dist.errors import ConfigError
from cromss_dist.world import World


@dataclass(frozen=True)
class StepResult:
    """What one backward pass left behind."""

    stepped: bool  # whether the optimiser moved: at the end of an accumulation
    grad_norm: Tensor | float | None  # global norm before clipping, where the engine computes it; not yet synced


def resolve_precision(engine: EngineConfig, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The arithmetic of a run on a device; says what 'auto' means there.

    Raises:
        ConfigError: fp16 on a CPU, or with a ZeRO stage: DeepSpeed 0.19.8 skips a step whose gradient overflows without
            lowering the scale, so every later step is skipped, too, and clips and reports scaled gradients.
    """
    precision = engine.precision
    if precision == "auto":
        if device.type == "cpu":
            return "fp32"
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("engine.precision='fp16' is not supported on a CPU; set engine.precision to auto, fp32 or bf16.")
    if precision == "fp16" and engine.zero_stage > 0:
        raise ConfigError(
            f"engine.precision='fp16' does not work with engine.zero_stage={engine.zero_stage}, where the loss scale is never "
            "lowered; set engine.zero_stage to 0, or engine.precision to bf16 or fp32."
        )
    return precision


def deepspeed_config(engine: EngineConfig, plan: BatchPlan, precision: Literal["fp32", "bf16", "fp16"]) -> dict[str, Any]:
    """DeepSpeed's dictionary for our config."""
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": engine.grad_clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's Adam, which needs no compiler at run time
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if precision != "fp32":
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}
    return config


class Engine:
    """A model, its Adam and DeepSpeed around them, on this rank's device.

    Args:
        model: Weights must be equal on all ranks (seed before building); DeepSpeed broadcasts rank 0's in any case.
        engine: How a step is computed.
        train: Learning rate and weight decay.
        plan: Batch arithmetic.
        world: This process among the others.

    Raises:
        ConfigError: see `resolve_precision`.
    """

    def __init__(self, model: nn.Module, engine: EngineConfig, train: TrainConfig, plan: BatchPlan, world: World) -> None:
        self.precision = resolve_precision(engine, world.device)
        # Of the images alone, and so of all activations; DeepSpeed views weights as flat bytes, so they stay contiguous.
        self.memory_format = torch.channels_last if engine.channels_last else torch.contiguous_format
        self.optimizer = torch.optim.Adam(model.parameters(), lr=train.lr, weight_decay=train.weight_decay)
        self._world = world
        self._zero_stage = engine.zero_stage
        deepspeed = _import_deepspeed(world.device)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(world.device), optimizer=self.optimizer, config=deepspeed_config(engine, plan, self.precision)
        )

    def forward(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both branches for float32 images (B, bands, h, w) in [0, 1]; dtype is that of the arithmetic."""
        s1 = s1.contiguous(memory_format=self.memory_format)
        s2 = s2.contiguous(memory_format=self.memory_format)
        logits: tuple[Tensor, Tensor] = self._engine(s1, s2)
        return logits

    def backward(self, loss: Tensor) -> StepResult:
        """Adds up the gradient of a micro batch; at the last one of an accumulation, moves the optimiser."""
        self._engine.backward(loss)
        stepped = bool(self._engine.is_gradient_accumulation_boundary())
        self._engine.step()
        return StepResult(stepped, self._engine.get_global_grad_norm() if stepped else None)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the networks."""
        self._engine.train(mode)

    def average_running_statistics(self) -> None:
        """Makes the running means and variances of batch norms the same on all ranks: their averages; a collective call.

        Each rank normalises by its own micro batch, so each has seen other pixels. Without this, the ranks would
        validate different networks and rank 0's would be saved. Training steps do not use these numbers.
        """
        buffers = [buffer for buffer in self._engine.module.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        mean = self._world.reduce_sum(flat) / self._world.size
        for buffer, part in zip(buffers, torch.split(mean, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    @property
    def lr(self) -> float:
        """Adam's learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        # DeepSpeed's wrappers share the groups' dictionaries with our optimiser.
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers on the CPU, whole on every rank (ZeRO-3 gathers); a collective call."""
        module: nn.Module = self._engine.module
        if self._zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(module.parameters())):
                return _on_cpu(module)
        return _on_cpu(module)

    def close(self) -> None:
        """Frees what DeepSpeed holds."""
        self._engine.destroy()


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in module.state_dict().items()}


def _import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed, quietly and without its compiler.

    On a CPU, `init_distributed` would spend minutes compiling a shared-memory op that only inference uses; an empty
    table of compatible ops prevents that.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # a run of one process has no launcher that sets it
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its import sets another level
    if device.type == "cpu":
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed

"""The training step: DeepSpeed reduces gradients and partitions what ZeRO partitions. With master.py, its home.

Layer 3. Everything else is done here and in `GuardedAdam`, the same at every ZeRO stage: mixed precision is torch's autocast
around the networks, so that DeepSpeed sees a float32 model and reduces float32 gradients; the scale of an fp16 loss,
clipping, and leaving a step out happen in the optimiser that DeepSpeed calls. Checkpoints are tensors by name, which know
neither stages nor ranks.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cromss_dist.config import BatchPlan, EngineConfig, TrainConfig
from cromss_dist.errors import CheckpointError
from cromss_dist.models.batch_norm import frozen_statistics, globalise_batch_norms
from cromss_dist.models.recompute import recompute_activations
from cromss_dist.train.step.master import MasterState
from cromss_dist.train.step.memory import FREE_SHARE, free_bytes, saved_bytes
from cromss_dist.train.step.optimizer import GuardedAdam, LossScale
from cromss_dist.world import World

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What became of one optimiser step; the same on every rank."""

    applied: bool  # whether the weights moved
    grad_norm: float  # of all weights, before clipping; inf or nan where it is not finite
    overflow: bool  # left out because an fp16 loss was scaled too high, which the next one is less


def resolve_precision(engine: EngineConfig, device: torch.device) -> Precision:
    """The arithmetic of a run on a device; says what 'auto' means there. fp16 runs on a CPU, too, slowly."""
    if engine.precision != "auto":
        return engine.precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Inside, or of a function that it decorates, the networks compute in an arithmetic."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def resolve_memory_format(engine: EngineConfig, device: torch.device) -> torch.memory_format:
    """That of images, and so of all activations; says what 'auto' means on a device.

    DeepSpeed views weights as flat bytes, so they stay contiguous. A CPU is slower with channels last, and its batch norms
    are less exact: docs/training.md, docs/numerics.md.
    """
    channels_last = device.type == "cuda" if engine.channels_last == "auto" else engine.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


def deepspeed_config(engine: EngineConfig, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's dictionary for our config."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # GuardedAdam does
    if engine.zero_stage == 3:
        zero["sub_group_size"] = 10**15  # so that Adam is called once, with the whole partition
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "managed_gradient_accumulation": False,  # a step ends where we say
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's Adam, which needs no compiler at run time
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class _Autocast(nn.Module):
    """The networks in the arithmetic of the run; DeepSpeed would switch off an autocast around itself."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision) -> None:
        super().__init__()
        self.model, self._device, self._precision = model, device, precision

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        with autocast(self._precision, self._device):
            logits: tuple[Tensor, ...] = self.model(*images)
            return logits


class Engine:
    """A model, its Adam and DeepSpeed around them, on this rank's device.

    Args:
        model: Takes images and returns a tuple of logits. Weights must be equal on all ranks (seed before building); DeepSpeed
            broadcasts rank 0's in any case. Parameters without `requires_grad` stay as they are. It is changed in place,
            without changing names: batch norms, recomputation, compilation.
        engine: How a step is computed.
        train: Learning rate and weight decay.
        plan: Batch arithmetic.
        world: This process among the others.

    Raises:
        ConfigError: batch norms that cannot be made global.
    """

    def __init__(self, model: nn.Module, engine: EngineConfig, train: TrainConfig, plan: BatchPlan, world: World) -> None:
        self.precision = resolve_precision(engine, world.device)
        self.memory_format = resolve_memory_format(engine, world.device)
        self._config, self._world, self._model = engine, world, model
        self._scale = LossScale(dynamic=self.precision == "fp16")
        model.train()
        if engine.batch_norm == "global":
            globalise_batch_norms(model, world.reduce_sum, world.size)
        if engine.activation_checkpointing is True:
            recompute_activations(model)
        self._must_measure = engine.activation_checkpointing == "auto" and world.device.type == "cuda"
        model.to(world.device)
        if engine.compile is True:
            model.compile()
        # Buffers and what they were before the step, by type, so that one kernel copies all of a type.
        self._buffers = [
            (same, [torch.empty_like(buffer) for buffer in same])
            for dtype in (torch.float32, torch.int64)
            if (same := [buffer for buffer in model.buffers() if buffer.dtype == dtype])
        ]
        self._in_step = False
        self.optimizer = GuardedAdam(
            (parameter for parameter in model.parameters() if parameter.requires_grad),
            lr=train.lr,
            weight_decay=train.weight_decay,
            fused=engine.fused_optimizer is not False,
            grad_clip=engine.grad_clip,
            reduce_sum=world.reduce_sum if engine.zero_stage > 0 else None,
        )
        self._master = MasterState(model, self.optimizer, engine, world)
        deepspeed = import_deepspeed(world.device)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=_Autocast(model, world.device, self.precision),
            optimizer=self.optimizer,
            config=deepspeed_config(engine, plan),
        )
        if world.size == 1 and engine.zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # it copies every gradient twice to sum it over one rank
        self._master.create_moments(self._engine.optimizer)

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """What the model returns for float32 images (B, bands, h, w) in [0, 1]: logits, of the dtype of the arithmetic."""
        images = tuple(x.contiguous(memory_format=self.memory_format) for x in images)
        if self._must_measure and self._model.training:
            self._must_measure = False
            self._recompute_if_needed(images)
        if self._model.training and not self._in_step:
            self._in_step = True
            for now, before in self._buffers:
                torch._foreach_copy_(before, now)
        logits: tuple[Tensor, ...] = self._engine(*images)
        return logits

    def backward(self, loss: Tensor) -> None:
        """Adds up the gradient of a micro batch; a step's is the mean over its micro batches and the ranks."""
        self._engine.backward(loss * self._scale.value if self._scale.dynamic else loss)

    def step(self, veto: bool = False) -> StepResult:
        """Ends an optimiser step: moves the weights by the gradient added up, if it is finite, and forgets it.

        A step that is left out leaves no trace: running statistics, which its forward passes moved, are put back, too.

        Args:
            veto: Whether to leave the step out in any case; the same on all ranks.
        """
        self.optimizer.prepare(self._scale.value, veto)
        self._engine.step()
        moved, could_fall = self.optimizer.moved, self._scale.can_fall
        if not moved and self._in_step:
            for now, before in self._buffers:
                torch._foreach_copy_(now, before)
        self._in_step = False
        if not veto:
            self._scale.update(finite=moved)
        return StepResult(moved, self.optimizer.grad_norm, overflow=not (moved or veto) and could_fall)

    def frozen_statistics(self) -> AbstractContextManager[None]:
        """Inside, a forward pass leaves the running statistics of batch norms alone."""
        return frozen_statistics(self._model)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the networks."""
        self._engine.train(mode)

    def average_running_statistics(self) -> None:
        """Makes the running statistics of local batch norms the same on all ranks: their averages; a collective call.

        Each rank normalises by its own micro batch, so each has seen other pixels. Without this, the ranks would validate
        different networks. Training steps do not use these numbers. Global batch norms agree already.
        """
        self._master.average_buffers()

    @property
    def lr(self) -> float:
        """Adam's learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        # DeepSpeed's wrappers share the groups' dictionaries with our optimiser.
        for group in self.optimizer.param_groups:
            group["lr"] = value

    @property
    def loss_scale(self) -> float:
        """What an fp16 loss is multiplied by; 1 in other arithmetics."""
        return self._scale.value

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers on the CPU, whole on every rank (ZeRO-3 gathers); a collective call."""
        with self._master.gathered():
            state = self._model.state_dict()
            return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}

    def state(self) -> dict[str, Any]:
        """What of a checkpoint are no tensors: optimiser steps that moved, and the scale of an fp16 loss; JSON."""
        scale = {"value": self._scale.value, "good_steps": self._scale.good_steps} if self._scale.dynamic else None
        return {"steps": self.optimizer.steps, "loss_scale": scale}

    def snapshot(self) -> dict[str, Tensor]:
        """This rank's share of the master state, copied to the CPU; a collective call that changes nothing.

        Returns:
            What `MasterState` describes; the shares of all ranks are disjoint, about equally large, and complete.
        """
        return self._master.share()

    def restore(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Takes over a master state, whatever ZeRO stage and number of ranks it is of; a collective call.

        Args:
            tensors: All shares of a `snapshot`, on every rank.
            state: Its `state`.

        Raises:
            CheckpointError: names are missing, unknown or of another shape or type; nothing has been changed.
        """
        if missing := sorted(self.state().keys() - state.keys()):
            raise CheckpointError(f"The checkpoint's state lacks {', '.join(missing)}; start over with --fresh.")
        self._master.take_over(tensors)
        self.optimizer.set_steps(state["steps"])
        if self._scale.dynamic and (scale := state["loss_scale"]):  # none of a run that was not in fp16 so far
            self._scale.value, self._scale.good_steps = scale["value"], scale["good_steps"]

    def close(self) -> None:
        """Frees what DeepSpeed holds."""
        self._engine.destroy()

    def _recompute_if_needed(self, images: tuple[Tensor, ...]) -> None:
        """Has activations computed again instead of kept if they would not fit on any of the ranks."""
        with self.frozen_statistics():
            wanted = saved_bytes(self._engine, *images)
        if self._world.any(wanted > FREE_SHARE * free_bytes(self._world.device)):
            recompute_activations(self._model)


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed, quietly and without its compiler.

    On a CPU, `init_distributed` would spend minutes compiling a shared-memory op that only inference uses; an empty
    table of compatible ops prevents that.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # a run of one process has no launcher that sets it
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)  # what its ZeRO calls, each step
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its import sets another level
    if device.type == "cpu":
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed

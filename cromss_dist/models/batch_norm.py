"""Batch norms that normalise by the pixels of all ranks, and running statistics that hold still.

B batch, C channels, H rows, W columns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from cromss_dist.errors import ConfigError

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]


def globalise_batch_norms(model: nn.Module, reduce_sum: ReduceSum, world_size: int) -> None:
    """Makes every batch norm of `model`, in place, normalise by the pixels of all ranks.

    Parameters, buffers and keys stay the same objects; in one process nothing changes. Afterwards a training forward is
    two small collective calls a batch norm, one of them in the backward pass: every rank must run the same ones, on as
    many pixels as the others. Evaluation needs none.

    Args:
        model: torch's BatchNorm2d and timm's BatchNormAct2d are known.
        reduce_sum: Sum of a detached float64 tensor over ranks.
        world_size: Number of ranks that `reduce_sum` sums over.

    Raises:
        ConfigError: the model has batch norms of another class.
    """
    if world_size == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    other = sorted({type(norm).__name__ for norm in norms if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d)})
    if other:
        raise ConfigError(
            f"engine.batch_norm='global' knows BatchNorm2d and BatchNormAct2d, and this model has {', '.join(other)}; set "
            "engine.batch_norm=local, which makes results depend on the number of ranks, or choose another model.encoder."
        )
    for norm in norms:
        norm.__class__ = GlobalBatchNorm2d
        assert isinstance(norm, GlobalBatchNorm2d)
        norm.reduce_sum, norm.world_size = reduce_sum, world_size


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, a training forward leaves the running statistics of batch norms as they are; its output is the same.

    The forward moves copies. Without running statistics at all torch would save fewer tensors for the backward pass, which
    a recomputed forward must not.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all ranks; what timm's BatchNormAct2d has behind it, dropout and activation, stays.

    Mean and variance are float32 on each rank and put together in float64, so ranks show in the last bits only. Half
    precision inputs are normalised in float32 and rounded once. Made by `globalise_batch_norms`, which gives an existing
    batch norm this class.

    Reference: Ioffe and Szegedy, "Batch normalization" (2015).
    Departs: torch's SyncBatchNorm computes the same with CUDA kernels alone; this one needs no GPU.
    """

    reduce_sum: ReduceSum
    world_size: int

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # whole: a graph must not begin with an activation in place
    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, C, H, W) of any float type; in training by all ranks' pixels, a collective call."""
        y = self._by_batch(x) if self.training else super().forward(x)
        for child in self.children():
            y = child(y)
        return y

    def _by_batch(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        count = x.numel() // x.shape[1] * self.world_size
        mean, var = _global_moments(x.detach(), self.reduce_sum, self.world_size)
        if self.track_running_stats:
            self._track(mean, var * (count / (count - 1)))
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        y: Tensor = _Normalise.apply(x, weight, bias, mean, var, self.eps, count, self.reduce_sum)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased_var, share)


def _global_moments(x: Tensor, reduce_sum: ReduceSum, world_size: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks: float32 (C,), float64 for float64 input."""
    # The kernel accumulates half precision in float32 on a GPU; on a CPU it would round its result to the input's type.
    values = x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32))
    mean, var = (part.double() for part in torch.batch_norm_update_stats(values, None, None, 0.0))
    mean, mean_square = (reduce_sum(torch.cat((mean, var + mean.square()))) / world_size).chunk(2)
    var = (mean_square - mean.square()).clamp_min(0)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return mean.to(dtype), var.to(dtype)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and variance are functions of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: int,
        reduce_sum: ReduceSum,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count, ctx.reduce_sum = eps, count, reduce_sum
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        # With mean and variance held still, which is the backward pass of evaluation.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # What flows through them, per channel: weight / std (mean(dy) + x_hat mean(dy x_hat)), means over all ranks' pixels.
        # It is linear in x_hat, so it is a normalisation, too.
        sums = ctx.reduce_sum(torch.cat((dbias, dweight)).double()) / ctx.count
        mean_dy, mean_dy_x_hat = sums.to(weight.dtype).chunk(2)
        scale = weight * (var + ctx.eps).rsqrt()
        dx -= F.batch_norm(x, mean, var, scale * mean_dy_x_hat, scale * mean_dy, training=False, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None, None

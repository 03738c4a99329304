"""Adam that looks at the gradient before it moves, and the scale of a loss in fp16.

Layer 3.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight: means of its gradient and of the gradient's square."""

_LINE = 4096


class LossScale:
    """The factor that keeps gradients of a loss above fp16's smallest number: as large as they allow, by trial.

    Args:
        dynamic: False is 1 forever.

    Reference: Micikevicius et al., "Mixed precision training" (2018), section 3.2.
    """

    GROWTH_STEPS = 2000

    def __init__(self, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = 2.0**16 if dynamic else 1.0
        self.good_steps = 0  # since the scale last changed

    @property
    def can_fall(self) -> bool:
        """Whether a gradient that is not finite may be the scale's fault; it does not fall below 1."""
        return self.value > 1

    def update(self, finite: bool) -> None:
        """Halves the scale after a step whose gradient was not finite, doubles it after 2000 in a row that were."""
        if not self.dynamic:
            return
        if not finite:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
        elif self.good_steps + 1 == self.GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
        else:
            self.good_steps += 1


class GuardedAdam(torch.optim.Adam):
    """Adam that unscales and clips the gradient, and stays where it is if the step is vetoed or the gradient not finite.

    DeepSpeed calls `step` as it would any optimiser's, with whole gradients or with this rank's part of them.

    Args:
        params: Float32 weights.
        lr: Learning rate.
        weight_decay: L2 penalty.
        fused: Whether the update is one kernel.
        grad_clip: Largest norm of the gradient, 0 = no clipping.
        reduce_sum: Sum over ranks, where each has a part of the gradient; None where each has all of it.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        fused: bool,
        grad_clip: float,
        reduce_sum: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=fused)
        self._fused, self._grad_clip, self._reduce_sum = fused, grad_clip, reduce_sum
        self.steps = 0  # that moved
        self.prepare(1.0, False)

    def prepare(self, scale: float, veto: bool) -> None:
        """Tells what the next `step` is to know: the scale of its gradient, and whether it must not move."""
        self._scale, self._veto = scale, veto
        self.moved = False
        self.grad_norm = math.nan  # of the unscaled gradient; stays so where ZeRO-3 finds it infinite and does not call `step`

    def create_state(self, params: Iterable[Tensor]) -> None:
        """Gives weights their moments, zeros, before the first step; otherwise torch does so in it."""
        for param in params:
            # As torch's Adam has them: the fused kernel counts steps on the weights' device.
            step = torch.zeros((), dtype=torch.float32, device=param.device if self._fused else "cpu")
            self.state[param] = {"step": step} | {moment: torch.zeros_like(param) for moment in MOMENTS}

    def set_steps(self, steps: int) -> None:
        """Sets the number of steps, by which Adam corrects its moments."""
        self.steps = steps
        for state in self.state.values():
            state["step"].fill_(steps)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves the weights, or not; sets `moved` and `grad_norm`. Waits once for the device."""
        assert closure is None, "DeepSpeed calls this, which has none"
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        norm = self._norm(grads, torch.float32)
        if not math.isfinite(norm):  # on all ranks alike; or only a square was too large, which float64 shows, five times slower
            norm = self._norm(grads, torch.float64)
        self.grad_norm = norm / self._scale
        self.moved = math.isfinite(self.grad_norm) and not self._veto
        if not self.moved:
            return
        factor = 1 / self._scale
        if self._grad_clip > 0:
            factor *= min(1.0, self._grad_clip / (self.grad_norm + 1e-6))
        if factor != 1:
            torch._foreach_mul_(grads, factor)
        super().step()
        self.steps += 1

    def _norm(self, grads: list[Tensor], dtype: torch.dtype) -> float:
        """Norm of the whole gradient, of all ranks' parts; waits for the device."""
        if grads[0].is_cuda:
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=dtype))
        else:
            norms = torch.cat([part for grad in grads for part in _norms(grad, dtype)])
        squares = norms.double().square().sum()
        if self._reduce_sum is not None:
            squares = self._reduce_sum(squares)
        return math.sqrt(float(squares))


def _norms(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Norms of a gradient's lines of 4096 numbers, and of what is left.

    A CPU adds up squares one after another: over ZeRO's flat partition of 1e8 weights, float32 was 1 % off.
    """
    flat = grad.reshape(-1)
    end = len(flat) // _LINE * _LINE
    lines = torch.linalg.vector_norm(flat[:end].view(-1, _LINE), dim=1, dtype=dtype)
    return lines, torch.linalg.vector_norm(flat[end:], dim=0, keepdim=True, dtype=dtype)

"""Adam that looks before it moves, against torch's; the scale of an fp16 loss."""

import math

import pytest
import torch
from torch import nn

from cromss_dist.train.step.optimizer import GuardedAdam, LossScale

LR, DECAY = 0.1, 1e-3


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), (2, 2, 2))]


def give_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    for param, source in zip(params, weights(seed), strict=True):
        param.grad = source.detach().clone() * scale


def guarded(params: list[nn.Parameter], fused: bool = True, grad_clip: float = 0.0) -> GuardedAdam:
    optimizer = GuardedAdam(params, LR, DECAY, fused, grad_clip, reduce_sum=None)
    optimizer.create_state(params)
    return optimizer


def pairs_equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_steps_are_those_of_torchs_adam_bit_by_bit_whatever_power_of_two_scales_the_gradient(fused: bool, scale: float) -> None:
    ours, theirs = weights(), weights()
    optimizer, oracle = guarded(ours, fused), torch.optim.Adam(theirs, lr=LR, weight_decay=DECAY, fused=fused)
    for step in range(1, 4):
        give_gradients(ours, step, scale)
        give_gradients(theirs, step)
        optimizer.prepare(scale, veto=False)
        optimizer.step()
        oracle.step()
        assert optimizer.moved
        assert optimizer.steps == step
        assert optimizer.grad_norm == pytest.approx(float(nn.utils.get_total_norm([w.detach() for w in weights(step)])), rel=1e-6)
        assert pairs_equal(ours, theirs)


def test_clipping_is_torchs_and_the_norm_told_is_the_one_before_it() -> None:
    ours, theirs = weights(), weights()
    optimizer, oracle = guarded(ours, grad_clip=0.5), torch.optim.Adam(theirs, lr=LR, weight_decay=DECAY, fused=True)
    give_gradients(ours, 1, scale=64.0)
    give_gradients(theirs, 1)
    norm = nn.utils.clip_grad_norm_(theirs, 0.5)
    optimizer.prepare(64.0, veto=False)
    optimizer.step()
    oracle.step()
    assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "veto"), [(math.nan, False), (math.inf, False), (-math.inf, False), (1.0, True), (math.nan, True)]
)
def test_a_veto_and_a_gradient_that_is_not_finite_leave_weights_and_moments_alone(value: float, veto: bool) -> None:
    ours = weights()
    optimizer = guarded(ours)
    give_gradients(ours, 1)
    assert ours[1].grad is not None
    ours[1].grad[3] = value
    optimizer.prepare(1.0, veto)
    optimizer.step()
    assert not optimizer.moved
    assert optimizer.steps == 0
    assert math.isfinite(optimizer.grad_norm) == math.isfinite(value)
    assert pairs_equal(ours, weights())
    assert all(not entry.any() for state in optimizer.state.values() for entry in state.values())


def test_a_gradient_whose_squares_are_too_large_for_float32_is_finite() -> None:
    ours = weights()
    optimizer = guarded(ours, grad_clip=1.0)
    give_gradients(ours, 1, scale=1e30)
    optimizer.step()
    assert optimizer.moved
    assert 1e30 < optimizer.grad_norm < 1e31


def test_the_norm_is_right_for_as_many_weights_as_a_partition_of_zero_has() -> None:
    ours = [nn.Parameter(torch.zeros(30_000_001)), nn.Parameter(torch.zeros(3))]
    optimizer = guarded(ours)
    for weight in ours:
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer.prepare(1.0, veto=True)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(1e-3 * math.sqrt(30_000_004), rel=3e-6)


def test_a_partitioned_gradient_has_the_norm_of_the_whole() -> None:
    ours = weights()
    optimizer = GuardedAdam(ours, LR, DECAY, True, 0.0, reduce_sum=lambda squares: 4 * squares)
    optimizer.create_state(ours)
    give_gradients(ours, 1)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(2 * float(nn.utils.get_total_norm([w.detach() for w in weights(1)])), rel=1e-6)


def test_an_fp16_scale_halves_at_once_doubles_after_2000_good_steps_and_stays_above_1() -> None:
    scale = LossScale(dynamic=True)
    assert scale.value == 2**16
    scale.update(finite=False)
    assert scale.value == 2**15
    for _ in range(1999):
        scale.update(finite=True)
    assert scale.value == 2**15
    scale.update(finite=True)
    assert scale.value == 2**16
    for _ in range(20):
        scale.update(finite=False)
    assert scale.value == 1
    assert not scale.can_fall


def test_other_arithmetics_have_no_scale() -> None:
    scale = LossScale(dynamic=False)
    scale.update(finite=False)
    assert scale.value == 1
    assert not scale.can_fall

"""Guard and engine together, on two ranks: a bad step of one rank is left out on both, without a trace."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cromss_dist.config import BatchPlan, EngineConfig, FaultConfig, TrainConfig
from cromss_dist.errors import DivergenceError
from cromss_dist.train.safety.guard import Guard
from cromss_dist.train.step.engine import Engine
from cromss_dist.world import World
from tests.ranks import run_ranks

STEPS, BAD_STEP = 6, 3
PLAN = BatchPlan(global_batch=4, micro_batch=2, accumulation_steps=1, world_size=2)


class TwoHeads(nn.Module):
    """Two small branches with a batch norm, whose running statistics a forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.s1 = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.s2 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))

    def forward(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        return self.s1(s1), self.s2(s2)


class ScaledBackward(torch.autograd.Function):
    """The same value, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return slope * math.inf


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss is nan": lambda loss: loss * math.nan,
    "loss is inf": lambda loss: loss * math.inf,
    "gradient is not finite": lambda loss: ScaledBackward.apply(loss),  # type: ignore[no-untyped-call]
}


def train(world: World, zero_stage: int, fault: str, bad_steps: range) -> tuple[dict[str, Tensor], Guard, list[str]]:
    """Trains with `fault` on rank 1 at some steps; with fault 'none' these steps are not taken at all."""
    engine = Engine(TwoHeads(), EngineConfig(global_batch=4, zero_stage=zero_stage), TrainConfig(lr=0.01), PLAN, world)
    guard, reasons = Guard(FaultConfig(max_bad_steps=3), world), []
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        s1, s2 = (torch.rand(2, bands, 8, 8, generator=generator) for bands in (2, 3))
        bad = step in bad_steps
        if bad and fault == "none":
            continue
        if bad and fault == "pixel is nan" and world.rank == 1:
            s2[1, 2, 3, 4] = math.nan
        first, second = engine.forward(s1, s2)
        loss = (first - 0.3).square().mean() + (second - first.detach()).square().mean()
        if bad and world.rank == 1 and fault in FAULTS:
            loss = FAULTS[fault](loss)
        engine.backward(loss)
        verdict = guard.judge(loss, stop=False)
        result = engine.step(veto=verdict.skip)
        if (reason := guard.settle(verdict, result, step)) is not None:
            reasons.append(reason)
        guard.check(Path("run"), last_checkpoint=None)
    state = engine.state_dict()
    engine.close()
    return state, guard, reasons


def skip_without_a_trace(world: World, folder: Path, zero_stage: int) -> None:
    bad_steps = range(BAD_STEP, BAD_STEP + 1)
    expected, _guard, none = train(world, zero_stage, "none", bad_steps)
    assert none == []
    for fault in (*FAULTS, "pixel is nan"):
        found, guard, reasons = train(world, zero_stage, fault, bad_steps)
        assert len(reasons) == guard.counters["train/skipped_steps"] == 1, fault
        assert reasons[0].startswith("loss is nan" if fault == "pixel is nan" else fault)
        for name, value in expected.items():
            assert value.isfinite().all()
            assert torch.equal(found[name], value), (fault, name)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_bad_step_of_one_rank_is_as_if_no_rank_had_taken_it(tmp_path: Path, zero_stage: int) -> None:
    assert run_ranks(skip_without_a_trace, 2, tmp_path, zero_stage) == [0, 0]


def go_nowhere(world: World, _: Path) -> None:
    train(world, 0, "loss is nan", range(2, 4))  # two in a row are allowed
    train(world, 0, "loss is nan", range(2, 5))


def test_bad_steps_in_a_row_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(go_nowhere, 2, tmp_path) == [DivergenceError.exit_code] * 2

"""What is judged a bad step, a spike, and a run that goes nowhere; on one rank and on two."""

import json
import math
import random
from pathlib import Path
from statistics import median
from typing import Literal

import pytest
import torch

from cromss_dist.config import FaultConfig
from cromss_dist.errors import DivergenceError
from cromss_dist.train.safety.guard import Guard, Verdict
from cromss_dist.train.step.engine import StepResult
from cromss_dist.world import World
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))
GOOD = StepResult(applied=True, grad_norm=1.0, overflow=False)
VETOED = StepResult(applied=False, grad_norm=1.0, overflow=False)
BAD_GRADIENT = StepResult(applied=False, grad_norm=math.nan, overflow=False)
OVERFLOW = StepResult(applied=False, grad_norm=math.inf, overflow=True)


def take(guard: Guard, loss: float, step: int, result: StepResult | None = None) -> tuple[Verdict, str | None]:
    """One step as the loop takes it."""
    verdict = guard.judge(torch.tensor(loss), stop=False)
    return verdict, guard.settle(verdict, result or (VETOED if verdict.skip else GOOD), step)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_costs_its_step_and_no_other(loss: float) -> None:
    guard = Guard(FaultConfig(), ALONE)
    told = [take(guard, value, step) for step, value in enumerate([1.0, loss, 1.0], 1)]
    assert [verdict.skip for verdict, _ in told] == [False, True, False]
    assert [reason for _, reason in told] == [None, f"loss is {loss}", None]
    assert guard.counters == {"train/skipped_steps": 1, "train/spikes": 0, "train/overflows": 0}


def test_a_gradient_that_is_not_finite_makes_a_step_bad_and_an_fp16_overflow_does_not() -> None:
    guard = Guard(FaultConfig(), ALONE)
    _, reason = take(guard, 1.0, 1, BAD_GRADIENT)
    assert reason == "gradient is not finite, loss is 1"
    assert guard.in_streak
    assert take(guard, 1.0, 2, OVERFLOW)[1] is None
    assert guard.in_streak  # nothing says yet that the weights are good
    take(guard, 1.0, 3)
    assert not guard.in_streak
    assert guard.counters == {"train/skipped_steps": 1, "train/spikes": 0, "train/overflows": 1}


def test_the_run_ends_after_as_many_bad_steps_in_a_row_as_allowed_and_not_before(tmp_path: Path) -> None:
    guard = Guard(FaultConfig(max_bad_steps=3), ALONE)
    for step, result in enumerate([BAD_GRADIENT, BAD_GRADIENT, GOOD, BAD_GRADIENT, OVERFLOW, BAD_GRADIENT], 1):
        take(guard, 1.0, step, result)
        guard.check(tmp_path, last_checkpoint=None)
    take(guard, math.nan, 7)
    with pytest.raises(
        DivergenceError, match=r"The last 3 steps, from step 4 on.*loss is nan.*; no checkpoint is from before them"
    ):
        guard.check(tmp_path, last_checkpoint=None)
    with pytest.raises(
        DivergenceError, match=r"checkpoint is of step 2\..*`cromss replay` a folder in '.*my runs/replay'; to go on"
    ):
        guard.check(tmp_path / "my runs", last_checkpoint=2)


@pytest.mark.parametrize(("policy", "skipped"), [("report", 0), ("skip", 2), ("off", 0)])
def test_of_a_loss_that_rises_a_thousandfold_two_steps_are_spikes_and_then_it_is_the_level(
    policy: Literal["report", "skip", "off"], skipped: int
) -> None:
    guard = Guard(FaultConfig(spike=policy, spike_window=8), ALONE)
    told = [take(guard, value, step) for step, value in enumerate([1.0, 1.2, 1.1, *[1100.0] * 5, 0.5, 1100.0], 1)]
    spikes = [step for step, (verdict, _) in enumerate(told, 1) if verdict.spike]
    assert spikes == ([] if policy == "off" else [4, 5])
    assert [step for step, (verdict, _) in enumerate(told, 1) if verdict.skip] == spikes[:skipped]
    assert guard.counters["train/skipped_steps"] == skipped
    if spikes:
        assert told[3][1] == "spike: loss is 1100, 1e+03 times the median 1.1"


def test_no_loss_is_a_spike_before_a_quarter_of_the_window_is_known() -> None:
    for known in (1, 2, 3):
        guard = Guard(FaultConfig(spike_window=8), ALONE)
        for step in range(known):
            take(guard, 1.0, step)
        assert take(guard, 11.0, known)[0].spike == (known >= 2)


def test_spikes_and_bad_losses_do_not_move_the_level() -> None:
    guard = Guard(FaultConfig(spike="skip", spike_window=8, spike_factor=2), ALONE)
    window: list[float] = []
    values = random.Random(0)
    for step in range(300):
        loss = values.choice([1.0, 1.0, 1.0, 1.3, 1.9, 500.0, math.nan]) * values.uniform(0.9, 1.1)
        verdict, _ = take(guard, loss, step)
        high = len(window) >= 2 and verdict.loss > 2 * median(window)
        assert verdict.spike <= high
        if verdict.spike or not verdict.finite:
            continue
        window = [verdict.loss] if high else [*window, verdict.loss][-8:]  # high and no spike: the third one in a row
    assert guard.counters["train/spikes"] > 20


def test_a_restart_at_any_step_changes_no_later_verdict() -> None:
    config = FaultConfig(spike="skip", spike_window=6, max_bad_steps=100)
    values = random.Random(1)
    losses = [values.choice([1.0, 0.7, 1 / 3, 40.0, math.nan]) for _ in range(60)]
    through = Guard(config, ALONE)
    expected = [(repr(take(through, loss, step)), through.counters) for step, loss in enumerate(losses)]
    for restart in range(len(losses)):
        before, after = Guard(config, ALONE), Guard(config, ALONE)
        for step in range(restart):
            take(before, losses[step], step)
        after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
        found = [(repr(take(after, losses[step], step)), after.counters) for step in range(restart, len(losses))]
        assert found == expected[restart:]


def judge_on_two_ranks(world: World, folder: Path) -> None:
    calls: list[int] = []

    class Counting(World):
        def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
            calls.append(values.numel())
            return super().reduce_sum(values)

    guard = Guard(FaultConfig(), Counting(world.rank, world.size, world.device))
    told = []
    for mine, other, stop in ((1.0, 3.0, False), (1.0, math.nan, False), (math.inf, -math.inf, False), (2.0, 2.0, True)):
        told.append(guard.judge(torch.tensor(other if world.rank else mine), stop and world.rank == 1))
    (folder / f"{world.rank}.txt").write_text(repr((told, calls)))


def test_two_ranks_agree_on_loss_finiteness_and_stop_by_one_collective_a_step(tmp_path: Path) -> None:
    assert run_ranks(judge_on_two_ranks, 2, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    expected = [
        Verdict(loss=2.0, finite=True, spike=False, stop=False, skip=False),
        Verdict(loss=math.nan, finite=False, spike=False, stop=False, skip=True),
        Verdict(loss=math.nan, finite=False, spike=False, stop=False, skip=True),
        Verdict(loss=2.0, finite=True, spike=False, stop=True, skip=False),
    ]
    assert first == repr((expected, [2, 2, 2, 2]))

"""Figures between two log lines: what is averaged over what, and where the time went."""

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from cromss_dist.config import LossConfig
from cromss_dist.losses import CromssLoss
from cromss_dist.pretrain.loss import BranchLoss
from cromss_dist.schema import CLASS_NAMES, NUM_CLASSES, Example
from cromss_dist.train.figures.meter import PAUSES, STEP_PHASES, Meter, Phase
from cromss_dist.train.step.accumulation import StepLoss
from cromss_dist.world import World
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class Clock:
    """Time that passes only on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def spend(self, meter: Meter, phase: Phase, seconds: float) -> None:
        with meter.phase(phase):
            self.now += seconds


def output(total: float, counts: tuple[float, float] = (0, 0)) -> StepLoss:
    """A loss of two parts; counts of no pixel unless given."""
    parts = {"ce_s1": torch.tensor(total / 2), "reliability_s1/water": torch.tensor(total / 4)}
    return StepLoss(torch.tensor(total), parts, torch.tensor(counts, dtype=torch.float64))


def figures(counts: Tensor) -> dict[str, float]:
    """Of `output`'s counts."""
    part, whole = counts.tolist()
    return {"train/share": part / whole} if whole else {}


def read(meter: Meter, world: World = ALONE) -> dict[str, float]:
    return meter.read(world, lr=0.01, epochs=0.5)


def test_losses_are_means_over_all_that_was_added() -> None:
    meter = Meter(CPU, 4, figures)
    meter.add(output(1.0))
    meter.add(output(2.0))
    meter.step_done(3.0)
    meter.add(output(6.0))
    meter.step_done(5.0)
    values = read(meter)
    assert values["train/loss/total"] == pytest.approx(3.0)
    assert values["train/loss/ce_s1"] == pytest.approx(1.5)
    assert values["train/grad_norm"] == pytest.approx(4.0)
    assert values["train/reliability_s1/water"] == pytest.approx(0.75)


def test_a_skipped_step_has_a_part_in_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(CPU, 4, figures)
    for total, norm, applied in ((1.0, 2.0, True), (float("nan"), float("nan"), False), (3.0, 4.0, True)):
        meter.add(output(total))
        clock.spend(meter, "forward", 0.5)
        meter.step_done(norm, applied)
    values = read(meter)
    assert values["train/loss/total"] == pytest.approx(2.0)
    assert values["train/grad_norm"] == pytest.approx(3.0)
    assert values["perf/step_s"] == pytest.approx(0.5)


def test_an_interval_of_skipped_steps_has_no_loss() -> None:
    meter = Meter(CPU, 4, figures)
    meter.add(output(float("nan")))
    meter.step_done(float("inf"), applied=False)
    values = read(meter)
    assert values["train/lr"] == 0.01
    assert not [name for name in values if name.startswith(("train/loss", "train/grad_norm", "train/kept"))]


def test_a_reading_starts_over() -> None:
    meter = Meter(CPU, 4, figures)
    meter.add(output(5.0))
    meter.step_done(1.0)
    read(meter)
    meter.add(output(1.0))
    meter.step_done(None)
    values = read(meter)
    assert values["train/loss/total"] == 1.0
    assert "train/grad_norm" not in values


def test_selection_and_agreement_are_those_of_the_pixels() -> None:
    torch.manual_seed(0)
    loss = BranchLoss(CromssLoss(LossConfig(ramp="none", prior="none")))
    meter = Meter(CPU, 2, loss.figures)
    weights, labels, same = [], [], []
    for _ in range(2):
        logits = torch.randn(2, 2, NUM_CLASSES, 8, 8).unbind()
        label = torch.randint(3, NUM_CLASSES, (2, 8, 8))  # classes 0 to 2 are missing
        label[0, 0] = 255
        example = Example({}, label, None, None, torch.ones(2))
        meter.add(loss(logits, example, 200.0))
        weights.append(loss.selection(logits, example, 200.0)[0])
        labels.append(label)
        same.append(logits[0].argmax(1) == logits[1].argmax(1))
    meter.step_done(None)
    values = read(meter)
    weight, label = torch.cat(weights), torch.cat(labels)
    assert values["train/kept_s1"] == pytest.approx(float(weight[label != 255].mean()))
    assert values["train/agreement"] == pytest.approx(float(torch.cat(same).float().mean()))
    for number, name in enumerate(CLASS_NAMES):
        figures = {key for key in values if key.endswith(f"/{name}")}
        if number < 3:
            assert not figures
        else:
            assert figures == {f"train/{kind}_{m}/{name}" for kind in ("kept", "selected_share") for m in ("s1", "s2")}
            of_class = weight[label == number]
            assert values[f"train/kept_s1/{name}"] == pytest.approx(float(of_class.mean()))
            assert values[f"train/selected_share_s1/{name}"] == pytest.approx(float((of_class == 1).double().mean()))


def test_seconds_are_those_of_a_step_and_a_pause_is_not_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(CPU, 8, figures)
    for _ in range(2):
        for _ in range(2):  # micro batches
            clock.spend(meter, "data", 0.25)
            clock.spend(meter, "forward", 1.0)
        clock.spend(meter, "optimizer", 1.5)
        meter.add(output(1.0))
        meter.step_done(None)
    clock.spend(meter, "validation", 7.0)
    values = read(meter)
    assert values["perf/step_s"] == pytest.approx(4.0)
    assert values["perf/samples_per_s"] == pytest.approx(2.0)
    assert values["perf/data_wait_s"] == pytest.approx(0.5)
    assert values["perf/forward_s"] == pytest.approx(2.0)
    assert values["perf/optimizer_s"] == pytest.approx(1.5)
    assert values["perf/backward_s"] == 0
    assert values["perf/validation_s"] == pytest.approx(7.0)
    assert "perf/checkpoint_s" not in values


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    device_ms = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.ms = device_ms[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.ms - self.ms

        def synchronize(self) -> None:
            clock.now += 2.0

    fake = SimpleNamespace(Event=Event, max_memory_allocated=lambda _: 3 * 2**30)
    monkeypatch.setattr(torch, "cuda", fake)
    meter = Meter(torch.device("cuda"), 8, figures)
    with meter.phase("forward"):
        device_ms[0] += 1500  # while the host goes on at once
    clock.spend(meter, "data", 0.5)
    meter.add(output(1.0))
    meter.step_done(None)
    values = read(meter)
    assert values["perf/forward_s"] == pytest.approx(1.5)
    assert values["perf/data_wait_s"] == pytest.approx(0.5)
    assert values["perf/step_s"] == pytest.approx(2.5)  # with what the device still had to do
    assert values["perf/memory_gib"] == 3


def test_what_others_count_is_handed_on() -> None:
    meter = Meter(CPU, 1, figures)
    values = meter.read(ALONE, 0.1, 2.0, loss_scale=1024.0, num_replaced=3, counters={"train/skipped_steps": 2.0})
    expected = {"train/lr": 0.1, "train/epoch": 2.0, "train/loss_scale": 1024.0, "data/replaced_samples": 3.0}
    assert expected.items() <= values.items()
    assert values["train/skipped_steps"] == 2.0


def test_memory_is_that_of_this_process() -> None:
    held = torch.ones(2**26)  # 256 MiB
    values = read(Meter(CPU, 1, figures))
    assert held.numel() * 4 / 2**30 < values["perf/memory_gib"] < 64


def rank_reads(world: World, folder: Path) -> None:
    """Rank r adds losses r and counts of r + 1 pixels, in phases of r + 1 seconds by a clock of its own."""
    patch = pytest.MonkeyPatch()
    clock = Clock(patch)
    meter = Meter(world.device, 6, figures)
    number = world.rank + 1
    meter.add(output(float(world.rank), (world.rank, number)))
    clock.spend(meter, "data", float(number))
    meter.step_done(2.0)
    collectives = []
    whole = World.reduce_sum

    def counted(self: World, values: Tensor) -> Tensor:
        collectives.append(len(values))
        return whole(self, values)

    patch.setattr(World, "reduce_sum", counted)
    values = meter.read(world, 0.1, 1.0, num_replaced=number)
    patch.undo()
    assert len(collectives) == 1
    assert values["train/loss/total"] == pytest.approx(0.5)
    assert values["train/share"] == pytest.approx(1 / 3)  # and not the mean of 0 and 1/2
    assert values["perf/data_wait_s"] == pytest.approx(1.5)
    assert values["perf/samples_per_s"] == pytest.approx(4.0)
    assert values["data/replaced_samples"] == 3
    assert values["train/grad_norm"] == 2


def test_ranks_are_summed_by_one_collective_and_divided_after(tmp_path: Path) -> None:
    assert run_ranks(rank_reads, 2, tmp_path) == [0, 0]


def test_every_phase_has_a_figure() -> None:
    assert {*STEP_PHASES, *PAUSES} == set(get_args(Phase))

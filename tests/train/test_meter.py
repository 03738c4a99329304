"""Means between two log lines."""

import pytest
import torch

from cromss_dist.train.meter import Meter
from cromss_dist.world import World

ALONE = World(0, 1, torch.device("cpu"))


def test_figures_are_means_over_micro_batches() -> None:
    meter = Meter()
    for value, norm in ((1.0, None), (2.0, torch.tensor(3.0)), (6.0, 5.0)):
        meter.add({"total": torch.tensor(value), "kept_s1": torch.tensor(value / 10)}, norm)
    values = meter.read(ALONE, samples_per_batch=4)
    assert values["train/loss/total"] == pytest.approx(3.0)
    assert values["train/kept_s1"] == pytest.approx(0.3)
    assert values["train/grad_norm"] == pytest.approx(4.0)


def test_throughput_and_wait_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = Meter()
    for _ in range(2):
        meter.waits()
        now[0] += 0.25
        meter.works()
        now[0] += 0.75
        meter.add({"total": torch.tensor(1.0)}, None)
    values = meter.read(ALONE, samples_per_batch=8)
    assert values["perf/samples_per_s"] == pytest.approx(8.0)
    assert values["perf/data_wait_s"] == pytest.approx(0.25)
    assert "train/grad_norm" not in values


def test_a_restart_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    meter.add({"total": torch.tensor(5.0)}, 1.0)
    meter.restart()
    meter.add({"total": torch.tensor(1.0)}, None)
    values = meter.read(ALONE, samples_per_batch=1)
    assert values["train/loss/total"] == 1.0
    assert "train/grad_norm" not in values

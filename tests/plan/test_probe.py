"""The probe on this machine, and what it says when a part fails."""

from pathlib import Path

import pytest
import torch

from cromss_dist.errors import ConfigError, TrainingError
from cromss_dist.plan import measure, probe
from cromss_dist.plan.machine import Machine
from cromss_dist.plan.measure import sum_of
from cromss_dist.plan.work import KINDS


@pytest.mark.slow
def test_the_probe_measures_this_machine_and_leaves_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    machine = probe.probe("cpu", tmp_path, 1, told.append)
    assert list(tmp_path.iterdir()) == []
    assert {*KINDS} <= set(machine.rates)
    assert (machine.device, machine.precision, machine.tree) == ("cpu", "fp32", False)
    assert 0.5 < machine.step_factor < 5
    assert machine.read_bytes_per_s > 1e6
    assert len(told) == len(machine.crowding)
    machine.write(tmp_path / "profile.json")
    assert Machine.read(tmp_path / "profile.json") == machine


def test_pixels_are_read_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LOSS_CROPS_PX", (32, 64))
    batch, bytes_per_s = measure._read(tmp_path, pin=False)
    assert bytes_per_s > 0
    lines = measure._measure_pixels(batch, torch.device("cpu"))
    assert {name for name, line in lines.items() if line["fixed_s"] + line["each_s"] > 0} == {"prior", "images", "loss"}
    assert measure._measure_writing(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_costs_nothing_reaches_both_branches() -> None:
    logits = (torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True))
    sum_of(logits).backward()  # type: ignore[no-untyped-call]
    assert all(branch.grad is not None for branch in logits)


def test_a_part_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"alone ended with \[2\], its last words: .*--threads"):
        probe._run("alone", "cpu", tmp_path, "many", 1)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        probe.probe("cuda", tmp_path)

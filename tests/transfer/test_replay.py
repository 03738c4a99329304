"""`cromss replay` of a step of a transfer run."""

import math
from pathlib import Path

import torch
from rich.console import Console

from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.replay import replay, report
from cromss_dist.train.safety.bundle import Bundle, Samples, write_bundle
from cromss_dist.transfer.task import Transfer
from cromss_dist.world import World
from tests.transfer.conftest import MakeTransfer


def test_a_step_of_a_transfer_run_is_computed_again(make_transfer: MakeTransfer, tmp_path: Path) -> None:
    config = make_transfer().with_absolute_paths()
    task, cpu = Transfer.of(config, 1), torch.device("cpu")
    model, loss = task.build_model(), task.loss(World(0, 1, cpu))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with TrainLoader.of(task.train_plan(task.plan), task.reading) as loader:
        example = task.example(next(loader), cpu)
    total = float(loss(model(*example.images.values()), example, 0.0).total.detach())
    bundle = Bundle(
        reason="spike: loss is high",
        step=1,
        samples_seen=0,
        progress_epochs=0.0,
        loss=total,
        grad_norm=1.0,
        weights_of="before",
        precision="fp32",
        device="cpu",
        plan=task.plan,
        datasets=tuple(task.datasets.values()),
        samples=Samples.of(task.train_plan, task.plan, 0),
    )
    folder = write_bundle(tmp_path, bundle, config, weights)
    told, found = replay(folder)
    assert math.isclose(found.loss, total, rel_tol=1e-6)
    assert found.reproduces(told)
    assert not [name for name in found.grad_norms if name.startswith("encoder")]
    report(folder, told, found, Console())

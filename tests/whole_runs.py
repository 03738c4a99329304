"""Whole runs on real ranks that leave, beside what every run leaves, a line for each step: its loss and its samples."""

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

import cromss_dist.pretrain.validation
from cromss_dist.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.parse import CONFIG_FILE, from_dict, write_yaml
from cromss_dist.pretrain.run import pretrain
from cromss_dist.schema import Batch
from cromss_dist.tracking.run.replica import RUN_TAG
from cromss_dist.tracking.run.spool import run_id_of
from cromss_dist.tracking.store import connect
from cromss_dist.train.safety.guard import Guard, Verdict
from cromss_dist.train.step.engine import StepResult
from cromss_dist.world import World
from tests.forkserver import preload
from tests.ranks import Ranks

preload("mlflow.store.tracking.sqlalchemy_store", "mlflow.tracking", "cromss_dist.tracking.panels")


EPOCH_STEPS = 9 / 4  # of nine locations


def small_run(shards: Path, store_uri: str, validate_every: int = 20, save_every: int = 3) -> RunConfig:
    """A run of steps of 4 samples of the synthetic shards, of the smallest networks there are; its length is `of_steps`'."""
    return RunConfig(
        data=DataConfig(shards=str(shards), crop_px=32, val_fraction=0.25, val_seasons=(0,)),
        model=ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8)),
        loss=LossConfig(ramp_epochs=10),
        train=TrainConfig(lr=1e-3, validate_every_epochs=validate_every / EPOCH_STEPS, log_every_steps=1, panel_samples=1),
        engine=EngineConfig(global_batch=4, device="cpu"),
        checkpoint=CheckpointConfig(every_epochs=save_every / EPOCH_STEPS),
        tracking=TrackingConfig(uri=store_uri, register=False),
    )


def of_steps(config: RunConfig, steps: int) -> RunConfig:
    """The same run with another length."""
    return replace(config, train=replace(config.train, epochs=steps / EPOCH_STEPS))


def traced_run(world: World, run_dir: Path, config: dict[str, Any]) -> None:
    """A rank of a run, as a launcher starts it; its panels are blank, for to draw them takes a third of such a run."""
    trace_steps(run_dir, world.rank)
    vars(cromss_dist.pretrain.validation)["draw_panels"] = lambda *_: Figure((1, 1))
    pretrain(from_dict(config, RunConfig), run_dir)


def trace_steps(run_dir: Path, rank: int) -> None:
    """Has this process note each step that it takes."""
    read, settle = TrainLoader.__next__, Guard.settle
    ids: list[tuple[int, int, int]] = []

    def next_batch(self: TrainLoader) -> Batch:
        batch = read(self)
        ids.extend(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), batch.seasons.tolist(), strict=True))
        return batch

    def settle_and_note(self: Guard, verdict: Verdict, result: StepResult, step: int) -> str | None:
        with (run_dir / f"steps-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": verdict.loss, "applied": result.applied, "ids": ids}) + "\n")
        ids.clear()
        return settle(self, verdict, result, step)

    TrainLoader.__next__ = next_batch  # type: ignore[method-assign]
    Guard.settle = settle_and_note  # type: ignore[method-assign]


@dataclass(frozen=True)
class Trace:
    """What a run computed; of a step that was computed more than once, the last time."""

    losses: dict[int, float]
    ids: dict[int, list[tuple[int, ...]]]  # of the global batch, in the order of ranks
    num_computed: int  # steps, those again included


def trace_of(run_dir: Path) -> Trace:
    """Reads what `trace_steps` noted, of all ranks of all attempts."""
    losses: dict[int, float] = {}
    ids: dict[int, dict[int, list[tuple[int, ...]]]] = {}
    num_computed = 0
    for path in sorted(run_dir.glob("steps-*.jsonl")):
        rank = int(path.stem.removeprefix("steps-"))
        for line in path.read_text().splitlines():
            note = json.loads(line)
            num_computed += rank == 0
            if rank == 0:
                losses[note["step"]] = note["loss"]
            ids.setdefault(note["step"], {})[rank] = [tuple(place) for place in note["ids"]]
    whole = {step: [place for rank in sorted(of) for place in of[rank]] for step, of in ids.items()}
    return Trace(losses, whole, num_computed)


def mlflow_run(run_dir: Path, uri: str | None) -> Any:
    """The one run in a store that is of a run's folder."""
    client = connect(str(uri))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{run_id_of(run_dir)}'")
    return run


def mlflow_steps(run_dir: Path, uri: str | None) -> list[int]:
    """The steps whose loss a store has, as often as it has it."""
    run_id = mlflow_run(run_dir, uri).info.run_id
    return [point.step for point in connect(str(uri)).get_metric_history(run_id, "train/loss/total")]


def start_folder(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Makes the folder of a run; returns what `traced_run` takes."""
    folder.mkdir(parents=True)
    write_yaml(config, folder / CONFIG_FILE)
    return config.to_dict()


def run_until(world: World, run_dir: Path, config: dict[str, Any], steps: int) -> None:
    """A rank of a run that is asked to stop, on rank 0 alone, when it computes step `steps`."""
    judge = Guard.judge
    computed = len(trace_of(run_dir).losses)

    def judge_and_stop(self: Guard, loss: Tensor, stop: bool) -> Verdict:
        nonlocal computed
        computed += 1
        return judge(self, loss, stop or (world.is_main and computed == steps))

    Guard.judge = judge_and_stop  # type: ignore[method-assign]
    traced_run(world, run_dir, config)


def run_and_kill(run_dir: Path, config: dict[str, Any], world: int, steps: int, draws: random.Random) -> bool:
    """Runs until about `steps` more steps were computed, then kills a random rank at a random moment.

    Returns:
        Whether it ran that long.
    """
    before = trace_of(run_dir).num_computed
    with Ranks(traced_run, world, run_dir, config) as ranks:
        deadline = time.monotonic() + 100
        while trace_of(run_dir).num_computed < before + steps:
            assert time.monotonic() < deadline, "the run does not get on"
            if not ranks.running:
                return False
            time.sleep(0.02)
        time.sleep(draws.uniform(0, 0.3))
        ranks.kill(draws.randrange(world))
    return True

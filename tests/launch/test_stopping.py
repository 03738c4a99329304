"""Runs that are asked to stop, at any moment (T5 and T6 of the catalogue), on real ranks and as a user would."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.config import CheckpointConfig, DataConfig, EngineConfig, ModelConfig, RunConfig, TrackingConfig, TrainConfig
from cromss_dist.errors import PreemptedError
from cromss_dist.tracking.run.spool import read_events
from cromss_dist.train.checkpoint.store import Checkpoints
from cromss_dist.train.safety.guard import Guard
from cromss_dist.train.safety.hang import HangWatch
from cromss_dist.world import World
from tests.launch.conftest import ROOT, SMALL, environment
from tests.ranks import run_ranks
from tests.whole_runs import mlflow_run, start_folder, trace_of, traced_run

STEPS = 12


@pytest.fixture
def config(synthetic_shards: Path, store_uri: str) -> RunConfig:
    """A run of 12 steps of 4 of 9 locations, saved and validated every fifth, of the smallest networks there are."""
    epoch_steps = 9 / 4
    return RunConfig(
        data=DataConfig(shards=str(synthetic_shards), crop_px=32, val_fraction=0.25, val_seasons=(0,)),
        model=ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8)),
        train=TrainConfig(epochs=STEPS / epoch_steps, validate_every_epochs=5 / epoch_steps, log_every_steps=1, panel_samples=1),
        engine=EngineConfig(global_batch=4, device="cpu"),
        checkpoint=CheckpointConfig(every_epochs=5 / epoch_steps),
        tracking=TrackingConfig(uri=store_uri, register=False),
    )


def signalled(place: str, count: int, rank: int, times: int) -> None:
    """Has this process sent SIGTERM when it is at a place for the `count`-th time, in the thread that trains."""
    visits = 0

    def visit() -> None:
        nonlocal visits
        visits += 1
        if visits == count:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    def before(owner: type, name: str, here: Callable[..., bool]) -> None:
        function = getattr(owner, name)

        def visiting(self: Any, *arguments: Any) -> Any:
            if here(*arguments):
                visit()
            return function(self, *arguments)

        setattr(owner, name, visiting)

    match place:
        case "step":
            before(Guard, "judge", lambda *_: True)
        case "save":
            before(Checkpoints, "save", lambda *_: True)
        case "validation":
            before(HangWatch, "beat", lambda where: "validation" in where or "validating" in where)


def run_and_signal(world: World, folder: Path, config: dict[str, Any], place: str, count: int, rank: int, times: int) -> None:
    if world.rank == rank:
        signalled(place, count, rank, times)
    traced_run(world, folder, config)


def test_a_run_that_is_asked_to_stop_anywhere_loses_no_step_and_ends_as_one_that_was_not(
    config: RunConfig, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    content = start_folder(whole, config)
    assert run_ranks(traced_run, 2, whole, content) == [0, 0]
    folder = tmp_path / "stopped"
    start_folder(folder, config)
    draws = random.Random(0)
    for place, count, rank, times in (
        ("validation", 1, 1, 1),  # before the first step
        ("step", draws.randint(1, 3), 0, 1),
        ("save", 1, 0, 1),
        ("step", 1, 1, 2),
        ("validation", 1, 0, 2),
    ):
        assert run_ranks(run_and_signal, 2, folder, content, place, count, rank, times) == [PreemptedError.exit_code] * 2, place
        assert not list((folder / "checkpoints").glob(".*")), "nothing half-written"
    assert run_ranks(traced_run, 2, folder, content) == [0, 0]
    trace = trace_of(folder)
    assert trace.num_computed == STEPS
    assert trace.losses == trace_of(whole).losses
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert mlflow_run(folder, config.tracking_uri).info.status == "FINISHED"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command in a session of its own; none runs on after the test."""
    with ExitStack() as stack:

        def run(*command: str) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)  # first; Ray's processes end with it
            return process

        yield run


def wait_for_steps(output: Path, steps: int, process: "subprocess.Popen[str]") -> Path:
    """The folder of the run once it has logged so many steps more than it had."""

    def logged() -> int:
        return sum(event["event"] == "progress" for path in output.glob("*/events.jsonl") for event in read_events(path.parent))

    before = logged()
    while logged() < before + steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (events,) = output.glob("*/events.jsonl")
    return events.parent


def arguments(output: Path, shards: Path) -> list[str]:
    return [*SMALL, "--output", str(output), "--data.shards", str(shards), "--tracking.register", "false"]


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("-m", "cromss_dist.cli", "pretrain"), ("--launch.workers", "1")),
        pytest.param(("launch/pretrain.py",), ("--launch.workers", "2"), marks=pytest.mark.slow),
    ],
    ids=["in process", "Ray"],
)
def test_a_command_stops_with_75_says_how_it_goes_on_and_does(
    start: Start, synthetic_shards: Path, tmp_path: Path, command: tuple[str, ...], extra: tuple[str, ...]
) -> None:
    process = start(*command, *arguments(tmp_path / "my runs", synthetic_shards), *extra, "--train.epochs", "100000")
    run_dir = wait_for_steps(tmp_path / "my runs", 2, process)
    os.killpg(process.pid, signal.SIGTERM)  # all its processes, as Slurm does
    out, err = process.communicate(timeout=120)
    assert process.returncode == PreemptedError.exit_code, out + err
    assert "Traceback" not in out + err
    (last,) = err.strip().splitlines()
    told = re.search(r"It goes on with: (?:cromss pretrain|\S+ \S*launch/pretrain.py) (--resume .*)", last)
    assert told is not None, last
    resume = shlex.split(told[1])
    assert resume == ["--resume", str(run_dir)]
    steps = [event["step"] for event in read_events(run_dir) if event["event"] == "progress"]
    epochs = (steps[-1] + 3) / 2  # demo.yaml: two steps an epoch, with nine locations
    process = start(*command, *resume, "--train.epochs", str(epochs))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    (resumed,) = [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"]
    assert resumed >= steps[-1]
    assert (run_dir / "summary.json").exists()


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_starts_again_by_itself_and_ends(
    start: Start, synthetic_shards: Path, tmp_path: Path
) -> None:
    process = start("launch/pretrain.py", *arguments(tmp_path, synthetic_shards), "--checkpoint.every_epochs", "1")
    run_dir = wait_for_steps(tmp_path, 6, process)
    os.kill(worker_of(process.pid), signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "The workers start again" in out
    assert [event["event"] for event in read_events(run_dir)].count("resumed") == 1


def worker_of(session: int) -> int:
    """The process id of one of Ray's ranks."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = int((path / "stat").read_text().rsplit(")", 1)[1].split()[3]) == session
            if ours and b"RayTrainWorker" in (path / "cmdline").read_bytes():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError("no rank runs")

"""Conducts a run on this rank, whatever its task: joins the others, goes on from a checkpoint, trains, ends well or says why not.

Layer 3. A task's composition root gives it the task; every rank calls it, whoever started it.
"""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from rich.console import Console

from cromss_dist.config import BaseRunConfig
from cromss_dist.errors import ConfigError, PackageError, RegistryError
from cromss_dist.parse import CONFIG_FILE, Config, ParsedRun
from cromss_dist.tracking.revision import git_revision
from cromss_dist.tracking.run.spool import tell
from cromss_dist.train.checkpoint.store import Checkpoints
from cromss_dist.train.figures.profile import Profile
from cromss_dist.train.loop import Safeguards, Training
from cromss_dist.train.run.continuation import changes_of
from cromss_dist.train.run.folder import RunSummary, mark_as_begun, new_run_dir, read_summary, working_in
from cromss_dist.train.run.record import Record
from cromss_dist.train.run.watch import watching
from cromss_dist.train.safety.hang import HangWatch
from cromss_dist.train.safety.stop import StopRequest
from cromss_dist.train.step.engine import Engine
from cromss_dist.train.task import Task
from cromss_dist.world import World, device_name, join

CHECKPOINTS = "checkpoints"


class Recorded(Protocol):
    """What a record tells of a run from its start."""

    @property
    def config(self) -> BaseRunConfig:
        """The whole run."""

    @property
    def datasets(self) -> Mapping[str, str]:
        """Location and digest of each dataset that is learnt from."""


def conduct(config: Config, task_of: Callable[[Config, int], Task], run_dir: Path, profile: bool = False) -> RunSummary | None:
    """Runs this rank's part of a run, from the newest checkpoint in its folder if there is one; a collective call.

    Args:
        config: The whole run, equal on all ranks.
        task_of: Opens what the config names, for a number of ranks; starts nothing.
        run_dir: Folder of the run, seen by all ranks.
        profile: Whether a few steps are traced.

    Returns:
        The summary on rank 0, None elsewhere.

    Raises:
        CromssError: whatever the caller can mend; see errors.py.
    """
    torch.set_num_threads(config.launch.cpus_per_worker)
    world = join(config.engine.device)
    faults, checkpoint = config.faults, config.checkpoint
    with (
        HangWatch(run_dir, world.rank, faults.hang_timeout_s) as hang,
        StopRequest(run_dir) as stop,
        Checkpoints(run_dir / CHECKPOINTS, world, checkpoint.keep, checkpoint.on_failure) as checkpoints,
    ):
        hang.beat("opening the data")
        task = task_of(config, world.size)
        hang.beat("verifying checkpoints")
        saved = checkpoints.newest()
        changes = changes_of(saved.state["config"], config) if saved else []
        summary = read_summary(run_dir) if world.is_main else None
        if world.broadcast_json(summary is not None and summary.samples >= task.timeline.total_samples):
            if world.is_main:
                tell(
                    run_dir,
                    "the run has come to its end already; a larger --train.epochs makes it longer, --fresh starts it over",
                )
            return summary  # and the encoders are not registered once more
        if world.is_main:
            mark_as_begun(run_dir, config)  # not before: checkpoints of another config refuse this one
        hang.beat("building the networks")
        engine = Engine(task.build_model(), config.engine, config.train, task.plan, world)
        try:
            with recording(task, world, engine.precision, run_dir, saved.step if saved else 0) as record:
                if record:
                    record.event("start", total_samples=task.timeline.total_samples)
                safeguards = Safeguards(checkpoints, stop, hang)
                tracer = Profile(run_dir if profile else None, world.rank)
                training = Training(task, world, engine, safeguards, tracer, record)
                if saved:
                    training.resume(saved)
                    if record:
                        record.resumed(saved.step, training.samples, str(saved.folder), changes)
                training.run()
                return task.finish(training.trained)
        finally:
            engine.close()


def conduct_here(
    parsed: ParsedRun[Config],
    check: Callable[[Config, int], object],
    run: Callable[[Config, Path, bool], RunSummary | None],
    prog: str,
    console: Console,
) -> RunSummary:
    """Runs with this process as the only worker, and shows the progress.

    Args:
        parsed: The command line.
        check: Finds out, for a number of ranks, what the run would fail at, before it has a folder.
        run: What a rank does, in the run's folder; the last argument is whether a few steps are traced.
        prog: What `--resume` is an argument of: `cromss pretrain`.
        console: Where progress goes.

    Raises:
        ConfigError: more workers are asked for, by the config or by a launcher that started several processes.
        CromssError: see errors.py.
    """
    config = parsed.config
    if config.launch.workers not in (None, 1) or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"One process cannot be launch.workers={config.launch.workers} (WORLD_SIZE={os.environ.get('WORLD_SIZE', 'unset')}); "
            "set launch.workers to 1 and unset WORLD_SIZE. launch/pretrain.py gives a pretraining several workers, "
            "launch/transfer.py runs several transfers at a time."
        )
    config = config.with_absolute_paths()
    check(config, 1)
    run_dir = parsed.resume or new_run_dir(config)
    with working_in(run_dir, prog, parsed.fresh), watching(run_dir, console):
        summary = run(config, run_dir, parsed.profile)
    assert summary is not None, "a run of one process is rank 0"
    return summary


def report(summary: RunSummary, console: Console) -> None:
    """Prints what a finished run left, and how to look at it.

    Raises:
        PackageError, RegistryError: the store has all of it, and cannot have its encoders in the registry.
    """
    lines = [f"{summary.samples} samples at {summary.samples_per_s:.1f} samples/s"] if summary.samples_per_s else []
    if summary.run_id is None:
        lines.append(f"MLflow has not all of it yet; send the rest with: cromss track sync {shlex.quote(summary.run_dir)}")
    else:
        lines.append(f"mlflow ui --backend-store-uri {shlex.quote(str(summary.tracking_uri))}")
    for line in lines:
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    for model, told in summary.refused.items():
        kind, _, reason = told.partition(": ")
        raise (PackageError if kind == PackageError.__name__ else RegistryError)(
            f"{model} is not registered: {reason} The run is whole in its folder; when that is mended: "
            f"cromss track sync {shlex.quote(summary.run_dir)}"
        )


@contextmanager
def recording(task: Recorded, world: World, precision: str, run_dir: Path, step: int) -> Iterator[Record | None]:
    """On rank 0 the record of a run that goes on after a step; it ends with the block.

    No rank goes on before there is one, so that every error of theirs is of a run that is recorded.
    """
    if not world.is_main:
        world.barrier()
        yield None
        return
    config = task.config
    tags = {
        "config_digest": config.digest,
        "git_revision": git_revision(),
        "run_dir": str(run_dir),
        "world_size": str(world.size),
        "device": device_name(world.device),
        "precision": precision,
    }
    with Record(run_dir, config.tracking_uri) as record:
        record.begin(run_dir.name, config.tracking.experiment, tags, step)
        record_task(record, task)
        record.tell(f"run folder {run_dir}")
        record.tell(f"{world.size} x {world.device.type}, {precision}, run {record.run_id}")
        world.barrier()
        yield record


def record_task(record: Record, task: Recorded) -> None:
    """Records the config, whose file is in the run's folder, and the datasets."""
    record.params(task.config.params())
    record.artifact(CONFIG_FILE)
    names = [PurePosixPath(location).name for location in task.datasets]
    for number, (name, (location, digest)) in enumerate(zip(names, task.datasets.items(), strict=True)):
        record.dataset(name if names.count(name) == 1 else f"{name}-{number}", digest, location)

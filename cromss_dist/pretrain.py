"""Pretraining: the composition root that every rank runs, whoever started it.

Layer 4.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from rich.console import Console

from cromss_dist.config import RunConfig
from cromss_dist.errors import ConfigError, PackageError, RegistryError
from cromss_dist.export import export
from cromss_dist.losses import CromssLoss
from cromss_dist.parse import CONFIG_FILE, ParsedRun
from cromss_dist.tracking.revision import git_revision
from cromss_dist.tracking.run.spool import tell
from cromss_dist.train.checkpoint.store import Checkpoints
from cromss_dist.train.figures.profile import Profile
from cromss_dist.train.loop import Pretraining, Safeguards
from cromss_dist.train.preflight import Preflight
from cromss_dist.train.run.continuation import changes_of
from cromss_dist.train.run.folder import RunSummary, mark_as_begun, new_run_dir, read_summary, working_in
from cromss_dist.train.run.record import Record
from cromss_dist.train.run.watch import watching
from cromss_dist.train.safety.hang import HangWatch
from cromss_dist.train.safety.stop import StopRequest
from cromss_dist.train.step.engine import Engine
from cromss_dist.world import World, device_name, join

CHECKPOINTS = "checkpoints"


def pretrain(config: RunConfig, run_dir: Path, profile: bool = False) -> RunSummary | None:
    """Runs this rank's part of a pretraining, from the newest checkpoint in its folder if there is one; a collective call.

    Args:
        config: The whole run, equal on all ranks.
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
        preflight = Preflight.of(config, world.size)
        hang.beat("verifying checkpoints")
        saved = checkpoints.newest()
        changes = changes_of(saved.state["config"], config) if saved else []
        summary = read_summary(run_dir) if world.is_main else None
        if world.broadcast_json(summary is not None and summary.samples >= preflight.timeline.total_samples):
            if world.is_main:
                tell(
                    run_dir,
                    "the run has come to its end already; a larger --train.epochs makes it longer, --fresh starts it over",
                )
            return summary  # and the encoders are not registered once more
        if world.is_main:
            mark_as_begun(run_dir, config)  # not before: checkpoints of another config refuse this one
        hang.beat("building the networks")
        model = preflight.build_model()
        engine = Engine(model, config.engine, config.train, preflight.plan, world)
        try:
            loss = CromssLoss(config.loss, reduce_sum=world.reduce_sum if world.size > 1 else None, world_size=world.size)
            with _recording(preflight, world, engine, run_dir, saved.step if saved else 0) as record:
                safeguards = Safeguards(checkpoints, stop, hang)
                trainer = Pretraining(
                    preflight, world, engine, loss, safeguards, Profile(run_dir if profile else None, world.rank), record
                )
                if saved:
                    trainer.resume(saved)
                    if record:
                        record.resumed(saved.step, trainer.samples, str(saved.folder), changes)
                trainer.run()
                hang.beat("exporting the encoders")
                weights = engine.state_dict()
                if record is None:
                    return None
                return export(weights, model, preflight, trainer, run_dir, record)
        finally:
            engine.close()


def run_in_process(parsed: ParsedRun, console: Console) -> RunSummary:
    """Runs a pretraining with this process as its only worker, and shows its progress.

    Raises:
        ConfigError: more workers are asked for, by the config or by a launcher that started several processes.
        CromssError: see errors.py.
    """
    config = parsed.config
    if config.launch.workers not in (None, 1) or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"One process cannot be launch.workers={config.launch.workers} (WORLD_SIZE={os.environ.get('WORLD_SIZE', 'unset')}); "
            "set launch.workers to 1 and unset WORLD_SIZE, or start the run with launch/pretrain.py."
        )
    config = config.with_absolute_paths()
    Preflight.of(config, world_size=1)
    run_dir = parsed.resume or new_run_dir(config)
    with working_in(run_dir, "cromss pretrain", parsed.fresh), watching(run_dir, console):
        summary = pretrain(config, run_dir, parsed.profile)
    assert summary is not None, "a run of one process is rank 0"
    return summary


def report(summary: RunSummary, console: Console) -> None:
    """Prints what a finished run left, and how to look at it.

    Raises:
        PackageError, RegistryError: the store has all of it, and cannot have its encoders in the registry.
    """
    lines = [f"{summary.samples} samples at {summary.samples_per_s:.1f} samples/s"]
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
def _recording(preflight: Preflight, world: World, engine: Engine, run_dir: Path, step: int) -> Iterator[Record | None]:
    """On rank 0 the record of a run that goes on after a step; it ends with the block.

    No rank goes on before there is one, so that every error of theirs is of a run that is recorded.
    """
    if not world.is_main:
        world.barrier()
        yield None
        return
    config = preflight.config
    tags = {
        "config_digest": config.digest,
        "git_revision": git_revision(),
        "run_dir": str(run_dir),
        "world_size": str(world.size),
        "device": device_name(world.device),
        "precision": engine.precision,
    }
    with Record(run_dir, config.tracking_uri) as record:
        record.begin(run_dir.name, config.tracking.experiment, tags, step)
        record_config(record, config, [source.dataset.digest for source in preflight.data.train])
        record.tell(f"run folder {run_dir}")
        record.tell(f"{world.size} x {world.device.type}, {engine.precision}, run {record.run_id}")
        record.event("start", total_samples=preflight.timeline.total_samples)
        world.barrier()
        yield record


def record_config(record: Record, config: RunConfig, digests: Sequence[str]) -> None:
    """Records the config, whose file is in the run's folder, and the datasets, of the digests given."""
    params = config.to_dict()
    if isinstance(config.data.shards, dict):  # MLflow takes few signs in the name of a parameter, and a place may have any
        params["data"]["shards"] = list(config.data.shards.items())
    record.params(params)
    record.artifact(CONFIG_FILE)
    names = [PurePosixPath(location).name for location in config.data.weights]
    for number, (name, location, digest) in enumerate(zip(names, config.data.weights, digests, strict=True)):
        record.dataset(name if names.count(name) == 1 else f"{name}-{number}", digest, location)

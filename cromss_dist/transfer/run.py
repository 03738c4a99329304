"""Transfer: the composition root that every rank runs, whoever started it.

Layer 4.
"""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.errors import ConfigError
from cromss_dist.parse import CONFIG_FILE, ParsedRun, parse_run_of
from cromss_dist.tracking.run.spool import tell
from cromss_dist.train.run.conduct import conduct, conduct_here, recording
from cromss_dist.train.run.continuation import changes_of
from cromss_dist.train.run.folder import RunSummary, mark_as_begun, read_summary
from cromss_dist.transfer.deliver import deliver
from cromss_dist.transfer.network import pin_encoders
from cromss_dist.transfer.probe import look
from cromss_dist.transfer.task import Transfer
from cromss_dist.world import join


def transfer(config: TransferConfig, run_dir: Path, profile: bool = False) -> RunSummary | None:
    """Runs this rank's part of a transfer run, from the newest checkpoint in its folder if there is one; a collective call.

    Args:
        config: The whole run, equal on all ranks; its references are pinned (`network.pin_encoders`).
        run_dir: Folder of the run, seen by all ranks.
        profile: Whether a few steps are traced.

    Returns:
        The summary on rank 0, None elsewhere; the result is in the folder (`results.read_result`).

    Raises:
        CromssError: whatever the caller can mend; see errors.py.
    """
    _check_mode(config, run_dir)
    if config.quick_look:
        return quick_look(config, run_dir)
    return conduct(config, Transfer.of, run_dir, profile)


def _check_mode(config: TransferConfig, run_dir: Path) -> None:
    """Raises CheckpointError where a quick look is, or was, another run: it leaves no checkpoint that would tell."""
    stored = run_dir / CONFIG_FILE
    if stored.is_file():
        began = parse_run_of(TransferConfig, ["--config", str(stored)]).config
        if began.quick_look or config.quick_look:
            changes_of(began.to_dict(), config)


def quick_look(config: TransferConfig, run_dir: Path) -> RunSummary:
    """A run in mode 'linear' or 'knn', which is too short to be saved half-way; see `transfer.probe`.

    Args:
        config: As of `transfer`.
        run_dir: Folder of the run.

    Raises:
        ConfigError: there are several ranks.
        CromssError: whatever the caller can mend; see errors.py.
    """
    torch.set_num_threads(config.launch.cpus_per_worker)
    world = join(config.engine.device)
    if world.size > 1:
        raise ConfigError(f"mode={config.mode!r} is for one worker, and there are {world.size}; set launch.workers to 1.")
    if (summary := read_summary(run_dir)) is not None:
        tell(run_dir, "the run has come to its end already; --fresh starts it over")
        return summary
    task = Transfer.of(config, world.size)
    mark_as_begun(run_dir, config)
    with recording(task, world, "fp32", run_dir, 0) as record:
        assert record is not None, "a run of one process is rank 0"
        found = look(task, world, record.tell)
        result = task.result(found.tiles, run_dir, steps=0, samples=found.num_pixels)
        return deliver(config, result, found.tiles, found.panels, 0.0, record)


def run_in_process(parsed: ParsedRun[TransferConfig], console: Console) -> RunSummary:
    """Runs a transfer with this process as its only worker, and shows its progress.

    Raises:
        ConfigError: more workers are asked for, by the config or by a launcher that started several processes.
        CromssError: see errors.py.
    """
    pinned = replace(parsed, config=pin_encoders(parsed.config.with_absolute_paths()))
    return conduct_here(pinned, Transfer.of, transfer, "cromss transfer", console)

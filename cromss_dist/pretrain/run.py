"""Pretraining: the composition root that every rank runs, whoever started it.

Layer 4.
"""

from pathlib import Path

from rich.console import Console

from cromss_dist.config import RunConfig
from cromss_dist.parse import ParsedRun
from cromss_dist.pretrain.task import Pretraining
from cromss_dist.train.run.conduct import conduct, conduct_here
from cromss_dist.train.run.folder import RunSummary


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
    return conduct(config, Pretraining.of, run_dir, profile)


def run_in_process(parsed: ParsedRun[RunConfig], console: Console) -> RunSummary:
    """Runs a pretraining with this process as its only worker, and shows its progress.

    Raises:
        ConfigError: more workers are asked for, by the config or by a launcher that started several processes.
        CromssError: see errors.py.
    """
    return conduct_here(parsed, Pretraining.of, pretrain, "cromss pretrain", console)

"""Transfer: the composition root that every rank runs, whoever started it.

Layer 4.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.parse import ParsedRun
from cromss_dist.train.run.conduct import conduct, conduct_here
from cromss_dist.train.run.folder import RunSummary
from cromss_dist.transfer.network import pin_encoders
from cromss_dist.transfer.task import Transfer


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
    return conduct(config, Transfer.of, run_dir, profile)


def run_in_process(parsed: ParsedRun[TransferConfig], console: Console) -> RunSummary:
    """Runs a transfer with this process as its only worker, and shows its progress.

    Raises:
        ConfigError: more workers are asked for, by the config or by a launcher that started several processes.
        CromssError: see errors.py.
    """
    pinned = replace(parsed, config=pin_encoders(parsed.config.with_absolute_paths()))
    return conduct_here(pinned, Transfer.of, "cromss transfer", console)

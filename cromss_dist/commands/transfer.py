"""`cromss transfer`: encoders under a new decoder on a downstream set, in this process.

Layer 4. The config has its own parser; here a short form of it is written out: `--encoder REF` for the encoder's modality, and
`--task NAME` for the config of that name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cromss_dist.errors import ConfigError

TASKS = Path("configs") / "transfer"
_DESCRIPTION = """Trains a decoder on frozen or fine-tuned encoders, scores every pixel of the test tiles, and leaves
scores.json and tiles.npz in the run's folder; `cromss compare` reads them. In this process, with one GPU if there is one.
Short form: --encoder REF stands for --encoder.s1 REF or --encoder.s2 REF, as its card says (twice for both); --task NAME without
--config stands for --config configs/transfer/NAME.yaml."""


def add_transfer(commands: Any) -> None:
    """Adds the command to `cromss`."""
    transfer = commands.add_parser("transfer", help="train and score encoders on a downstream set", add_help=False)
    transfer.set_defaults(run=_transfer, takes_rest=True)  # --help is the config's parser's


def _transfer(options: argparse.Namespace) -> None:
    from rich.console import Console

    from cromss_dist.config.transfer import TransferConfig
    from cromss_dist.parse import parse_run_of
    from cromss_dist.train.run.conduct import report
    from cromss_dist.transfer.network import pin_encoders
    from cromss_dist.transfer.run import run_in_process
    from cromss_dist.transfer.task import Transfer

    parsed = parse_run_of(TransferConfig, written_out(options.rest), prog="cromss transfer", description=_DESCRIPTION)
    if parsed.dry_run:
        print(Transfer.of(pin_encoders(parsed.config.with_absolute_paths()), world_size=1).describe())
        return
    console = Console()
    report(run_in_process(parsed, console), console)


def written_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with the short form as the config's keys.

    Raises:
        ConfigError: two encoders are of one modality; there is no config of the task's name.
        PackageError, RegistryError: an encoder cannot be found.
    """
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    ahead.add_argument("--encoder", action="append", default=[])
    seen = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--task", "--config", "--resume", "--tracking.uri"):
        seen.add_argument(name, dest=name.removeprefix("--"))
    try:
        short, rest = ahead.parse_known_args(arguments)
        given = vars(seen.parse_known_args(rest)[0])
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; give it a value.") from error
    if given["task"] and not given["config"] and not given["resume"]:
        given["config"] = str(_config_of(given["task"]))
        rest = ["--config", given["config"], *rest]
    keys: dict[str, str] = {}
    for ref in short.encoder:
        key = f"--encoder.{_modality_of(ref, given['tracking.uri'] or _uri_in(given['config']))}"
        if key in keys:
            raise ConfigError(f"--encoder {ref} and --encoder {keys[key]} are both for {key[-2:]}; give one encoder a modality.")
        keys[key] = ref
    return [*rest, *(part for item in keys.items() for part in item)]


def _config_of(task: str) -> Path:
    known = {path.stem: path for path in TASKS.glob("*.yaml")}
    if task in known:
        return known[task]
    told = ", ".join(sorted(known)) or "none"
    raise ConfigError(
        f"--task {task} names no config: {TASKS / task}.yaml is not there (in {TASKS}: {told}). Give one of these, or your own "
        "file with --config FILE."
    )


def _uri_in(config: str | None) -> str | None:
    """The store that a config names; what is wrong with the file is told by the config's parser."""
    try:
        uri = yaml.safe_load(Path(config).read_text())["tracking"]["uri"] if config else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):
        return None
    return uri if isinstance(uri, str) else None


def _modality_of(ref: str, uri: str | None) -> str:
    from cromss_dist.config.operation import OFFLINE
    from cromss_dist.encoders.load import local_package
    from cromss_dist.tracking.package.folder import read_package
    from cromss_dist.tracking.registry.cache import cached_package

    folder = local_package(ref) or cached_package(ref, tracking_uri=None if uri == OFFLINE else uri).folder
    return read_package(folder).card.modality

"""Command line and YAML to the config of a run.

Layer 1. jsonargparse does the work (types, YAML, dotted overrides, `--print_config`, `--help` from the docstrings);
here its errors become a ConfigError that names the nearest valid key.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from cromss_dist.cluster import CLUSTER_FILE, ClusterConfig
from cromss_dist.config import BaseRunConfig, RunConfig
from cromss_dist.config.transfer import TransferConfig
from cromss_dist.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound=BaseRunConfig)
Schema = TypeVar("Schema", bound="DataclassInstance")

CONFIG_FILE = "config.yaml"  # in the run's folder
# Beside the config's keys:
_FLAGS = ("config", "dry-run", "resume", "fresh", "profile", "print_config")
_CLUSTER_FLAGS = ("cluster", "detach", "allow-insecure")
_KINDS: dict[str, type] = {"pretraining": RunConfig, "transfer run": TransferConfig}


@dataclass(frozen=True)
class ParsedRun(Generic[Schema]):
    """What a launcher's command line says."""

    config: Schema
    dry_run: bool = False
    resume: Path | None = None  # absolute folder of the run that goes on; None starts a new one
    fresh: bool = False  # whether it starts over
    profile: bool = False  # whether a few steps are traced
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    detach: bool = False  # whether the command ends when a job is submitted
    allow_insecure: bool = False  # whether a cluster is joined that lets anyone in


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of the config, groups included."""
    keys = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        key = prefix + item.name
        keys.append(key)
        if is_dataclass(hints[item.name]):
            keys += known_keys(hints[item.name], key + ".")
    return keys


def parse_run(
    argv: Sequence[str] | None = None, prog: str | None = None, description: str | None = None, clusters: bool = False
) -> ParsedRun[RunConfig]:
    """Parses the arguments of a pretraining; see `parse_run_of`."""
    return parse_run_of(RunConfig, argv, prog, description, clusters)


def parse_run_of(
    schema: type[Schema],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    clusters: bool = False,
) -> ParsedRun[Schema]:
    """Parses a launcher's arguments; `argv` defaults to `sys.argv[1:]`.

    With `--resume RUN_DIR` the run's own config, and cluster, take the place of the defaults, wherever the flag stands. A folder
    that only a cluster sees cannot be read here: the run's config has to be given again.

    Args:
        schema: The config of that kind of run.
        argv: Without the program's name.
        prog: Of the help.
        description: Of the help.
        clusters: Whether the launcher knows other machines than this one: `--cluster`, `--detach`, `--allow-insecure`.

    Raises:
        ConfigError: unknown key, wrong type or value, unreadable YAML, a folder to go on in that is not a run's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    resume = _run_to_resume(arguments)
    here = resume is not None and (resume / CONFIG_FILE).is_file()
    parser = _parser(prog, description)
    parser.add_argument(
        "--config", action="config", help="YAML that states differences from the defaults; may be given more than once."
    )
    parser.add_argument("--dry-run", action="store_true", help="Print config, batch arithmetic and parameter counts, and exit.")
    parser.add_argument("--resume", metavar="RUN_DIR", help="Goes on with a run, from its newest checkpoint and with its config.")
    parser.add_argument("--fresh", action="store_true", help="With --resume: sets aside what the run has left and starts over.")
    parser.add_argument("--profile", action="store_true", help="Writes a trace of a few steps into the run's folder.")
    parser.add_class_arguments(schema, as_group=False)
    ahead = [f"--config={resume / CONFIG_FILE}"] if resume and here else []
    if clusters:
        parser.add_argument("--detach", action="store_true", help="Ends when the job is submitted, and does not follow it.")
        parser.add_argument(
            "--allow-insecure", action="store_true", help="Joins a Ray cluster that asks for no token: anyone who reaches it can."
        )
        parser.add_class_arguments(ClusterConfig, "cluster")
        if resume and (resume / CLUSTER_FILE).is_file():
            ahead.append(f"--cluster={resume / CLUSTER_FILE}")
    try:
        namespace = parser.parse_args([*ahead, *arguments])
        config = _run_config(schema, parser, namespace)
        cluster = parser.instantiate(namespace).cluster if clusters else ClusterConfig()
    except UnicodeDecodeError as error:
        given = [argument for argument in arguments if "config" in argument or Path(argument).is_file()]
        raise ConfigError(
            f"A config is no YAML, as it is no text of UTF-8: {error}. Look at the files of {' '.join(given)}."
        ) from error
    except (ArgumentError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(_explain(str(error), schema, clusters)) from error
    if resume and not here:
        if not cluster.elsewhere:
            raise ConfigError(
                f"--resume={resume} is no folder of a run: it has no {CONFIG_FILE}. Give one that a run was started in."
            )
        if not namespace.config:
            raise ConfigError(
                f"--resume={resume} is not seen from this machine, so that its config has to be given, too: add --config and all "
                f"that the run was started with, or a copy of its {CONFIG_FILE}."
            )
    if namespace.fresh and not resume:
        raise ConfigError("--fresh=true is allowed only with --resume RUN_DIR; a new run has no checkpoints, so leave it out.")
    return ParsedRun(
        config,
        bool(namespace.dry_run),
        resume,
        bool(namespace.fresh),
        bool(namespace.profile),
        cluster,
        bool(clusters and namespace.detach),
        bool(clusters and namespace.allow_insecure),
    )


def _run_to_resume(arguments: list[str]) -> Path | None:
    """The folder after `--resume`, found ahead of the rest since its config comes before every other."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    ahead.add_argument("--resume")
    try:
        found = ahead.parse_known_args(arguments)[0].resume
    except argparse.ArgumentError as error:
        raise ConfigError("--resume needs the folder of a run: --resume runs/pretrain-20260101-120000.") from error
    if found is None:
        return None
    return Path(found).expanduser().absolute()


def write_yaml(config: BaseRunConfig | ClusterConfig, path: Path) -> None:
    """Writes the resolved config, so that `--config PATH` or `--cluster PATH` repeats it."""
    path.write_text(to_yaml(config))


def to_yaml(config: BaseRunConfig | ClusterConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


def from_dict(values: dict[str, Any], schema: type[Schema]) -> Schema:
    """The config of a resolved dictionary, with every check of the command line.

    Raises:
        ConfigError: as for `parse_run`.
    """
    parser = _parser()
    parser.add_class_arguments(schema, as_group=False)
    try:
        return _run_config(schema, parser, parser.parse_object(values))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_explain(str(error), schema)) from error


def _parser(prog: str | None = None, description: str | None = None) -> ArgumentParser:
    set_parsing_settings(import_path_denylist=["*"])  # else a config's `class_path` imports any module before it is refused
    # No abbreviations: `--resum RUN_DIR` would be found too late to read the run's config, and start a new run.
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, default_env=False, allow_abbrev=False)


def _run_config(schema: type[Schema], parser: ArgumentParser, namespace: Namespace) -> Schema:
    init = parser.instantiate(namespace)
    return schema(**{item.name: getattr(init, item.name) for item in fields(schema)})


def _explain(message: str, schema: type, clusters: bool = False) -> str:
    """One paragraph out of jsonargparse's message; for an unknown key, with the nearest known ones."""
    message = " ".join(message.split())
    if file := re.search(r"Parser key \"cluster\": (?:Importing|Unable to load config) '(.+?)'", message):
        wrong = "is not the YAML of a cluster" if Path(file[1]).is_file() else "is not there"
        return f"--cluster={file[1]}: that file {wrong}. Give one that states cluster keys, such as configs/cluster/slurm.yaml."
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.-]+)'", message)
    alone = re.search(r"Option '([\w.-]+)' is not accepted|unrecognized arguments: --([\w.-]+)", message)
    key = f"{in_group[1]}.{in_group[2]}" if in_group else (alone[1] or alone[2]) if alone else None
    if key is None:
        return f"{message}. See --help for every key and its type."
    of_run, of_cluster = known_keys(schema), known_keys(ClusterConfig, "cluster.") if clusters else []
    if f"cluster.{key}" in of_cluster:
        return f"Config key '{key}' is one of a cluster; give its file as --cluster FILE, or the key as --cluster.{key}."
    if key.removeprefix("cluster.") in of_run and key not in of_run:
        run_key = key.removeprefix("cluster.")
        return f"Cluster key '{run_key}' is one of a run; give its file as --config FILE, or the key as --{run_key}."
    known = [*of_run, *_FLAGS, *of_cluster, *(_CLUSTER_FLAGS if clusters else ())]
    tail = key.rsplit(".", 1)[-1]
    # The right name in the wrong group first (engine.lr -> train.lr), then the like-sounding ones.
    near = [k for k in known if k.rsplit(".", 1)[-1] == tail] or difflib.get_close_matches(key, known, 2, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help or --print_config for all keys."
    others = [kind for kind, other in _KINDS.items() if other is not schema and key in known_keys(other)]
    if others:
        hint += f" A {' or a '.join(others)} has it: is this the config of one?"
    return f"Unknown config key '{key}'; {hint}"

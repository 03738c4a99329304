"""Many transfer runs as one: a grid over encoders, tasks, modes, labels and seeds, a run folder for each of its cells.

Layer 5. A cell's folder says by itself how far it is, so that a sweep that was stopped goes on where it is started again.
"""

import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from rich.console import Console

from cromss_dist.config.check import require
from cromss_dist.config.transfer import EncoderConfig, LabelsConfig, TransferConfig
from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import CheckpointError, ConfigError, CromssError
from cromss_dist.parse import CONFIG_FILE, ParsedRun, from_dict, to_yaml
from cromss_dist.train.run.continuation import changes_of
from cromss_dist.train.run.folder import SUMMARY_FILE
from cromss_dist.transfer.network import pin_encoders
from cromss_dist.transfer.results import SCORES_FILE
from cromss_dist.transfer.run import run_in_process
from launch.session import ROOT

TASK_CONFIGS = ROOT / "configs" / "transfer"
_AXES = ("output", "name", "task", "variant", "replicate", "encoder", "mode", "labels", "seed", "launch")
State: TypeAlias = Literal["waiting", "begun", "done"]


@dataclass(frozen=True)
class SweepConfig:
    """A grid of transfer runs: each task x mode x amount of labels x label seed x seed x encoder is one.

    Args:
        output: Folder of the sweep; each run has a folder of its own in it.
        tasks: Downstream sets by name: the `data` section of each, such as {train: DIR, test: DIR}; beside it `config`, the YAML
            of its transfer runs, where that is not the one of its name in configs/transfer.
        encoders: What is compared, by the name that tables give it: the `encoder` section of each; several of one name are
            replicates of it, as pretrained with other seeds.
        modes: 'frozen', 'finetuned', 'linear', 'knn'.
        fractions: Shares of the training tiles.
        per_class: Tiles of each class, beside `fractions`.
        label_seeds: Of the choice of tiles; all tiles are chosen once.
        seeds: Of the runs.
        changes: Any key of a transfer run for all of them, with dots: `{train.epochs: 20}`.
        against: Encoder that all others are held against in the end; null compares none.
        workers: Runs at a time; 0 runs one after another in this process, without Ray. null takes what there is: GPUs or cores
            over what a run takes.
        cpus: Cores of each run.
        gpus: GPUs of each run, which may be a part of one, such as 0.25; null is one where there is one.
    """

    output: str = "runs/sweep"
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    encoders: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    modes: tuple[Literal["frozen", "finetuned", "linear", "knn"], ...] = ("frozen",)
    fractions: tuple[float, ...] = (1.0,)
    per_class: tuple[int, ...] = ()
    label_seeds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    changes: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        for axis in ("tasks", "encoders", "modes", "label_seeds", "seeds"):
            values = getattr(self, axis)
            require(len(values) > 0 and len(set(values)) == len(values), axis, values, "give one or more, each once")
        require(len(self.fractions) + len(self.per_class) > 0, "fractions", self.fractions, "give one or more, or per_class")
        for name, replicates in self.encoders.items():
            ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+]*", name) is not None
            require(ok, "encoders", name, "name each with letters, digits, '.', '_' and '+'")  # '-' parts the names of folders
            require(len(replicates) > 0, f"encoders.{name}", replicates, "give a list of one or more")
        require(
            self.against is None or self.against in self.encoders, "against", self.against, "give one of the encoders, or null"
        )
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "give 0 or more, or null")
        require(self.cpus >= 1, "cpus", self.cpus, "give at least 1")
        require(self.gpus is None or self.gpus >= 0, "gpus", self.gpus, "give 0 or more, or null")

    @property
    def labels(self) -> tuple[LabelsConfig, ...]:
        """Amounts of labels with their seeds."""
        shares = [LabelsConfig(fraction=f, seed=s) for f in self.fractions for s in (self.label_seeds if f < 1 else (0,))]
        return (*shares, *(LabelsConfig(per_class=n, seed=s) for n, s in product(self.per_class, self.label_seeds)))


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    config: TransferConfig

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.config.name

    @property
    def run_dir(self) -> Path:
        """Its folder."""
        return Path(self.config.output) / self.name

    @property
    def state(self) -> State:
        """How far it is, by the files in its folder."""
        if not (self.run_dir / CONFIG_FILE).is_file():
            return "waiting"
        return "done" if all((self.run_dir / name).is_file() for name in (SCORES_FILE, SUMMARY_FILE)) else "begun"

    def check(self) -> None:
        """Raises ConfigError if its folder is of another run: of another config, or of an encoder that is another one now."""
        stored = self.run_dir / CONFIG_FILE
        if not stored.is_file():
            return
        try:
            changes = changes_of(yaml.safe_load(stored.read_text()), self.config)
        except CheckpointError as error:
            raise ConfigError(
                f"{self.run_dir} is of another sweep: {error} Give another output, or remove the folder."
            ) from error
        if length := [change for change in changes if change.startswith("train.")]:
            raise ConfigError(
                f"{self.run_dir} was trained otherwise, so that it is no cell of this sweep: {'; '.join(length)}. Give another "
                "output, or remove the folder."
            )

    def run(self, console: Console) -> None:
        """Runs it, or goes on with it, in this process.

        Raises:
            CromssError: see `transfer.run.run_in_process`.
        """
        if self.state == "waiting":
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run_dir / CONFIG_FILE, to_yaml(self.config).encode())
        run_in_process(ParsedRun(self.config, resume=self.run_dir), console)


def run_quietly(_: None, cell: Cell) -> None:
    """Runs a cell as a job of `parallel.outcomes`; what it has to tell is in its folder."""
    try:
        cell.run(Console(quiet=True))
    except CromssError:
        raise
    except Exception as error:
        error.add_note(traceback.format_exc())  # which does not travel between processes
        raise


def cells_of(sweep: SweepConfig) -> list[Cell]:
    """All runs of a sweep. Encoders come last, so that those that are compared run one after another.

    References get the meaning that they have now (`pin_encoders`), so that all runs of one encoder have the same version.

    Args:
        sweep: The grid.

    Raises:
        ConfigError: a run's config is wrong; a task's YAML is not there.
        PackageError, RegistryError: an encoder is not there.
    """
    configs = _configs(sweep)
    cells = []
    for seed, task, mode, labels in product(sweep.seeds, sweep.tasks, sweep.modes, sweep.labels):
        for (of_task, variant, replicate), config in configs.items():
            if of_task == task:
                number = (f"r{replicate}",) if len(sweep.encoders[variant]) > 1 else ()
                name = "-".join((task, variant, mode, _amount(labels), f"s{seed}", *number))
                cells.append(Cell(replace(config, name=name, seed=seed, mode=mode, labels=labels)))
    return cells


def _configs(sweep: SweepConfig) -> dict[tuple[str, str, int], TransferConfig]:
    """What all runs of one encoder on one task share, by task, variant and replicate."""
    pinned: dict[tuple[EncoderConfig, str | None], EncoderConfig] = {}
    configs = {}
    for task, (variant, replicates) in product(sweep.tasks, sweep.encoders.items()):
        for replicate, encoder in enumerate(replicates):
            own = {"variant": variant, "replicate": replicate, "encoder": encoder}
            config = from_dict(_merged(_base(sweep, task), own), TransferConfig).with_absolute_paths()
            key = (config.encoder, config.tracking.uri)
            if key not in pinned:
                pinned[key] = pin_encoders(config).encoder
            configs[task, variant, replicate] = replace(config, encoder=pinned[key])
    return configs


def _base(sweep: SweepConfig, task: str) -> dict[str, Any]:
    """What all runs of a task share, as keys of a transfer run."""
    data = dict(sweep.tasks[task])
    path = Path(data.pop("config", TASK_CONFIGS / f"{task}.yaml"))
    try:
        keys = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"tasks.{task}.config: {path} is not there; give the YAML of a transfer run.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"tasks.{task}.config: {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(keys, dict):
        raise ConfigError(
            f"tasks.{task}.config: {path} has no keys of a transfer run; give one such as {TASK_CONFIGS / 'dw.yaml'}."
        )
    for dotted, value in sweep.changes.items():
        if dotted.partition(".")[0] in _AXES or dotted in ("data.train", "data.test"):
            raise ConfigError(
                f"changes.{dotted} is what the sweep itself sets; give it as its tasks, encoders, modes, labels, seeds."
            )
        for part in reversed(dotted.split(".")):
            value = {part: value}
        keys = _merged(keys, value)
    of_sweep = {"output": sweep.output, "task": task, "data": data, "launch": {"workers": 1, "cpus_per_worker": sweep.cpus}}
    return _merged(keys, of_sweep)


def _merged(keys: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(keys)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _amount(labels: LabelsConfig) -> str:
    """As a part of a folder's name: 'all', '10pct-l0', '5shot-l0'."""
    if labels.per_class is None and labels.fraction == 1:
        return "all"
    return f"{labels.per_class}shot-l{labels.seed}" if labels.per_class else f"{100 * labels.fraction:g}pct-l{labels.seed}"

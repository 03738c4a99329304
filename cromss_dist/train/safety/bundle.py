"""A step that went wrong, kept with its weights so that it can be computed again: `cromss replay`.

Layer 3. A bundle is a folder with the run's config, the step's facts (samples by id, not their pixels) and the weights:
YAML, JSON and safetensors, hashed. It appears whole or not at all.
"""

import hashlib
import json
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cromss_dist.config import BaseRunConfig, BatchPlan
from cromss_dist.data.loading.plan import TrainPlan
from cromss_dist.errors import CheckpointError, StorageError
from cromss_dist.parse import to_yaml
from cromss_dist.train.step.engine import Engine, StepResult
from cromss_dist.train.task import Task
from cromss_dist.world import World, device_name

FOLDER = "replay"
CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "weights.safetensors"
RECORD_FILE = "bundle.json"
SCHEMA_VERSION = 1
_MAX_RECORD_BYTES = 1 << 28  # a million samples
_MEND = "Copy the bundle again from the folder of its run; one has bundle.json, config.yaml and weights.safetensors"


@dataclass(frozen=True)
class Samples:
    """The global batch of a step, N samples: rank by rank, and of a rank micro batch by micro batch."""

    keys: tuple[str, ...]
    sample_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    seasons: tuple[int, ...]
    weights: tuple[float, ...]  # 1, or 0 for a sample that only fills the batch

    @classmethod
    def of(cls, train_plan: Callable[[BatchPlan], TrainPlan], plan: BatchPlan, samples: int) -> "Samples":
        """The global batch behind `samples` samples of the training line, whatever rank reads which part of it."""
        whole = BatchPlan(plan.global_batch, plan.global_batch, accumulation_steps=1, world_size=1)
        line = train_plan(whole).starting_at(samples)
        request, keys = next(line.requests()), line.dataset.locations
        ids, epochs, seasons = request.sample_ids.tolist(), request.epochs.tolist(), request.seasons.tolist()
        return cls(tuple(keys[i] for i in ids), tuple(ids), tuple(epochs), tuple(seasons), tuple(request.weights.tolist()))


@dataclass(frozen=True)
class Bundle:
    """What is known of a step, beside config and weights."""

    reason: str  # from Guard.settle
    step: int
    samples_seen: int  # before the step, of all ranks
    progress_epochs: float  # before the step
    loss: float  # mean over the ranks
    grad_norm: float | None  # before clipping
    weights_of: Literal["before", "after"]  # the step: a step that was skipped left them as they were
    precision: str
    device: str  # in words
    plan: BatchPlan
    datasets: tuple[str, ...]  # their digests, in the order in which samples are numbered
    samples: Samples


def has_room(run_dir: Path, limit: int, world: World) -> bool:
    """Whether the run has fewer than `limit` bundles yet; a collective call, for weights are gathered where it has."""
    return bool(world.broadcast_json(world.is_main and len(list((run_dir / FOLDER).glob("step-*"))) < limit))


class Bundles:
    """Keeps bundles of a run's bad steps while there is room for them.

    Args:
        run_dir: Folder of the run.
        task: Config, data, batch arithmetic.
        world: This process among the others.
        engine: The networks.
    """

    def __init__(self, run_dir: Path, task: Task, world: World, engine: Engine) -> None:
        self._run_dir, self._task, self._world, self._engine = run_dir, task, world, engine

    def keep(self, reason: str, step: int, progress_epochs: float, loss: float, result: StepResult) -> Path | None:
        """Writes the bundle of a step that was just taken or left out; a collective call.

        Args:
            reason: From `Guard.settle`.
            step: Its number.
            progress_epochs: Before it.
            loss: Of the step, mean over the ranks.
            result: Of the step.

        Returns:
            Its folder on rank 0; None elsewhere, and where there is no room.

        Raises:
            StorageError: on rank 0, it cannot be written.
        """
        task, world = self._task, self._world
        if not has_room(self._run_dir, task.config.faults.bundles, world):
            return None
        weights = self._engine.state_dict()
        if not world.is_main:
            return None
        samples_seen = (step - 1) * task.plan.global_batch
        bundle = Bundle(
            reason=reason,
            step=step,
            samples_seen=samples_seen,
            progress_epochs=progress_epochs,
            loss=loss,
            grad_norm=result.grad_norm,
            weights_of="after" if result.applied else "before",
            precision=self._engine.precision,
            device=device_name(world.device),
            plan=task.plan,
            datasets=tuple(task.datasets.values()),
            samples=Samples.of(task.train_plan, task.plan, samples_seen),
        )
        return write_bundle(self._run_dir, bundle, task.config, weights)


def write_bundle(run_dir: Path, bundle: Bundle, config: BaseRunConfig, weights: Mapping[str, Tensor]) -> Path:
    """Writes a bundle; one of the same step, from before a restart, is replaced. For rank 0.

    Args:
        run_dir: Folder of the run.
        bundle: The step.
        config: Of the run.
        weights: Weights and buffers on the CPU.

    Returns:
        `<run_dir>/replay/step-<step>`.

    Raises:
        StorageError: it cannot be written; nothing is left of it.
    """
    folder = run_dir / FOLDER / f"step-{bundle.step:07d}"
    draft = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed here
        draft.mkdir(parents=True)
        (draft / CONFIG_FILE).write_text(to_yaml(config))
        safetensors.torch.save_file(dict(weights), draft / WEIGHTS_FILE)
        content = {
            "schema_version": SCHEMA_VERSION,
            "files": {name: _sha256(draft / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
            # As text, for JSON has no nan.
            **{name: repr(value) if isinstance(value, float) else value for name, value in asdict(bundle).items()},
        }
        (draft / RECORD_FILE).write_text(json.dumps({"sha256": _digest(content), "content": content}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StorageError(
            f"The replay bundle {folder} cannot be written: {error}. Check the disk's free space; the run needs no bundle."
        ) from error
    return folder


def read_bundle(folder: Path) -> tuple[Bundle, dict[str, Tensor]]:
    """A bundle and its weights, on the CPU; the run's config is in its `config.yaml`, for the command line's parser.

    Raises:
        CheckpointError: it is no bundle, or a file of it is missing or changed.
    """
    record = _read(folder / RECORD_FILE, _MAX_RECORD_BYTES)
    try:
        told = json.loads(record)
        intact, files, bundle = told["sha256"] == _digest(told["content"]), told["content"]["files"], _parse(told["content"])
        sums = {name: files[name] for name in (CONFIG_FILE, WEIGHTS_FILE)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / RECORD_FILE} is no record of a replay bundle: {error!r}. {_MEND}.") from None
    if not intact:
        raise CheckpointError(f"{folder / RECORD_FILE} was changed: its sha256 is not what it states. {_MEND}.")
    found = {name: _read(folder / name) for name in sums}
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise CheckpointError(f"{folder / name} was changed: its sha256 is not what {RECORD_FILE} states. {_MEND}.")
    return bundle, safetensors.torch.load(found[WEIGHTS_FILE])  # the bytes that were hashed, not the file again


def _parse(content: dict[str, Any]) -> Bundle:
    if content["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"This replay bundle has schema version {content['schema_version']}, this code reads {SCHEMA_VERSION}; replay it "
            "with the code that wrote it."
        )
    values = {field.name: content[field.name] for field in fields(Bundle)}
    values |= {name: None if values[name] is None else float(values[name]) for name in ("progress_epochs", "loss", "grad_norm")}
    values["plan"] = BatchPlan(**values["plan"])
    values["datasets"] = tuple(values["datasets"])
    values["samples"] = Samples(**{name: tuple(column) for name, column in values["samples"].items()})
    return Bundle(**values)


def _read(path: Path, limit: int | None = None) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):  # a link could point anywhere
            raise CheckpointError(f"{path} is not a regular file. {_MEND}.")
        if limit is not None and status.st_size > limit:
            raise CheckpointError(f"{path} has {status.st_size} bytes; at most {limit} are read. {_MEND}.")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there. {_MEND}.") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Pretraining: the composition root that every rank runs, whoever started it.

Layer 4.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file

from cromss_dist import __version__
from cromss_dist.config import BatchPlan, DataConfig, RunConfig, plan_batches
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import BandError, ConfigError, OutputExistsError, StorageError
from cromss_dist.losses import CromssLoss
from cromss_dist.models.encoder import check_encoder_name, stage_channels
from cromss_dist.models.two_branch import ParameterCounts, TwoBranchUNet
from cromss_dist.parse import to_yaml, write_yaml
from cromss_dist.schema import CLASS_NAMES, MODALITIES, NUM_CLASSES, Modality
from cromss_dist.tracking.card import EncoderCard
from cromss_dist.tracking.package import write_package
from cromss_dist.tracking.registry import Registry
from cromss_dist.tracking.runs import RunTracker, flatten
from cromss_dist.train.engine import Engine, resolve_precision
from cromss_dist.train.loop import Pretraining, Validation
from cromss_dist.train.record import Record
from cromss_dist.train.schedule import Timeline
from cromss_dist.train.watch import watching
from cromss_dist.world import World, choose_device, join

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
WEIGHTS_FILE = "model.safetensors"
_VERSIONED = ("torch", "segmentation-models-pytorch", "timm", "deepspeed")


@dataclass(frozen=True)
class RunSummary:
    """What a finished run leaves; also written as `summary.json` into its folder."""

    run_dir: str
    run_id: str
    tracking_uri: str
    num_train: int
    num_val: int
    samples: int
    samples_per_s: float
    before: dict[str, float]  # validation metrics before the first step
    after: dict[str, float]  # and after the last
    registered: dict[str, int]  # model name -> version, empty where tracking.register is false
    packages: dict[str, str]  # modality -> folder


@dataclass(frozen=True)
class Preflight:
    """What is known about a run before it starts."""

    config: RunConfig
    data: RunData
    plan: BatchPlan
    timeline: Timeline

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "Preflight":
        """Opens the datasets, splits them and does the arithmetic; starts nothing.

        Raises:
            ShardError: a dataset is missing or damaged.
            DownloadError: a remote one cannot be fetched.
            BatchError: the batch does not divide over the ranks.
            BandError: the datasets have not all the bands that are asked for.
            ConfigError: the crop is larger than a patch, the classes are not Dynamic World's, a validation season is not
                there, the filters leave too little; the device, its precision or the encoder does not exist.
        """
        plan = plan_batches(config.engine, world_size)
        resolve_precision(config.engine, choose_device(config.engine.device))
        check_encoder_name(config.model.encoder)
        data = RunData.open(config.data, config.seed)
        _check_data(config.data, data.dataset)
        if config.data.crop_px > data.dataset.patch_px:
            raise ConfigError(
                f"data.crop_px={config.data.crop_px} is larger than the {data.dataset.patch_px} px patches of "
                f"{_named(config.data)}; set data.crop_px to a multiple of {2**config.model.encoder_depth} up to "
                f"{data.dataset.patch_px}."
            )
        data.eval_plan(plan)
        return cls(config, data, plan, Timeline.of(config, data.train_plan(plan).order.epoch_samples))

    def build_model(self) -> TwoBranchUNet:
        """The networks, with weights drawn from the run's seed."""
        torch.manual_seed(self.config.seed)
        data = self.config.data
        return TwoBranchUNet(self.config.model, len(data.s1_bands), len(data.s2_bands))

    def parameter_counts(self) -> ParameterCounts:
        """Sizes of the networks."""
        return self.build_model().parameter_counts()

    def describe(self) -> str:
        """What `--dry-run` prints: config, data, batch arithmetic, steps, parameter counts."""
        plan, time, counts = self.plan, self.timeline, self.parameter_counts()
        return "\n".join(
            [
                to_yaml(self.config).rstrip(),
                "---",
                f"config digest       {self.config.digest}",
                *(self._describe_source(number) for number in range(len(self.data.train))),
                f"split               {self.data.num_train} locations to train on, {len(self.data.validation.ids)} held out: "
                f"{len(self.data.eval_plan(plan).pairs)} seasons to validate on",
                f"batch               {plan.global_batch} = micro batch {plan.micro_batch} x accumulation "
                f"{plan.accumulation_steps} x world {plan.world_size}",
                f"steps per epoch     {time.steps_per_epoch:.2f}",
                f"steps               {time.total_steps} ({time.total_samples} samples, {self.config.train.epochs:g} epochs)",
                f"validation          every {time.validate_every_steps} steps",
                f"parameters          {counts.total:,}: encoder S1 {counts.encoder_s1:,}, encoder S2 {counts.encoder_s2:,}, "
                f"decoder and head {counts.decoder:,} ({self.config.model.fusion} fusion)",
            ]
        )

    def _describe_source(self, number: int) -> str:
        location, source = list(self.config.data.weights)[number], self.data.train[number]
        dataset = source.dataset
        share = f", weight {source.weight:g}" if len(self.data.train) > 1 else ""
        return (
            f"data                {location}: {len(dataset.locations)} locations, {dataset.patch_px} px, digest "
            f"{dataset.digest[:12]}{share}"
        )


def _named(data: DataConfig) -> str:
    """The datasets, as messages name them."""
    return ", ".join(data.weights)


def _check_data(data: DataConfig, dataset: Dataset) -> None:
    """Whether the datasets have the bands, seasons and classes that the run needs."""
    wanted: dict[Modality, tuple[str, ...]] = {"s1": data.s1_bands, "s2": data.s2_bands}
    for modality, bands in wanted.items():
        found = [band for spec in dataset.images if spec.modality == modality for band in spec.bands]
        if missing := [band for band in bands if band not in found]:
            raise BandError(
                f"data.{modality}_bands asks for {', '.join(missing)}, which {_named(data)} does not have; it has "
                f"{', '.join(found) or f'no {modality} band'}. Set data.{modality}_bands to some of these."
            )
    if dataset.class_names != CLASS_NAMES:
        raise ConfigError(
            f"{_named(data)} has the label classes {', '.join(dataset.class_names)}; pretraining takes the {NUM_CLASSES} classes "
            "of Dynamic World. Map the labels to them in the archive's description and shard it again."
        )
    if late := [season for season in data.val_seasons if season >= dataset.num_seasons]:
        raise ConfigError(
            f"data.val_seasons names season {late[0]}, and {_named(data)} has {dataset.num_seasons}, counted from 0; set "
            f"data.val_seasons to some of {list(range(dataset.num_seasons))}."
        )


def new_run_dir(config: RunConfig) -> Path:
    """Creates the run's folder `<output>/<name>-<time>` with the resolved config in it."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        run_dir = Path(config.output).absolute() / f"{config.name}-{stamp}{suffix}"
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        write_yaml(config, run_dir / CONFIG_FILE)
        return run_dir
    raise OutputExistsError(f"{run_dir} and 99 like it exist; set name or output to something else.")


def tracking_uri_of(config: RunConfig) -> str:
    """The MLflow store of a run: the config's, or SQLite in the folder of runs."""
    return config.tracking.uri or f"sqlite:///{Path(config.output).absolute() / 'mlflow.db'}"


def pretrain(config: RunConfig, run_dir: Path) -> RunSummary | None:
    """Runs this rank's part of a pretraining; a collective call.

    Args:
        config: The whole run, equal on all ranks.
        run_dir: Folder of the run, seen by rank 0.

    Returns:
        The summary on rank 0, None elsewhere.

    Raises:
        CromssError: whatever the caller can mend; see errors.py.
    """
    torch.set_num_threads(config.launch.cpus_per_worker)
    world = join(config.engine.device)
    preflight = Preflight.of(config, world.size)
    model = preflight.build_model()
    engine = Engine(model, config.engine, config.train, preflight.plan, world)
    loss = CromssLoss(config.loss, reduce_sum=world.reduce_sum if world.size > 1 else None, world_size=world.size)
    trainer = Pretraining(config, preflight.plan, preflight.timeline, world, preflight.data, engine, loss)
    try:
        if not world.is_main:
            trainer.run(None)
            engine.state_dict()
            return None
        with _recording(preflight, world, engine, run_dir) as record:
            first, last = trainer.run(record)
            record.event("stage", text="writing encoder packages")
            weights = engine.state_dict()
            _save_weights(weights, run_dir / WEIGHTS_FILE)
            packages = {m: _write_package(m, model, weights, preflight, last, run_dir, record) for m in MODALITIES}
            registered = _register(packages, config, record) if config.tracking.register else {}
            record.tracker.flush()
            summary = RunSummary(
                run_dir=str(run_dir),
                run_id=record.tracker.run_id,
                tracking_uri=tracking_uri_of(config),
                num_train=preflight.data.num_train,
                num_val=len(preflight.data.validation.ids),
                samples=preflight.timeline.total_samples,
                samples_per_s=trainer.samples_per_s,
                before=first.metrics(),
                after=last.metrics(),
                registered=registered,
                packages={m: str(folder) for m, folder in packages.items()},
            )
            (run_dir / SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=2) + "\n")
            return summary
    finally:
        engine.close()


def run_in_process(config: RunConfig, console: Console) -> RunSummary:
    """Runs a pretraining with this process as its only worker, and shows its progress.

    Raises:
        ConfigError: more workers are asked for, by the config or by a launcher that started several processes.
        CromssError: see errors.py.
    """
    if config.launch.workers not in (None, 1) or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"One process cannot be launch.workers={config.launch.workers} (WORLD_SIZE={os.environ.get('WORLD_SIZE', 'unset')}); "
            "set launch.workers to 1 and unset WORLD_SIZE, or start the run with launch/local.py."
        )
    config = config.with_absolute_paths()
    Preflight.of(config, world_size=1)
    run_dir = new_run_dir(config)
    with watching(run_dir, console):
        summary = pretrain(config, run_dir)
    assert summary is not None, "a run of one process is rank 0"
    return summary


def report(summary: RunSummary, console: Console) -> None:
    """Prints what a finished run left, and how to look at it."""
    console.print(f"  {summary.samples} samples at {summary.samples_per_s:.1f} samples/s", highlight=False)
    console.print(f"  mlflow ui --backend-store-uri {summary.tracking_uri}", highlight=False, soft_wrap=True)


@contextmanager
def _recording(preflight: Preflight, world: World, engine: Engine, run_dir: Path) -> Iterator[Record]:
    """The record of a run, which ends as FINISHED or FAILED with the block."""
    config = preflight.config
    tags = {
        "config_digest": config.digest,
        "git_revision": git_revision(),
        "run_dir": str(run_dir),
        "world_size": str(world.size),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "cpu",
        "precision": engine.precision,
    }
    with RunTracker(tracking_uri_of(config), config.tracking.experiment, run_dir.name, tags=tags) as tracker:
        record = Record(run_dir, tracker)
        try:
            record_config(tracker, config, [source.dataset.digest for source in preflight.data.train])
            record.event("stage", text=f"run folder {run_dir}")
            record.event("stage", text=f"{world.size} x {world.device.type}, {engine.precision}, run {tracker.run_id}")
            record.event("start", total_samples=preflight.timeline.total_samples, run_id=tracker.run_id)
            yield record
        finally:
            record.close()


def record_config(tracker: RunTracker, config: RunConfig, digests: Sequence[str]) -> None:
    """Records the config and the datasets, of the digests given, in an MLflow run."""
    params = config.to_dict()
    if isinstance(config.data.shards, dict):  # MLflow takes few signs in the name of a parameter, and a place may have any
        params["data"]["shards"] = list(config.data.shards.items())
    tracker.log_params(params)
    tracker.log_text(to_yaml(config), CONFIG_FILE)
    names = [PurePosixPath(location).name for location in config.data.weights]
    for number, (name, location, digest) in enumerate(zip(names, config.data.weights, digests, strict=True)):
        tracker.log_dataset(name if names.count(name) == 1 else f"{name}-{number}", digest, location)


def _save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(weights, path)
    except SafetensorError as error:  # is no OSError, whatever the system said
        raise StorageError(f"{path} cannot be written: {error}. Check the disk's free space and run it again.") from error


def _write_package(
    modality: Modality,
    model: TwoBranchUNet,
    weights: dict[str, torch.Tensor],
    preflight: Preflight,
    validation: Validation,
    run_dir: Path,
    record: Record,
) -> Path:
    """The package of one encoder, in the run's folder."""
    config = preflight.config
    bands = config.data.s1_bands if modality == "s1" else config.data.s2_bands
    channels, strides = stage_channels(model.encoders[modality])
    prefix = f"encoders.{modality}."
    card = EncoderCard(
        modality=modality,
        bands=bands,
        normalisation=preflight.data.dataset.normalisation(modality).select(bands),
        encoder=config.model.encoder,
        depth=config.model.encoder_depth,
        in_channels=len(bands),
        out_channels=channels,
        strides=strides,
        fusion=config.model.fusion,
        config_digest=config.digest,
        manifest_digest=preflight.data.dataset.digest,
        run_id=record.tracker.run_id,
        git_revision=git_revision(),
        versions={"cromss_dist": __version__} | {name: version(name) for name in _VERSIONED},
        recipe=flatten(_recipe(config)),
        metrics={name: value for name, value in validation.metrics().items() if f"_{modality}" in name},
        licence=config.tracking.licence,
    )
    folder = run_dir / "encoders" / modality
    write_package(folder, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, card)
    return folder


def _recipe(config: RunConfig) -> dict[str, Any]:
    """What of a config made the weights: no folders, no tracking, no processes."""
    content = {
        key: value for key, value in config.to_dict().items() if key in ("seed", "data", "model", "loss", "train", "engine")
    }
    content["data"]["weights"] = list(config.data.weights.values())
    for name in ("shards", "reading"):
        del content["data"][name]
    del content["data"]["filter"]["quality"]
    return content


def _register(packages: dict[Modality, Path], config: RunConfig, record: Record) -> dict[str, int]:
    """Registers both encoders; returns model name -> version."""
    registry = Registry(tracking_uri_of(config))
    registered: dict[str, int] = {}
    for modality, folder in packages.items():
        name = model_name(config, modality)
        registered[name] = registry.register(folder, name, record.tracker.run_id, alias=config.tracking.alias).version
        record.event("stage", text=f"registered {name} version {registered[name]} as @{config.tracking.alias}")
    return registered


def model_name(config: RunConfig, modality: Modality) -> str:
    """Name of an encoder in the registry: `<prefix>-<encoder>-<modality>`."""
    return f"{config.tracking.model_prefix}-{config.model.encoder}-{modality}"


@cache
def git_revision() -> str:
    """Commit of the checkout this process's code runs from, with '+dirty' where it was changed; 'unknown' outside a checkout."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed inside another checkout, its commit is not ours
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"

"""The whole run as frozen, typed dataclasses; they are the schema.

Layer 1. YAML files in `configs/` state only what differs from the defaults here, which are the published recipe
(CromSS, section IV-A). Dotted overrides come last: `--engine.global_batch 64`.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cromss_dist.errors import BatchError, ConfigError
from cromss_dist.schema import S1_BANDS, S2_BANDS, check_bands


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r} is not allowed; {allowed}.")


def _absolute(location: str) -> str:
    """A path that holds in every working directory; a URL does already."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


@dataclass(frozen=True)
class FilterConfig:
    """Which locations and seasons are used; null takes all.

    Args:
        seasons: Seasons that training draws from: `[0, 2]`. Validation has its own, `data.val_seasons`.
        region: West, south, east, north in degrees: `[5, 45, 15, 55]`; a region across 180 degrees has west > east.
        max_cloud_share: Largest share of cloudy pixels, in [0, 1]; needs `quality`, as the next two.
        max_nodata_share: Largest share of pixels without a value, of either modality, in [0, 1].
        max_shift_px: Largest shift of S1 against S2, px at 10 m; one that cannot be told counts as none.
        quality: `quality.csv` of each dataset, in their order, written by `tools/report.py`: `[shards-report/quality.csv]`.
    """

    seasons: tuple[int, ...] | None = None
    region: tuple[float, float, float, float] | None = None
    max_cloud_share: float | None = None
    max_nodata_share: float | None = None
    max_shift_px: float | None = None
    quality: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadingConfig:
    """How samples get from files into batches; changes no sample and no order.

    Args:
        kind: What is read of a dataset that has both: 'shards' or 'cube'; 'auto' takes shards where there are some.
        threads: Threads that read and check samples, of each rank or, with `workers`, of each worker process.
        workers: Processes of each rank that read; 0 reads in the rank's own.
        prefetch_batches: Micro batches read ahead on each rank, and by each worker process.
        lookahead_batches: Micro batches whose remote shards are fetched ahead; nothing for data on this node.
        timeout_s: Seconds a batch may take to be read before the run ends with an error that says what hangs.
        on_corrupt: A sample whose bytes do not match their checksum: 'stop' ends the run, 'replace' takes its neighbour
            instead, on every machine the same one, and says so.
        cache: Folder of this node for shards of remote datasets; null is `shards` in
            `CROMSS_CACHE`, else in `~/.cache/cromss`.
        cache_gib: Size that the cache is kept under, GiB.
    """

    kind: Literal["auto", "shards", "cube"] = "auto"
    threads: int = 2
    workers: int = 0
    prefetch_batches: int = 2
    lookahead_batches: int = 64
    timeout_s: float = 600.0
    on_corrupt: Literal["stop", "replace"] = "stop"
    cache: str | None = None
    cache_gib: float = 100.0

    def __post_init__(self) -> None:
        for name in ("threads", "prefetch_batches"):
            _require(getattr(self, name) >= 1, f"data.reading.{name}", getattr(self, name), "give at least 1")
        for name in ("workers", "lookahead_batches"):
            _require(getattr(self, name) >= 0, f"data.reading.{name}", getattr(self, name), "give 0 or more")
        for name in ("timeout_s", "cache_gib"):
            # Clocks and counts of bytes overflow far above that.
            _require(0 < getattr(self, name) <= 1e6, f"data.reading.{name}", getattr(self, name), "give more than 0, up to 1e6")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is augmented.

    Args:
        shards: Folder or URL with `manifest.json`, written by `tools/shard.py`; or several, each with its weight in the
            mixture: `{ours: 0.7, s3://bucket/theirs: 0.3}`.
        s1_bands: Sentinel-1 bands by name, in the order the model sees them.
        s2_bands: Sentinel-2 bands by name, in the order the model sees them.
        crop_px: Side of the random training crop, px at 10 m.
        flip_p: Probability of a flip (horizontal, vertical or both, equally likely).
        rotate_p: Probability of a rotation.
        rotate_max_deg: Rotation angles are uniform in +- this, degrees.
        val_fraction: Share of the locations held out for validation; at least one of each dataset.
        val_seasons: Seasons of each held-out location that are scored.
        window: Samples that are shuffled among themselves, at least; a larger one has more shards open at a time.
        tail: What becomes of the samples behind an epoch's last full batch: 'carry' goes on into the next epoch inside the
            batch, so that none is lost; 'drop' leaves them out, others each epoch; 'pad' fills the batch up with weight 0.
        filter: Which locations and seasons are used.
        reading: How samples get from files into batches.
    """

    shards: dict[str, float] | str = "shards"
    s1_bands: tuple[str, ...] = S1_BANDS
    s2_bands: tuple[str, ...] = S2_BANDS
    crop_px: int = 256
    flip_p: float = 0.5
    rotate_p: float = 0.2
    rotate_max_deg: float = 90.0
    val_fraction: float = 0.01
    val_seasons: tuple[int, ...] = (0, 1, 2, 3)
    window: int = 2048
    tail: Literal["carry", "drop", "pad"] = "carry"
    filter: FilterConfig = field(default_factory=FilterConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)

    def __post_init__(self) -> None:
        check_bands("s1", self.s1_bands)
        check_bands("s2", self.s2_bands)
        _require(self.crop_px >= 16, "data.crop_px", self.crop_px, "give at least 16 px")
        for name in ("flip_p", "rotate_p"):
            _require(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "give a probability in [0, 1]")
        _require(0 <= self.rotate_max_deg <= 180, "data.rotate_max_deg", self.rotate_max_deg, "give 0 to 180 degrees")
        _require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "give a share in (0, 1)")
        ok = (
            bool(self.val_seasons)
            and set(self.val_seasons) <= {0, 1, 2, 3}
            and len(set(self.val_seasons)) == len(self.val_seasons)
        )
        _require(ok, "data.val_seasons", self.val_seasons, "give distinct seasons out of 0, 1, 2, 3")
        _require(self.window >= 1, "data.window", self.window, "give at least 1 sample")
        ok = bool(self.weights) and all(math.isfinite(weight) and weight > 0 for weight in self.weights.values())
        _require(ok, "data.shards", self.shards, "give a folder or URL, or several with a positive weight each")
        ok = len({_absolute(location) for location in self.weights}) == len(self.weights)
        _require(ok, "data.shards", self.shards, "a folder is named twice; give it once, with the sum of its weights")
        _require(
            len(self.weights) == 1 or self.tail == "carry",
            "data.tail",
            self.tail,
            "the datasets of a mixture have epochs of their own; set 'carry'",
        )

    @property
    def weights(self) -> dict[str, float]:
        """The datasets and their weights in the mixture."""
        return self.shards if isinstance(self.shards, dict) else {self.shards: 1.0}


@dataclass(frozen=True)
class ModelConfig:
    """The two-branch U-Net.

    Args:
        fusion: 'middle' shares decoder and head between the branches, 'late' shares nothing.
        encoder: Any encoder name of segmentation-models-pytorch, `tu-<timm name>` included.
        encoder_depth: Stages of the encoder that are built, 3-5; the input side must divide by 2 ** depth.
        decoder_channels: Channels of each decoder block, `encoder_depth` of them.
    """

    fusion: Literal["middle", "late"] = "middle"
    encoder: str = "resnet50"
    encoder_depth: int = 5
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)

    def __post_init__(self) -> None:
        _require(3 <= self.encoder_depth <= 5, "model.encoder_depth", self.encoder_depth, "give 3, 4 or 5")
        _require(
            len(self.decoder_channels) == self.encoder_depth,
            "model.decoder_channels",
            self.decoder_channels,
            f"give {self.encoder_depth} numbers, one a stage (model.encoder_depth)",
        )


@dataclass(frozen=True)
class LossConfig:
    """CromSS, all of it.

    Args:
        segmentation: Terms of the segmentation loss that are added up: 'ce', 'dice', 'focal'.
        consistency: Loss that ties the branches: 'ce', 'kl', 'mse' or 'none'.
        consistency_weight: lambda, the factor of the consistency loss.
        confidence: Prediction confidence: 'entropy' or 'gini'.
        select: Whether refined confidences select and weight the pixels; otherwise all weights are 1.
        keep_share: rho, the share of each class that is kept once the ramp is over.
        ramp: Shape of the ramp: 'exp', 'linear' or 'none' (1 from the start).
        ramp_epochs: E, epochs until the ramp reaches 1.
        prior: Label prior: 't' temporal, 's' spatial, 'ts' both, 'none' hard labels.
        prior_weight: a, weight of the prior in the smoothed label.
        uniform_weight: b, weight of the uniform distribution in the smoothed label.
        scope: What selection, Dice and sums see: 'global', the whole global batch, for which gradient accumulation costs a
            second forward pass; 'micro', every rank's pixels of one micro step; 'local', one rank's, as published.
    """

    segmentation: tuple[Literal["ce", "dice", "focal"], ...] = ("ce", "dice")
    consistency: Literal["ce", "kl", "mse", "none"] = "ce"
    consistency_weight: float = 1.0
    confidence: Literal["entropy", "gini"] = "entropy"
    select: bool = True
    keep_share: float = 0.5
    ramp: Literal["exp", "linear", "none"] = "exp"
    ramp_epochs: float = 80.0
    prior: Literal["t", "s", "ts", "none"] = "ts"
    prior_weight: float = 0.15
    uniform_weight: float = 0.05
    scope: Literal["global", "micro", "local"] = "global"

    def __post_init__(self) -> None:
        ok = bool(self.segmentation) and len(set(self.segmentation)) == len(self.segmentation)
        _require(ok, "loss.segmentation", self.segmentation, "give one or more distinct terms out of ce, dice, focal")
        _require(0 <= self.keep_share <= 1, "loss.keep_share", self.keep_share, "give a share in [0, 1]")
        _require(self.ramp_epochs >= 0, "loss.ramp_epochs", self.ramp_epochs, "give 0 or more epochs")
        _require(self.consistency_weight >= 0, "loss.consistency_weight", self.consistency_weight, "give 0 or more")
        ok = self.prior_weight >= 0 and self.uniform_weight >= 0 and self.prior_weight + self.uniform_weight <= 1
        _require(
            ok,
            "loss.prior_weight + loss.uniform_weight",
            self.prior_weight + self.uniform_weight,
            "both are 0 or more and add up to at most 1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long, at which rate. Lengths are in epochs of training samples, whatever the batch and the world size.

    Args:
        epochs: Length of the run; one epoch shows each training location once, in one of its seasons.
        lr: Adam's learning rate.
        weight_decay: Adam's L2 penalty.
        schedule: 'plateau' cuts the rate when the validation loss stalls (as published), 'cosine' decays it to
            `min_lr` over the run.
        warmup_epochs: Linear warm-up from 0, for either schedule.
        min_lr: Floor of the learning rate.
        plateau_patience: Validations without a better loss before the rate is cut.
        plateau_factor: Factor of a cut.
        validate_every_epochs: Interval of validation. The start and the end are always validated.
        log_every_steps: Optimiser steps between two lines of training metrics; figures are means over the interval.
        panel_samples: Validation samples drawn in the prediction panel.
    """

    epochs: float = 200.0
    lr: float = 5e-3
    weight_decay: float = 1e-8
    schedule: Literal["plateau", "cosine"] = "plateau"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    plateau_patience: int = 30
    plateau_factor: float = 0.5
    validate_every_epochs: float = 1.0
    log_every_steps: int = 10
    panel_samples: int = 6

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "train.epochs", self.epochs, "give more than 0")
        _require(self.lr > 0, "train.lr", self.lr, "give more than 0")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "give 0 or more")
        _require(0 <= self.warmup_epochs <= self.epochs, "train.warmup_epochs", self.warmup_epochs, "give 0 to train.epochs")
        _require(0 <= self.min_lr <= self.lr, "train.min_lr", self.min_lr, "give 0 to train.lr")
        _require(0 < self.plateau_factor < 1, "train.plateau_factor", self.plateau_factor, "give a factor in (0, 1)")
        _require(self.plateau_patience >= 0, "train.plateau_patience", self.plateau_patience, "give 0 or more")
        _require(self.validate_every_epochs > 0, "train.validate_every_epochs", self.validate_every_epochs, "give more than 0")
        _require(self.log_every_steps >= 1, "train.log_every_steps", self.log_every_steps, "give at least 1")
        _require(self.panel_samples >= 1, "train.panel_samples", self.panel_samples, "give at least 1")


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed. The DeepSpeed dictionary is generated from this.

    Args:
        global_batch: Samples of one optimiser step over all ranks.
        micro_batch: Samples of one forward pass on one rank; null derives it from the other two.
        accumulation_steps: Forward passes that one optimiser step adds up on each rank; null is 1, or follows from
            `micro_batch`, so that fewer ranks make more passes of the same size.
        precision: Arithmetic of the networks; losses, weights and batch norms are always float32. 'auto': bf16 on a GPU that
            has it, else fp16 on a GPU, fp32 on a CPU. fp16 scales the loss, dynamically.
        zero_stage: DeepSpeed ZeRO stage, 0-3.
        grad_clip: Largest norm of the gradient, 0 = no clipping.
        device: 'auto' takes a GPU where torch finds one.
        batch_norm: What batch norms normalise by: 'global', all ranks' pixels of a micro step; 'local', one rank's, as
            published.
        channels_last: Whether channels come last in the memory of images and activations; 'auto' is true on a GPU.
        activation_checkpointing: Whether activations are computed again in the backward pass instead of kept; 'auto' does it
            on a GPU where they would not fit.
        compile: Whether torch.compile builds the networks' kernels, which takes minutes; 'auto' is false.
        fused_optimizer: Whether Adam is one kernel; 'auto' is true.
    """

    global_batch: int = 128
    micro_batch: int | None = None
    accumulation_steps: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: int = 0
    grad_clip: float = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_norm: Literal["global", "local"] = "global"
    channels_last: Literal["auto"] | bool = "auto"
    activation_checkpointing: Literal["auto"] | bool = "auto"
    compile: Literal["auto"] | bool = "auto"
    fused_optimizer: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        _require(self.global_batch >= 1, "engine.global_batch", self.global_batch, "give at least 1")
        _require(
            self.micro_batch is None or self.micro_batch >= 1, "engine.micro_batch", self.micro_batch, "give at least 1 or null"
        )
        ok = self.accumulation_steps is None or self.accumulation_steps >= 1
        _require(ok, "engine.accumulation_steps", self.accumulation_steps, "give at least 1 or null")
        _require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "give 0, 1, 2 or 3")
        _require(self.grad_clip >= 0, "engine.grad_clip", self.grad_clip, "give 0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, so that it can go on after a crash, on the same or another number of ranks.

    Args:
        every_epochs: Interval in epochs of training samples. The end is always saved.
        keep: Verified checkpoints that are kept, the newest ones.
        on_failure: What a saving that fails does, on a full disk, say: 'continue' trains on with the older ones and tells,
            'stop' ends the run.
    """

    every_epochs: float = 1.0
    keep: int = 2
    on_failure: Literal["continue", "stop"] = "continue"

    def __post_init__(self) -> None:
        _require(self.every_epochs > 0, "checkpoint.every_epochs", self.every_epochs, "give more than 0")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "give at least 1")


@dataclass(frozen=True)
class FaultConfig:
    """What becomes of steps that go wrong, and of ranks that hang.

    Args:
        max_bad_steps: Steps in a row whose loss or gradient is not finite, after which the run ends; each of them is skipped
            on all ranks, and none is saved, so that it can go on from before them.
        spike: A loss above `spike_factor` times the median of the last `spike_window`: 'report' tells and counts, 'skip' also
            leaves the step out (two in a row at most, then that is the new level), 'off' does not look.
        spike_factor: See `spike`.
        spike_window: Steps.
        bundles: Bad steps of a run that are kept with their weights, for `cromss replay`.
        hang_timeout_s: Seconds without a sign of life, after which a rank dumps its stacks and the run ends. A step, a batch
            of validation, a wait for data or saving must not take as long.
    """

    max_bad_steps: int = 5
    spike: Literal["off", "report", "skip"] = "report"
    spike_factor: float = 10.0
    spike_window: int = 128
    bundles: int = 3
    hang_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        _require(self.max_bad_steps >= 1, "faults.max_bad_steps", self.max_bad_steps, "give at least 1")
        _require(self.spike_factor > 1, "faults.spike_factor", self.spike_factor, "give more than 1")
        _require(self.spike_window >= 2, "faults.spike_window", self.spike_window, "give at least 2")
        _require(self.bundles >= 0, "faults.bundles", self.bundles, "give 0 or more")
        _require(1 <= self.hang_timeout_s <= 1e6, "faults.hang_timeout_s", self.hang_timeout_s, "give 1 to 1e6 seconds")


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is recorded and what its encoders are called.

    Args:
        uri: MLflow tracking URI, without a password, since the run records it; null is `sqlite:///<output>/mlflow.db`.
        experiment: MLflow experiment.
        model_prefix: Encoders are registered as `<model_prefix>-<encoder>-<modality>`.
        alias: Alias that the new versions get.
        register: Whether encoders are registered at the end; their packages are written in any case.
        licence: SPDX licence of the encoders, for their cards.
    """

    uri: str | None = None
    experiment: str = "cromss"
    model_prefix: str = "cromss"
    alias: str = "candidate"
    register: bool = True
    licence: str = "Apache-2.0"

    def __post_init__(self) -> None:
        if self.uri is not None and re.search(r"://[^/]*:[^/]*@", self.uri):
            raise ConfigError(  # without the value
                "tracking.uri holds a password, which would be recorded with the run and its encoders; take it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD for PostgreSQL."
            )


@dataclass(frozen=True)
class LaunchConfig:
    """Which processes run it.

    Args:
        workers: Processes; null takes one a GPU, or one on a machine without GPU; on a cluster those of all its nodes.
        min_workers: Processes that are enough to go on when machines are lost or not there yet, as far as the global batch
            divides by them; more are taken as they come. null: all of `workers`, or those of `cluster.min_nodes`.
        cpus_per_worker: CPU cores of each worker: Ray reserves them, torch uses that many threads.
        ray: Whether Ray starts the workers. false runs one worker in this process, for debugging: same numbers.
        max_restarts: Times in a row that the workers are started again after one died or hung, without a new checkpoint in
            between; the run goes on from its last one. Machines that come or are taken back with a notice do not count.
    """

    workers: int | None = None
    min_workers: int | None = None
    cpus_per_worker: int = 1
    ray: bool = True
    max_restarts: int = 3

    def __post_init__(self) -> None:
        _require(self.workers is None or self.workers >= 1, "launch.workers", self.workers, "give at least 1 or null")
        ok = self.min_workers is None or 1 <= self.min_workers <= (self.workers or self.min_workers)
        _require(ok, "launch.min_workers", self.min_workers, "give 1 to launch.workers, or null")
        _require(self.cpus_per_worker >= 1, "launch.cpus_per_worker", self.cpus_per_worker, "give at least 1")
        _require(self.max_restarts >= 0, "launch.max_restarts", self.max_restarts, "give 0 or more")
        _require(
            self.ray or self.workers in (None, 1), "launch.workers", self.workers, "launch.ray=false runs one worker; set it to 1"
        )


@dataclass(frozen=True)
class RunConfig:
    """A pretraining run.

    Args:
        name: Name of the run: its folder under `output` and its MLflow run.
        output: Folder of runs; the MLflow store lies here by default.
        seed: Seeds weights, data order, season and augmentation draws, and the validation split.
        data: What is read.
        model: The networks.
        loss: CromSS.
        train: Length, learning rate, validation.
        engine: How a step is computed.
        checkpoint: When the run is saved.
        faults: What becomes of bad steps and hanging ranks.
        tracking: MLflow run and registry.
        launch: Processes.
    """

    name: str = "pretrain"
    output: str = "runs"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        _require(ok, "name", self.name, "use letters, digits, '.', '_' and '-', starting with a letter or digit")
        side = 2**self.model.encoder_depth
        _require(
            self.data.crop_px % side == 0,
            "data.crop_px",
            self.data.crop_px,
            f"give a multiple of {side} = 2 ** model.encoder_depth",
        )

    def with_absolute_paths(self) -> "RunConfig":
        """The same config with paths that hold in every worker, whatever its working directory."""
        shards = self.data.shards
        reading, filtered = self.data.reading, self.data.filter
        data = replace(
            self.data,
            shards={_absolute(name): weight for name, weight in shards.items()}
            if isinstance(shards, dict)
            else _absolute(shards),
            filter=replace(filtered, quality=tuple(_absolute(path) for path in filtered.quality)),
            reading=replace(reading, cache=reading.cache and _absolute(reading.cache)),
        )
        tracking, sqlite = self.tracking, "sqlite:///"
        if tracking.uri is not None and tracking.uri.startswith(sqlite):
            tracking = replace(tracking, uri=f"{sqlite}{Path(tracking.uri.removeprefix(sqlite)).absolute()}")
        return replace(self, data=data, tracking=tracking, output=str(Path(self.output).absolute()))

    @property
    def tracking_uri(self) -> str:
        """The MLflow store of the run: the config's, or SQLite in the folder of runs."""
        return self.tracking.uri or f"sqlite:///{Path(self.output).absolute() / 'mlflow.db'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        """sha256 (hex) of the resolved config."""
        content = self.to_dict()
        content["data"]["shards"] = list(self.data.weights.items())  # in order: it numbers the samples of a mixture
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class BatchPlan:
    """How one optimiser step is cut: global_batch = micro_batch x accumulation_steps x world_size, in samples."""

    global_batch: int
    micro_batch: int
    accumulation_steps: int
    world_size: int


def plan_batches(engine: EngineConfig, world_size: int) -> BatchPlan:
    """The batch arithmetic of a run on `world_size` ranks.

    Raises:
        BatchError: the numbers do not multiply.
    """
    if engine.accumulation_steps is None and engine.micro_batch is not None:
        passes, left = divmod(engine.global_batch, engine.micro_batch * world_size)
        if left:
            raise BatchError(
                f"engine.global_batch={engine.global_batch} does not divide by micro_batch {engine.micro_batch} x world "
                f"{world_size} = {engine.micro_batch * world_size}; set engine.global_batch to a multiple of that, or change "
                "engine.micro_batch or the number of workers."
            )
        return BatchPlan(engine.global_batch, engine.micro_batch, passes, world_size)
    accumulation = engine.accumulation_steps or 1
    parts = accumulation * world_size
    micro = engine.micro_batch if engine.micro_batch is not None else engine.global_batch // parts
    if micro * parts != engine.global_batch:
        if engine.micro_batch is None:
            below, above = micro * parts, (micro + 1) * parts
            raise BatchError(
                f"engine.global_batch={engine.global_batch} does not divide by accumulation {accumulation} x "
                f"world {world_size} = {parts}; set engine.global_batch to {f'{below} or ' if below else ''}{above}, or change "
                "engine.accumulation_steps or launch.workers."
            )
        raise BatchError(
            f"engine.global_batch={engine.global_batch} is not micro_batch {micro} x accumulation {accumulation} x "
            f"world {world_size} = {micro * parts}; set engine.global_batch to {micro * parts}, or change engine.micro_batch "
            "(null derives it) or engine.accumulation_steps."
        )
    return BatchPlan(engine.global_batch, micro, accumulation, world_size)


def valid_worlds(engine: EngineConfig, least: int, most: int) -> tuple[int, ...]:
    """Numbers of ranks from `least` to `most` that the batch divides over, in this order."""
    worlds = []
    for world in range(least, most + 1):
        try:
            plan_batches(engine, world)
        except BatchError:
            continue
        worlds.append(world)
    return tuple(worlds)

"""The whole run as frozen, typed dataclasses; they are the schema.

Layer 1. YAML files in `configs/` state only what differs from the defaults here, which are the published recipe
(CromSS, section IV-A). Dotted overrides come last: `--engine.global_batch 64`.
"""

from dataclasses import dataclass, field
from typing import Literal

from cromss_dist.errors import BatchError, ConfigError
from cromss_dist.schema import S1_BANDS, S2_BANDS, check_bands


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r} is not allowed; {allowed}.")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is augmented.

    Args:
        shards: Folder with `manifest.json`, written by `tools/shard.py`.
        s1_bands: Sentinel-1 bands by name, in the order the model sees them.
        s2_bands: Sentinel-2 bands by name, in the order the model sees them.
        crop_px: Side of the random training crop, px at 10 m.
        flip_p: Probability of a flip (horizontal, vertical or both, equally likely).
        rotate_p: Probability of a rotation.
        rotate_max_deg: Rotation angles are uniform in +- this, degrees.
        val_fraction: Share of the locations held out for validation; at least one.
        val_seasons: Seasons of each held-out location that are scored.
        reader_threads: Threads that read and check samples on each rank.
        prefetch_batches: Batches read ahead on each rank.
    """

    shards: str = "shards"
    s1_bands: tuple[str, ...] = S1_BANDS
    s2_bands: tuple[str, ...] = S2_BANDS
    crop_px: int = 256
    flip_p: float = 0.5
    rotate_p: float = 0.2
    rotate_max_deg: float = 90.0
    val_fraction: float = 0.01
    val_seasons: tuple[int, ...] = (0, 1, 2, 3)
    reader_threads: int = 2
    prefetch_batches: int = 2

    def __post_init__(self) -> None:
        check_bands("s1", self.s1_bands)
        check_bands("s2", self.s2_bands)
        _require(self.crop_px >= 16, "data.crop_px", self.crop_px, "give at least 16 px")
        for name in ("flip_p", "rotate_p"):
            _require(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "give a probability in [0, 1]")
        _require(0 <= self.rotate_max_deg <= 180, "data.rotate_max_deg", self.rotate_max_deg, "give 0 to 180 degrees")
        _require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "give a share in (0, 1)")
        ok = bool(self.val_seasons) and set(self.val_seasons) <= {0, 1, 2, 3} and len(set(self.val_seasons)) == len(self.val_seasons)
        _require(ok, "data.val_seasons", self.val_seasons, "give distinct seasons out of 0, 1, 2, 3")
        _require(self.reader_threads >= 1, "data.reader_threads", self.reader_threads, "give at least 1")
        _require(self.prefetch_batches >= 1, "data.prefetch_batches", self.prefetch_batches, "give at least 1")


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
        scope: What selection, Dice and sums see: 'global', every rank's pixels of one micro step; 'local', one
            rank's, as published.
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
    scope: Literal["global", "local"] = "global"

    def __post_init__(self) -> None:
        ok = bool(self.segmentation) and len(set(self.segmentation)) == len(self.segmentation)
        _require(ok, "loss.segmentation", self.segmentation, "give one or more distinct terms out of ce, dice, focal")
        _require(0 <= self.keep_share <= 1, "loss.keep_share", self.keep_share, "give a share in [0, 1]")
        _require(self.ramp_epochs >= 0, "loss.ramp_epochs", self.ramp_epochs, "give 0 or more epochs")
        _require(self.consistency_weight >= 0, "loss.consistency_weight", self.consistency_weight, "give 0 or more")
        ok = self.prior_weight >= 0 and self.uniform_weight >= 0 and self.prior_weight + self.uniform_weight <= 1
        _require(ok, "loss.prior_weight + loss.uniform_weight", self.prior_weight + self.uniform_weight, "both are 0 or more and add up to at most 1")

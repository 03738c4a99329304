"""What is trained: networks, loss, length and rate.

Layer 1.
"""

from dataclasses import dataclass
from typing import Literal

from cromss_dist.config.check import require


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
        require(3 <= self.encoder_depth <= 5, "model.encoder_depth", self.encoder_depth, "give 3, 4 or 5")
        require(
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
        consistency_reliability: 'agreement' lets a branch pull the other as far as the labels confirm its class against the
            other's, so that one which cannot see a class does not take it from one which can; 'none' as published.
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
    consistency_reliability: Literal["none", "agreement"] = "none"
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
        require(ok, "loss.segmentation", self.segmentation, "give one or more distinct terms out of ce, dice, focal")
        require(0 <= self.keep_share <= 1, "loss.keep_share", self.keep_share, "give a share in [0, 1]")
        require(self.ramp_epochs >= 0, "loss.ramp_epochs", self.ramp_epochs, "give 0 or more epochs")
        require(self.consistency_weight >= 0, "loss.consistency_weight", self.consistency_weight, "give 0 or more")
        require(
            self.consistency != "none" or self.consistency_reliability == "none",
            "loss.consistency_reliability",
            self.consistency_reliability,
            "there is no consistency to weigh (loss.consistency is none); give none, or a loss.consistency",
        )
        ok = self.prior_weight >= 0 and self.uniform_weight >= 0 and self.prior_weight + self.uniform_weight <= 1
        require(
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
            `min_lr`.
        decay_epochs: Epoch at which the cosine has come down, and the rate stays; null is the end of the run.
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
    decay_epochs: float | None = None
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    plateau_patience: int = 30
    plateau_factor: float = 0.5
    validate_every_epochs: float = 1.0
    log_every_steps: int = 10
    panel_samples: int = 6

    def __post_init__(self) -> None:
        require(self.epochs > 0, "train.epochs", self.epochs, "give more than 0")
        require(self.lr > 0, "train.lr", self.lr, "give more than 0")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "give 0 or more")
        require(0 <= self.warmup_epochs <= self.epochs, "train.warmup_epochs", self.warmup_epochs, "give 0 to train.epochs")
        ok = self.decay_epochs is None or self.decay_epochs > self.warmup_epochs
        require(ok, "train.decay_epochs", self.decay_epochs, "give more than train.warmup_epochs, or null")
        ok = self.decay_epochs is None or self.schedule == "cosine"
        require(ok, "train.decay_epochs", self.decay_epochs, "it is of train.schedule=cosine; set it to null")
        require(0 <= self.min_lr <= self.lr, "train.min_lr", self.min_lr, "give 0 to train.lr")
        require(0 < self.plateau_factor < 1, "train.plateau_factor", self.plateau_factor, "give a factor in (0, 1)")
        require(self.plateau_patience >= 0, "train.plateau_patience", self.plateau_patience, "give 0 or more")
        require(self.validate_every_epochs > 0, "train.validate_every_epochs", self.validate_every_epochs, "give more than 0")
        require(self.log_every_steps >= 1, "train.log_every_steps", self.log_every_steps, "give at least 1")
        require(self.panel_samples >= 1, "train.panel_samples", self.panel_samples, "give at least 1")

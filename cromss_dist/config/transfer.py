"""A transfer run: encoders, a decoder, a downstream set, and how much of its labels.

Layer 1. The defaults are the recipe of the paper (CromSS, section V-A).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from cromss_dist.config.check import require
from cromss_dist.config.data import ReadingConfig, ViewConfig, absolute_location
from cromss_dist.config.engine import EngineConfig
from cromss_dist.config.operation import CheckpointConfig
from cromss_dist.config.recipe import TrainConfig
from cromss_dist.config.run import BaseRunConfig
from cromss_dist.errors import ConfigError
from cromss_dist.schema import BANDS, MODALITIES, Modality, check_bands


@dataclass(frozen=True)
class DownstreamConfig(ViewConfig):
    """The downstream set and how it is augmented.

    Args:
        train: Folder or URL with `manifest.json` of the tiles to train on.
        test: Folder or URL with `manifest.json` of the tiles to score.
        seasons: Seasons that are trained on and scored; null takes all. Most downstream sets have one.
        window: Tiles that are shuffled among themselves, at least.
        reading: How tiles get from files into batches.
    """

    train: str = "train"
    test: str = "test"
    seasons: tuple[int, ...] | None = None
    window: int = 2048
    reading: ReadingConfig = field(default_factory=ReadingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seasons is None or len(self.seasons) > 0, "data.seasons", self.seasons, "give at least one, or null")
        require(self.window >= 1, "data.window", self.window, "give at least 1 tile")


@dataclass(frozen=True)
class EncoderConfig:
    """The encoders: of the registry or a folder by reference, or random ones by name.

    Args:
        s1: Reference of the Sentinel-1 encoder (`name@alias`, `name/version`, a folder); null uses no Sentinel-1.
        s2: Reference of the Sentinel-2 encoder; null uses no Sentinel-2. With both, their features are put side by side.
        init: 'pretrained' takes their weights; 'random' takes their architecture with new ones, the baseline.
        name: Architecture by smp's or timm's name instead of references; `init` is 'random' then.
        depth: Stages of `name`, 3-5.
        s1_bands: Sentinel-1 bands that are fed, in order; null as the encoder was trained. With `name`: of a random encoder.
        s2_bands: Sentinel-2 bands likewise.
        missing: What to do about bands that an encoder was not trained with: 'error', 'zeros' or 'mean'.
    """

    s1: str | None = None
    s2: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    name: str | None = None
    depth: int = 5
    s1_bands: tuple[str, ...] | None = None
    s2_bands: tuple[str, ...] | None = None
    missing: Literal["error", "zeros", "mean"] = "error"

    def __post_init__(self) -> None:
        for modality in MODALITIES:
            if (bands := self.bands(modality)) is not None:
                check_bands(modality, bands)
        refs = {m: ref for m in MODALITIES if (ref := self.ref(m)) is not None}
        if self.name is None:
            for m in MODALITIES:
                ok = self.bands(m) is None or m in refs or not refs
                require(ok, f"encoder.{m}_bands", self.bands(m), f"there is no encoder.{m} to feed them to; give one, or null")
            return
        require(not refs, "encoder.name", self.name, f"encoder.{'/'.join(refs)} says which encoder it is; give one of them")
        require(self.init == "random", "encoder.init", self.init, "an encoder by name has no weights; set it to random")
        require(3 <= self.depth <= 5, "encoder.depth", self.depth, "give 3, 4 or 5")
        if not self.modalities:
            raise ConfigError(
                f"encoder.name={self.name!r} needs bands to say which modality it sees: set encoder.s2_bands to some of "
                f"{', '.join(BANDS['s2'])}, or encoder.s1_bands to some of {', '.join(BANDS['s1'])}."
            )

    def ref(self, modality: Modality) -> str | None:
        """Reference of the encoder of a modality."""
        return self.s1 if modality == "s1" else self.s2

    def bands(self, modality: Modality) -> tuple[str, ...] | None:
        """Bands of a modality that are asked for."""
        return self.s1_bands if modality == "s1" else self.s2_bands

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What is seen, S1 first."""
        return tuple(m for m in MODALITIES if (self.bands(m) if self.name else self.ref(m)) is not None)


@dataclass(frozen=True)
class LabelsConfig:
    """How much of the training labels is used. Fewer are always among more, and the same for every encoder.

    Args:
        fraction: Share of the training tiles, in (0, 1].
        per_class: Tiles of each class; null takes `fraction`.
        seed: Of the choice; independent of the run's.
    """

    fraction: float = 1.0
    per_class: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "labels.fraction", self.fraction, "give a share in (0, 1]")
        require(self.per_class is None or self.per_class >= 1, "labels.per_class", self.per_class, "give at least 1 or null")
        ok = self.per_class is None or self.fraction == 1
        require(ok, "labels.per_class", self.per_class, f"labels.fraction={self.fraction} is given, too; give one of them")


@dataclass(frozen=True)
class TransferConfig(BaseRunConfig):
    """A transfer run: a new decoder on pretrained encoders, trained and scored on a downstream set.

    Args:
        name: Name of the run: its folder under `output` and its MLflow run.
        task: Name of the downstream set in results and evidence: 'dw'; lower-case letters, digits, '_', '-'.
        variant: What the encoders are called in tables; empty takes their references.
        replicate: Tells encoders of one variant apart, as pretrained with another seed.
        data: The downstream set.
        encoder: The encoders.
        decoder: 'deeplabv3plus', 'fpn', 'pspnet', 'unet', or 'light': 1 x 1 convolutions alone.
        decoder_channels: Widths: of 'unet' a block each stage, of 'fpn' pyramid and segmentation, of the others one; null is
            smp's.
        mode: 'frozen' trains the decoder alone, 'finetuned' the encoders too; 'linear' and 'knn' are quick looks without a
            decoder.
        protocol: 'default' scores every pixel of every test tile; 'paper' repeats the quirks of the published evaluation.
        labels: How much of the training labels is used.
        segmentation: Terms of the loss that are added up: 'ce', 'dice', 'focal'.
        evidence: Whether the scores are added to the encoder's version in the registry.
    """

    FIXED: ClassVar[tuple[str, ...]] = (
        *BaseRunConfig.FIXED, "task", "data.", "encoder.", "decoder", "mode", "protocol", "labels.", "segmentation",
    )  # fmt: skip
    # The loader compares the training tiles themselves, wherever they lie.
    FREE: ClassVar[tuple[str, ...]] = ("data.train", "data.test", "data.reading.")

    name: str = "transfer"
    task: str = "downstream"
    variant: str = ""
    replicate: int = 0
    data: DownstreamConfig = field(default_factory=DownstreamConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: Literal["deeplabv3plus", "fpn", "pspnet", "unet", "light"] = "deeplabv3plus"
    decoder_channels: tuple[int, ...] | None = None
    mode: Literal["frozen", "finetuned", "linear", "knn"] = "frozen"
    protocol: Literal["default", "paper"] = "default"
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    segmentation: tuple[Literal["ce", "dice", "focal"], ...] = ("ce", "dice")
    evidence: bool = False
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=50.0, lr=5e-4, schedule="cosine", min_lr=1e-5, decay_epochs=40.0)
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(global_batch=32))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every_epochs=10.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = set("abcdefghijklmnopqrstuvwxyz0123456789_-")
        ok = bool(self.task) and set(self.task) <= allowed and self.task[0] not in "_-"
        require(ok, "task", self.task, "use lower-case letters, digits, '_' and '-', starting with a letter or digit")
        ok = bool(self.segmentation) and len(set(self.segmentation)) == len(self.segmentation)
        require(ok, "segmentation", self.segmentation, "give one or more distinct terms out of ce, dice, focal")
        ok = self.train.schedule == "cosine"
        require(ok, "train.schedule", self.train.schedule, "nothing is held out by which a plateau is seen; set it to cosine")
        ok = self.decoder_channels is None or (len(self.decoder_channels) > 0 and min(self.decoder_channels) >= 1)
        require(ok, "decoder_channels", self.decoder_channels, "give numbers of at least 1, or null")
        if not self.encoder.modalities:
            raise ConfigError(
                "encoder.s1=None and encoder.s2=None leave nothing to transfer; give the reference of an encoder as --encoder.s2 "
                "REF or --encoder.s1 REF, or --encoder.name with bands for a random one."
            )

    @property
    def quick_look(self) -> bool:
        """Whether nothing is trained: no decoder, no steps, no checkpoints."""
        return self.mode in ("linear", "knn")

    def with_absolute_paths(self) -> Self:
        """The same config with paths that hold in every worker, whatever its working directory."""
        data, encoder = self.data, self.encoder
        reading = replace(data.reading, cache=data.reading.cache and absolute_location(data.reading.cache))
        data = replace(data, train=absolute_location(data.train), test=absolute_location(data.test), reading=reading)
        encoder = replace(encoder, s1=encoder.s1 and _absolute_ref(encoder.s1), s2=encoder.s2 and _absolute_ref(encoder.s2))
        return replace(super().with_absolute_paths(), data=data, encoder=encoder)


def _absolute_ref(ref: str) -> str:
    """A folder that holds in every working directory; a reference to the registry as it is (as `encoders.load` tells them)."""
    folder = Path(ref).expanduser()
    return str(folder.absolute()) if folder.is_dir() or ref.startswith((".", "/", "~")) else ref

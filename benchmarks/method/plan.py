"""What the proof consists of: its sizes, the variants of the pretraining, the settings of the transfer, and all its runs."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypeAlias

from cromss_dist.data.synthetic import Noise
from cromss_dist.schema import Modality

Archive: TypeAlias = Literal["default", "clean", "uniform", "image-only"]  # what a pretraining reads
RANDOM = "random"  # the encoder that nothing was pretrained for

# What each variant changes of `LossConfig`, whose defaults are CromSS as published; first weights, order, augmentation are equal.
PLAIN: dict[str, Any] = {"select": False, "consistency": "none", "prior": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,  # CE + Dice of each branch with the noisy labels
    "cromss": {},
    "no-consistency": {"consistency": "none"},
    "reliability": {"consistency_reliability": "agreement"},  # beyond the paper: docs/method.md
    "weak-consistency": {"consistency_weight": 0.5},  # the remedy also ties less: what that alone does
    "clean": PLAIN,  # the same with the truth as labels: what there is to win
}
Control: TypeAlias = Literal["uniform", "image-only"]
CONTROLS: tuple[Control, ...] = ("uniform", "image-only")  # noise that confidence must find, and noise that S2 must not

_SEEDS = {"pretraining": 1, "labelled": 2, "test": 3}  # of the archives: no place is in two of them


@dataclass(frozen=True)
class Pretraining:
    """One pretraining: a variant, the labels it reads, a seed."""

    variant: str
    archive: Archive
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder: 'cromss-0', 'cromss-uniform-0'."""
        control = f"-{self.archive}" if self.archive in CONTROLS else ""
        return f"{self.variant}{control}-{self.seed}"


def pretraining_of(variant: str, seed: int) -> Pretraining:
    """The pretraining whose encoders are compared with others of that seed."""
    return Pretraining(variant, "clean" if variant == "clean" else "default", seed)


@dataclass(frozen=True)
class Setting:
    """One kind of transfer.

    Args:
        modality: What the encoder sees.
        mode: Whether the encoder is trained, too.
        labels: Clean tiles that are trained on.
        decoder: What is put on the encoder: 'light' leaves most of the work to it.
    """

    modality: Modality
    mode: Literal["frozen", "finetuned"]
    labels: int
    decoder: Literal["light", "unet"]

    @property
    def name(self) -> str:
        """For tables and folders: 's2-frozen-32-light'."""
        return f"{self.modality}-{self.mode}-{self.labels}-{self.decoder}"


@dataclass(frozen=True)
class Transfer:
    """One transfer: an encoder by its variant and seed, a setting, a choice of labelled tiles."""

    variant: str
    seed: int
    setting: Setting
    subset: int

    @property
    def name(self) -> str:
        """Of its run folder, below that of the setting."""
        return f"{self.setting.name}/{self.variant}-{self.seed}-{self.subset}"


@dataclass(frozen=True)
class Size:
    """How large the proof is.

    Args:
        places: Places to pretrain on, 4 seasons each.
        control_places: The same of each control; 0 = no controls.
        test_places: Places to test on, none of them seen before.
        labelled_places: Places whose truth the transfer may have, one season each.
        patch_px: Side of a patch at 10 m.
        encoder: Of both modalities, by smp's name.
        decoder_channels: Of the pretraining's U-Net, one number a stage of the encoder.
        crop_px: Side of a training crop.
        batch: Samples of a pretraining step.
        steps: Of a pretraining.
        lr: Adam's rate at its start.
        transfer_batch: Samples of a transfer step.
        transfer_steps: Of a transfer.
        transfer_lr: Adam's rate at its start.
        variants: Names in `VARIANTS`.
        seeds: Pretraining seeds, which are also those of decoders and of random encoders.
        settings: Kinds of transfer.
        subsets: Choices of labelled tiles.
        device: 'cpu' or 'cuda'.
        processes: Runs at a time, unless the command line says so.
    """

    places: int
    control_places: int
    test_places: int
    labelled_places: int
    patch_px: int
    encoder: str
    decoder_channels: tuple[int, ...]
    crop_px: int
    batch: int
    steps: int
    lr: float
    transfer_batch: int
    transfer_steps: int
    transfer_lr: float
    variants: tuple[str, ...]
    seeds: int
    settings: tuple[Setting, ...]
    subsets: int
    device: Literal["cpu", "cuda"] = "cpu"
    processes: int = 2

    @property
    def controls(self) -> tuple[Control, ...]:
        """Other kinds of noise that are tried."""
        return CONTROLS if self.control_places else ()

    @property
    def pretrainings(self) -> tuple[Pretraining, ...]:
        """Every pretraining; controls with the published loss and one seed."""
        runs = [pretraining_of(variant, seed) for seed, variant in product(range(self.seeds), self.variants)]
        controls = [Pretraining("cromss", noise, 0) for noise in self.controls]
        return (*runs, *controls)

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Every transfer: each encoder in each setting with each choice of tiles."""
        encoders = product((RANDOM, *self.variants), range(self.seeds))
        return tuple(
            Transfer(variant, seed, setting, subset)
            for (variant, seed), setting, subset in product(encoders, self.settings, range(self.subsets))
        )

    def archive_of(self, part: str, noise: Noise = "default") -> dict[str, Any]:
        """What `SyntheticConfig` takes for the archive of 'pretraining', 'labelled' or 'test' places."""
        places = {"pretraining": self.places, "labelled": self.labelled_places, "test": self.test_places}[part]
        if noise in CONTROLS:
            places = min(places, self.control_places)
        return {"num_locations": places, "seed": _SEEDS[part], "size_px": self.patch_px, "noise": noise}


SETTINGS = (
    Setting("s2", "frozen", 8, "light"),
    Setting("s2", "frozen", 32, "light"),
    Setting("s2", "frozen", 32, "unet"),
    Setting("s2", "finetuned", 32, "unet"),
    Setting("s1", "frozen", 32, "light"),
)

# tu-test_resnet is the smallest ResNet of timm: 0.1 M parameters in four stages (strides 2 to 16); both branches have 0.44 M.
# An hour on two cores.
_FULL = Size(
    places=256,
    control_places=96,
    test_places=120,
    labelled_places=64,
    patch_px=96,
    encoder="tu-test_resnet",
    decoder_channels=(64, 32, 16, 8),
    crop_px=32,
    batch=16,
    steps=1600,
    lr=1.5e-3,
    transfer_batch=8,
    transfer_steps=400,
    transfer_lr=1e-3,
    variants=tuple(VARIANTS),
    seeds=2,
    settings=SETTINGS,
    subsets=3,
)

SIZES: dict[str, Size] = {
    "full": _FULL,
    # An hour and a half: whether twice the training gives the test more power.
    "long": replace(_FULL, steps=2 * _FULL.steps, settings=tuple(setting for setting in SETTINGS if setting.mode == "frozen")),
    # Two cores, a minute or two: shows that it runs, and that pretrained beats random. Ranks nothing.
    "smoke": Size(
        places=48,
        control_places=0,
        test_places=12,
        labelled_places=16,
        patch_px=48,
        encoder="tu-test_resnet",
        decoder_channels=(64, 32, 16, 8),
        crop_px=32,
        batch=16,
        steps=300,
        lr=3e-3,
        transfer_batch=8,
        transfer_steps=60,
        transfer_lr=3e-3,
        variants=("plain", "cromss", "clean"),
        seeds=1,
        settings=(Setting("s2", "frozen", 8, "light"),),
        subsets=1,
    ),
    # One GPU: the paper's network on patches of its size.
    "gpu": Size(
        places=512,
        control_places=0,
        test_places=120,
        labelled_places=64,
        patch_px=264,
        encoder="resnet50",
        decoder_channels=(256, 128, 64, 32, 16),
        crop_px=256,
        batch=32,
        steps=3200,
        lr=1e-3,
        transfer_batch=16,
        transfer_steps=400,
        transfer_lr=5e-4,
        variants=tuple(VARIANTS),
        seeds=1,
        settings=tuple(setting for setting in SETTINGS if setting.labels == 32),
        subsets=3,
        device="cuda",
        processes=1,
    ),
}

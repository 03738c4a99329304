"""Bands, classes, units, the normalisation contract, and the batch that travels from loader to model.

Layer 0: definitions only. Every such number has its one home here, with its source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.errors import BandError

if TYPE_CHECKING:  # importing torch takes seconds that `cromss registry list` and `--print_config` do not need
    from torch import Tensor

Modality: TypeAlias = Literal["s1", "s2"]
MODALITIES: tuple[Modality, Modality] = ("s1", "s2")

S1_BANDS = ("VV", "VH")
S2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
BANDS: dict[Modality, tuple[str, ...]] = {"s1": S1_BANDS, "s2": S2_BANDS}

# The band subsets of the paper by name: 3 = RGB, 9 = Dynamic World's, 12 = all but cirrus. Source: CromSS, section IV.
S2_RGB = ("B4", "B3", "B2")
S2_9 = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B11", "B12")
S2_12 = tuple(band for band in S2_BANDS if band != "B10")

# nm. S2: central wavelengths of Sentinel-2A's MSI, ESA's SentiWiki, "Sentinel-2 mission: spectral bands". S1: the carrier of the
# C-band SAR, 5.405 GHz (ESA Sentinel-1 user handbook), as a wavelength in vacuum; both polarisations share it.
WAVELENGTHS_NM: dict[Modality, dict[str, float]] = {
    "s1": dict.fromkeys(S1_BANDS, 299_792_458 / 5.405),
    "s2": dict(
        zip(
            S2_BANDS,
            (442.7, 492.7, 559.8, 664.6, 704.1, 740.5, 782.8, 832.8, 864.7, 945.1, 1373.5, 1613.7, 2202.4),
            strict=True,
        )
    ),
}

NUM_SEASONS = 4
IGNORE = 255  # label value of pixels that no loss and no metric counts


@dataclass(frozen=True)
class ArraySpec:
    """One array of a sample as it is stored: shape (season, band, H / scale, W / scale), or (season, H, W) for labels."""

    name: str
    bands: tuple[str, ...]
    scale: int  # native ground sampling distance over 10 m
    modality: Modality | None


# Native resolution of each Sentinel-2 band: ESA Sentinel-2 user handbook, table 1.
IMAGE_ARRAYS = (
    ArraySpec("s1", S1_BANDS, 1, "s1"),
    ArraySpec("s2_10m", ("B2", "B3", "B4", "B8"), 1, "s2"),
    ArraySpec("s2_20m", ("B5", "B6", "B7", "B8A", "B11", "B12"), 2, "s2"),
    ArraySpec("s2_60m", ("B1", "B9", "B10"), 6, "s2"),
)
LABEL_ARRAY = "label"
REFERENCE_ARRAY = "reference"  # clean truth beside the noisy label; synthetic archives have it
KIND_ARRAY = "kind"  # why a noisy label is wrong; synthetic archives have it


@dataclass(frozen=True)
class LandCoverClass:
    """A Dynamic World class: label value, name, display colour (RGB, 0-255)."""

    value: int
    name: str
    colour: tuple[int, int, int]


# Brown et al., "Dynamic World, Near real-time global 10 m land use land cover mapping", Sci Data 9:251 (2022), table 2.
CLASSES = (
    LandCoverClass(0, "water", (65, 155, 223)),
    LandCoverClass(1, "trees", (57, 125, 73)),
    LandCoverClass(2, "grass", (136, 176, 83)),
    LandCoverClass(3, "flooded_vegetation", (122, 135, 198)),
    LandCoverClass(4, "crops", (228, 150, 53)),
    LandCoverClass(5, "shrub", (223, 195, 90)),
    LandCoverClass(6, "built", (196, 40, 27)),
    LandCoverClass(7, "bare", (165, 155, 143)),
    LandCoverClass(8, "snow", (179, 159, 225)),
)
NUM_CLASSES = len(CLASSES)
CLASS_NAMES = tuple(c.name for c in CLASSES)

# Kinds of label noise in a synthetic archive's `kind` maps.
NOISE_KINDS = ("right", "border", "confusion", "appearance", "cloud")


@dataclass(frozen=True)
class Normalisation:
    """How physical values became uint8: u8 = trunc(clip((v - (mean - 2 std)) / (4 std) * 255, 0, 255)), a band at a time.

    It is a contract: it goes, with its digest, from manifest to run to registered encoder, and downstream data must
    be scaled the same way. `mean` and `std` are in `units`, in the order of `bands`.

    Reference: SSL4EO-S12 (Wang et al., 2023) for the rule and the statistics; truncation (not rounding) is what its
    code does by casting to uint8.
    """

    modality: Modality
    units: str
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rule: str = "trunc(clip((v - (mean - 2 std)) / (4 std) * 255, 0, 255))"

    @property
    def digest(self) -> str:
        """sha256 (hex) of the contract's canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def select(self, bands: Sequence[str]) -> Normalisation:
        """The contract of `bands`, in that order.

        Raises:
            BandError: a band is unknown.
        """
        check_bands(self.modality, bands)
        index = [self.bands.index(band) for band in bands]
        return Normalisation(
            self.modality,
            self.units,
            tuple(bands),
            tuple(self.mean[i] for i in index),
            tuple(self.std[i] for i in index),
            self.rule,
        )

    def to_uint8(self, values: npt.NDArray[np.generic], bands: Sequence[str]) -> npt.NDArray[np.uint8]:
        """Physical values, shape (..., band, H, W) in the order of `bands`, to uint8 of the same shape. NaN becomes 0."""
        part = self.select(bands)
        mean = np.asarray(part.mean, np.float32)[:, None, None]
        std = np.asarray(part.std, np.float32)[:, None, None]
        scaled = (values.astype(np.float32) - (mean - 2 * std)) / (4 * std) * np.float32(255)
        return np.nan_to_num(np.clip(scaled, 0, 255), nan=0.0).astype(np.uint8)


# Statistics of SSL4EO-S12: its repository's normalisation constants (S1 GRD in dB; S2 L1C digital numbers, reflectance x 10000).
S1_NORMALISATION = Normalisation("s1", "dB", S1_BANDS, (-12.54847273, -20.19237134), (5.25697717, 5.91150917))
S2_NORMALISATION = Normalisation(
    "s2",
    "reflectance x 10000 (L1C)",
    S2_BANDS,
    (
        1605.57504906, 1390.78157673, 1314.8729939, 1363.52445545, 1549.44374991, 2091.74883118, 2371.7172463,
        2299.90463006, 2560.29504086, 830.06605044, 22.10351321, 2177.07172323, 1524.06546312,
    ),
    (
        786.78685367, 850.34818441, 875.06484736, 1138.84957046, 1122.17775652, 1161.59187054, 1274.39184232,
        1248.42891965, 1345.52684884, 577.31607053, 51.15431158, 1336.09932639, 1136.53823676,
    ),
)  # fmt: skip
NORMALISATION: dict[Modality, Normalisation] = {"s1": S1_NORMALISATION, "s2": S2_NORMALISATION}


def check_bands(modality: Modality, bands: Sequence[str]) -> None:
    """Raises BandError unless `bands` are known, distinct and at least one."""
    known = BANDS[modality]
    unknown = [band for band in bands if band not in known]
    if unknown or not bands or len(set(bands)) != len(bands):
        problem = f"unknown {unknown}" if unknown else "none given" if not bands else "some given twice"
        raise BandError(f"{modality} bands {list(bands)}: {problem}; choose distinct names from {', '.join(known)}.")


@dataclass(frozen=True)
class Batch:
    """What the loader yields: stored values on the host, one season of the images, all seasons of the labels.

    B samples; S seasons; patches of H x W px at 10 m.
    """

    keys: tuple[str, ...]  # location keys, B of them
    sample_ids: Tensor  # int64 (B,): index of the location in the manifest; keys the random draws
    epochs: Tensor  # int64 (B,): the epoch each sample belongs to; keys the random draws
    seasons: Tensor  # int64 (B,): the drawn season, 0 to S - 1
    weights: Tensor  # float32 (B,): 1, or 0 for a sample that only fills the batch (evaluation)
    specs: tuple[ArraySpec, ...]  # the image arrays that were read
    images: dict[str, Tensor]  # array name -> uint8 (B, band, H / scale, W / scale)
    labels: Tensor  # uint8 (B, S, H, W): noisy labels, 255 = ignore
    reference: Tensor | None  # uint8 (B, H, W): reference label of the drawn season, 255 = ignore

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which a GPU can copy from while it computes; `DataLoader` calls this."""
        return replace(
            self,
            sample_ids=self.sample_ids.pin_memory(),
            epochs=self.epochs.pin_memory(),
            seasons=self.seasons.pin_memory(),
            weights=self.weights.pin_memory(),
            images={name: values.pin_memory() for name, values in self.images.items()},
            labels=self.labels.pin_memory(),
            reference=None if self.reference is None else self.reference.pin_memory(),
        )


@dataclass(frozen=True)
class Example:
    """What the model and the loss see: on the training device, cropped and augmented. h x w px."""

    images: dict[Modality, Tensor]  # of the modalities asked for, S1 first: float32 (B, bands, h, w) in [0, 1]
    label: Tensor  # int64 (B, h, w): noisy label of the drawn season, 255 = ignore
    prior: Tensor | None  # float32 (B, C, h, w): spatial-temporal class distribution, sums to 1 over C
    reference: Tensor | None  # int64 (B, h, w)
    weights: Tensor  # float32 (B,)

"""Noisy labels from the truth, with the kind of each error beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from cromss_dist.data.synthetic.fields import blur, gaussian_field
from cromss_dist.data.synthetic.optics import Optical
from cromss_dist.data.synthetic.settings import ByteArray, FloatArray, SyntheticConfig
from cromss_dist.schema import NOISE_KINDS, NUM_CLASSES, NUM_SEASONS, S2_BANDS

_RIGHT, _BORDER, _CONFUSION, _APPEARANCE, _CLOUD = range(len(NOISE_KINDS))

# Which class a coherent error takes, by true class (rows) and wrong class; rows are weights. After the confusions that
# Dynamic World reports against expert labels: shrub with grass, crops and bare; grass with crops; flooded with the wet and green.
_CONFUSION_TABLE = np.array(
    [  # water trees grass flood crops shrub built bare snow
        [0, 1, 1, 4, 1, 0, 2, 3, 1],
        [0, 0, 2, 1, 2, 5, 2, 0, 0],
        [0, 2, 0, 1, 5, 4, 1, 2, 0],
        [4, 2, 3, 0, 2, 2, 0, 1, 0],
        [0, 1, 4, 1, 0, 3, 1, 4, 0],
        [0, 3, 4, 1, 3, 0, 1, 4, 0],
        [0, 2, 1, 0, 2, 2, 0, 5, 0],
        [1, 0, 2, 0, 3, 4, 4, 0, 1],
        [2, 1, 0, 0, 1, 1, 2, 5, 0],
    ],
    np.float64,
)
# How much of each class coherent confusion reaches, relative to the mean rate.
_SUSCEPTIBILITY = np.array([0.5, 0.75, 1.35, 1.5, 0.8, 1.6, 0.9, 1.15, 0.8])

# What each class is thought to look like from Sentinel-2 alone, whatever the season: mean and standard deviation of the
# vegetation index (B8, B4), the water index (B3, B11), visible brightness and B11 (reflectance).
_STEREOTYPE_MEAN = np.array(
    [
        [-0.10, 0.55, 0.09, 0.02],
        [0.68, -0.35, 0.08, 0.14],
        [0.58, -0.42, 0.10, 0.22],
        [0.42, 0.05, 0.09, 0.10],
        [0.45, -0.42, 0.12, 0.25],
        [0.35, -0.42, 0.11, 0.22],
        [0.17, -0.20, 0.16, 0.23],
        [0.12, -0.35, 0.19, 0.33],
        [0.00, 0.70, 0.55, 0.10],
    ],
    np.float32,
)
_STEREOTYPE_STD = np.array(
    [
        [0.15, 0.25, 0.03, 0.03],
        [0.10, 0.12, 0.02, 0.05],
        [0.12, 0.10, 0.02, 0.05],
        [0.15, 0.15, 0.02, 0.05],
        [0.22, 0.12, 0.03, 0.07],
        [0.10, 0.10, 0.03, 0.06],
        [0.07, 0.06, 0.04, 0.05],
        [0.07, 0.10, 0.06, 0.09],
        [0.10, 0.20, 0.18, 0.08],
    ],
    np.float32,
)
_LOOK_PX = 2.0  # scale at which appearance is judged, px
_CLOUD_CLASSES = np.array([8, 6, 7, 5], np.uint8)  # snow, built, bare, shrub
_SHADOW_CLASSES = np.array([0, 1, 3], np.uint8)  # water, trees, flooded vegetation


@dataclass(frozen=True)
class Labels:
    """Noisy labels: `label` uint8 (4, H, W) 0-8, and `kind` uint8 (4, H, W), index into NOISE_KINDS."""

    label: ByteArray
    kind: ByteArray


def draw_labels(rng: np.random.Generator, truth: ByteArray, optical: Optical, config: SyntheticConfig) -> Labels:
    """Labels of the four seasons.

    Args:
        rng: The label stream of the location; nothing else draws from it.
        truth: uint8 (4, H, W), 0-8.
        optical: Its Sentinel-2 scenes: appearance errors and cloud errors follow them.
        config: Kind and rates of the noise.
    """
    match config.noise:
        case "none":
            return Labels(truth.copy(), np.zeros_like(truth))
        case "uniform":
            flipped = rng.random(truth.shape) < config.uniform_rate
            other = (truth + rng.integers(1, NUM_CLASSES, truth.shape)) % NUM_CLASSES
            return _labels(truth, [(_CONFUSION, flipped, other)])
        case "image-only":
            return _labels(truth, [(_APPEARANCE, *_appearance(rng, truth, optical, config.image_only_rate, config))])
        case "default":
            # Later layers cover earlier ones: a cloud hides whatever else would have gone wrong.
            layers = [
                (_BORDER, np.ones(truth.shape, np.bool_), _shifted(rng, truth, config)),
                (_CONFUSION, *_confused(rng, truth, config)),
                (_APPEARANCE, *_appearance(rng, truth, optical, config.appearance_rate, config)),
                (_CLOUD, *_clouded(rng, optical, config)),
            ]
            return _labels(truth, layers)


def _labels(truth: ByteArray, layers: Sequence[tuple[int, npt.NDArray[np.bool_], npt.NDArray[np.generic]]]) -> Labels:
    label, kind = truth.copy(), np.zeros_like(truth)
    for number, where, value in layers:
        label[where] = value.astype(np.uint8)[where]
        kind[where] = number
    kind[label == truth] = _RIGHT
    return Labels(label, kind)


class _SeasonFields:
    """Unit-variance fields, part of whose variance all seasons of the location share."""

    def __init__(self, rng: np.random.Generator, size: int, scale_px: float, count: int, share: float) -> None:
        self._rng, self._size, self._scale, self._count, self._share = rng, size, scale_px, count, share
        self._common = self._draw()

    def _draw(self) -> FloatArray:
        return np.stack([gaussian_field(self._rng, self._size, self._scale) for _ in range(self._count)])

    def season(self) -> FloatArray:
        """float32 (count, H, W) of the next season."""
        return np.asarray(np.sqrt(self._share) * self._common + np.sqrt(1 - self._share) * self._draw(), np.float32)


def _shifted(rng: np.random.Generator, truth: ByteArray, config: SyntheticConfig) -> ByteArray:
    """The truth moved by a pixel or two that differ over the patch, and rounded off: thin things vanish."""
    size = truth.shape[-1]
    fields = _SeasonFields(rng, size, 24, 2, config.season_share)
    row, col = np.indices((size, size))
    out = np.empty_like(truth)
    for season in range(NUM_SEASONS):
        move = np.rint(fields.season() * config.border_shift_px).astype(np.int64)
        moved = truth[season][np.clip(row + move[0], 0, size - 1), np.clip(col + move[1], 0, size - 1)]
        votes = blur((moved == np.arange(NUM_CLASSES)[:, None, None]).astype(np.float32), config.border_blur_px)
        out[season] = votes.argmax(axis=0)
    return out


def _confused(rng: np.random.Generator, truth: ByteArray, config: SyntheticConfig) -> tuple[npt.NDArray[np.bool_], ByteArray]:
    """Coherent patches that carry a class the true one is confused with; each place has its own bias."""
    size = truth.shape[-1]
    place_rate = config.confusion_rate * _SUSCEPTIBILITY * np.exp(rng.normal(-0.04, 0.28, NUM_CLASSES))
    place_table = np.log(np.maximum(_CONFUSION_TABLE, 1e-9)) + 0.6 * rng.gumbel(size=_CONFUSION_TABLE.shape)
    # No class may lose its majority in a place, or no method could find the truth.
    threshold = special.ndtri(1 - np.minimum(place_rate, 0.42)).astype(np.float32)
    # A Gaussian field stays above its threshold over about four standard deviations of its blur.
    where_fields = _SeasonFields(rng, size, config.patch_px / 4, 1, config.season_share)
    class_fields = _SeasonFields(rng, size, config.patch_px / 2, NUM_CLASSES, config.season_share)
    where = np.empty(truth.shape, np.bool_)
    wrong = np.empty_like(truth)
    for season in range(NUM_SEASONS):
        where[season] = where_fields.season()[0] > threshold[truth[season]]
        # Uniform by the normal distribution, then Gumbel: the largest sum draws a class by its weight, in patches.
        uniform = np.clip(special.ndtr(class_fields.season()), 1e-6, 1 - 1e-6)
        score = place_table.T[:, truth[season]] - np.log(-np.log(uniform))
        wrong[season] = score.argmax(axis=0)
    return where, wrong


def _appearance(
    rng: np.random.Generator, truth: ByteArray, optical: Optical, rate: float, config: SyntheticConfig
) -> tuple[npt.NDArray[np.bool_], ByteArray]:
    """Where one season's Sentinel-2 looks like another class, part of it labelled so: the rest of the evidence contradicts."""
    size = truth.shape[-1]
    fields = _SeasonFields(rng, size, 6, 1, config.season_share)
    where = np.empty(truth.shape, np.bool_)
    looks = np.empty_like(truth)
    for season in range(NUM_SEASONS):
        reflectance = blur(optical.toa[season], _LOOK_PX) / 10000
        blue, green, red, nir, swir = (reflectance[S2_BANDS.index(band)] for band in ("B2", "B3", "B4", "B8", "B11"))
        features = np.stack([(nir - red) / (nir + red), (green - swir) / (green + swir), (blue + green + red) / 3, swir])
        distance = np.stack(
            [
                (((features - mean[:, None, None]) / std[:, None, None]) ** 2).sum(axis=0) + 2 * np.log(std).sum()
                for mean, std in zip(_STEREOTYPE_MEAN, _STEREOTYPE_STD, strict=True)
            ]
        )
        looks[season] = distance.argmin(axis=0)
        chosen = fields.season()[0] > np.float32(special.ndtri(1 - rate))
        where[season] = chosen & (looks[season] != truth[season]) & (optical.cloud[season] < 0.1)
    return where, looks


def _clouded(rng: np.random.Generator, optical: Optical, config: SyntheticConfig) -> tuple[npt.NDArray[np.bool_], ByteArray]:
    """Clouds taken for bright classes and their shadows for dark ones, by patch."""
    size = optical.cloud.shape[-1]
    where = np.zeros(optical.cloud.shape, np.bool_)
    wrong = np.zeros(optical.cloud.shape, np.uint8)
    for season in range(NUM_SEASONS):
        hidden = optical.cloud[season] > 0.4
        dark = (optical.shadow[season] > 0.5) & ~hidden
        field = special.ndtr(gaussian_field(rng, size, 5))
        pick = special.ndtr(gaussian_field(rng, size, 7))
        where[season] = (hidden | dark) & (field < config.cloud_rate)
        bright = _CLOUD_CLASSES[np.minimum((pick * len(_CLOUD_CLASSES)).astype(np.int64), len(_CLOUD_CLASSES) - 1)]
        dim = _SHADOW_CLASSES[np.minimum((pick * len(_SHADOW_CLASSES)).astype(np.int64), len(_SHADOW_CLASSES) - 1)]
        wrong[season] = np.where(hidden, bright, dim)
    return where, wrong

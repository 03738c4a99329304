"""How well a score finds wrong labels, where the truth is known: average precision by kind of error and by stratum.

Beside any score stand the trivial detectors, which know the labels alone. Figures are of histograms of 2 ** 16 bins, so
that memory does not grow with the data: they are exact for scores rounded to 16 bits.
Layer 4. S seasons, H rows, W columns; leading axes (...) hold more locations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from cromss_dist.schema import IGNORE, NOISE_KINDS

BINS = 2**16
STRATA = ("seasons_agree", "seasons_differ")  # whether all labelled seasons of a pixel carry the same label

Labels = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.floating]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """How well wrong labels are found among some pixels.

    Args:
        average_precision: In [0, 1]; NaN where no label is wrong. A detector without merit reaches the base rate.
        base_rate: Share of wrong labels among them.
        num_pixels: How many they are.
    """

    average_precision: float
    base_rate: float
    num_pixels: int


@dataclass(frozen=True)
class DetectorScores:
    """What a detector finds.

    Args:
        overall: Among all pixels that have label and reference.
        by_kind: Wrong labels of one kind among those and the right ones; empty without kind maps.
        by_stratum: Among the pixels of each of `STRATA`.
        wrong_in_selected: Share of wrong labels in the half of each class that is suspected least, as selection keeps it.
        wrong_in_rest: The same of the other half.
    """

    overall: Found
    by_kind: dict[str, Found]
    by_stratum: dict[str, Found]
    wrong_in_selected: float
    wrong_in_rest: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; null for what there is not."""
        told: dict[str, Any] = without_nan(asdict(self))
        return told


class Detection:
    """Adds up, location by location, how well detectors find the labels that differ from the reference.

    Args:
        class_names: What label values mean.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self._of: dict[str, _Histograms] = {}
        self._has_kinds = False

    def add(self, label: Labels, reference: Labels, scores: Mapping[str, Scores], kind: Labels | None = None) -> None:
        """Counts some locations. Pixels that are ignored in label or reference do not count.

        Args:
            label: uint8 (..., S, H, W), noisy label, 255 = ignore. All seasons: strata are of all of them.
            reference: uint8 (..., S, H, W), the truth.
            scores: Detector -> float (..., S, H, W) in [0, 1], the higher, the more suspicious; the same detectors each time.
            kind: uint8 (..., S, H, W), index into NOISE_KINDS.

        Raises:
            ValueError: a score is outside [0, 1], or not of the label's shape.
        """
        valid = (label != IGNORE) & (reference != IGNORE)
        wrong = (label != reference)[valid]
        by_class = 2 * label[valid].astype(np.int64) + wrong
        by_stratum = 2 * (~_seasons_agree(label))[valid].astype(np.int64) + wrong
        # A wrong pixel whose map gives no reason counts as none of the kinds, nor as right.
        reason = np.full(len(wrong), len(NOISE_KINDS)) if kind is None else kind[valid].astype(np.int64)
        named = (reason > 0) & (reason < len(NOISE_KINDS))
        by_kind = np.where(wrong, np.where(named, reason, len(NOISE_KINDS)), 0)
        self._has_kinds |= kind is not None
        for name, score in scores.items():
            if score.shape != label.shape or not ((score >= 0) & (score <= 1)).all():
                raise ValueError(f"scores {name!r} of shape {score.shape} are not {label.shape} numbers in [0, 1]")
            bins = np.rint(score[valid].astype(np.float64) * (BINS - 1)).astype(np.int64)
            self._of.setdefault(name, _Histograms(len(self.class_names))).add(bins, by_class, by_kind, by_stratum)

    def __iadd__(self, other: Self) -> Self:
        self._has_kinds |= other._has_kinds
        for name, histograms in other._of.items():
            self._of.setdefault(name, _Histograms(len(self.class_names))).merge(histograms)
        return self

    def scores(self) -> dict[str, DetectorScores]:
        """What each detector found, the best one first."""
        kinds = NOISE_KINDS if self._has_kinds else NOISE_KINDS[:1]
        found = {name: histograms.scores(kinds) for name, histograms in self._of.items()}
        return dict(sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].overall.average_precision)))


class _Histograms:
    """Pixels by score, int64 (..., BINS): of each class and right/wrong, of each kind, of each stratum and right/wrong."""

    def __init__(self, num_classes: int) -> None:
        self.by_class = np.zeros((num_classes, 2, BINS), np.int64)
        self.by_kind = np.zeros((len(NOISE_KINDS) + 1, BINS), np.int64)
        self.by_stratum = np.zeros((len(STRATA), 2, BINS), np.int64)

    def add(self, bins: Counts, by_class: Counts, by_kind: Counts, by_stratum: Counts) -> None:
        for counts, group in ((self.by_class, by_class), (self.by_kind, by_kind), (self.by_stratum, by_stratum)):
            counts += np.bincount(group * BINS + bins, minlength=counts.size).reshape(counts.shape)

    def merge(self, other: Self) -> None:
        self.by_class += other.by_class
        self.by_kind += other.by_kind
        self.by_stratum += other.by_stratum

    def scores(self, kinds: Sequence[str]) -> DetectorScores:
        right, wrong = self.by_class.sum(0)
        selected, rest = self._halves()
        return DetectorScores(
            overall=_found(right, wrong),
            by_kind={name: _found(right, self.by_kind[number]) for number, name in enumerate(kinds) if number > 0},
            by_stratum={name: _found(*self.by_stratum[number]) for number, name in enumerate(STRATA)},
            wrong_in_selected=_share(selected),
            wrong_in_rest=_share(rest),
        )

    def _halves(self) -> tuple[Counts, Counts]:
        """Right and wrong pixels, int64 (2,), of the least suspected half of each class, ties included, and of the others."""
        up_to = self.by_class.sum(1).cumsum(1)  # (C, BINS)
        kept = up_to[:, -1:] // 2
        last = (up_to < kept).sum(1)  # the first bin by whose end so many are reached
        inside = (np.arange(BINS) <= last[:, None]) & (kept > 0)
        selected: Counts = (self.by_class * inside[:, None]).sum((0, 2))
        return selected, self.by_class.sum((0, 2)) - selected


@dataclass
class Cleaning:
    """What relabelling does to the labels of some pixels; counts of pixels that have label and reference.

    Args:
        pixels: All of them.
        wrong_before: Whose noisy label is wrong.
        wrong_after: Whose cleaned label is wrong.
        dropped: That the cleaned label ignores.
        mended: Wrong before, right after.
        spoilt: Right before, wrong after.
    """

    pixels: int = 0
    wrong_before: int = 0
    wrong_after: int = 0
    dropped: int = 0
    mended: int = 0
    spoilt: int = 0

    def add(self, label: Labels, cleaned: Labels, reference: Labels) -> None:
        """Counts some locations: uint8 of one shape, 255 = ignore."""
        valid = (label != IGNORE) & (reference != IGNORE)
        before, kept = valid & (label != reference), valid & (cleaned != IGNORE)
        after = kept & (cleaned != reference)
        self.pixels += int(valid.sum())
        self.wrong_before += int(before.sum())
        self.wrong_after += int(after.sum())
        self.dropped += int((valid & ~kept).sum())
        self.mended += int((before & kept & ~after).sum())
        self.spoilt += int((after & ~before).sum())

    def __iadd__(self, other: Self) -> Self:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def noise_before(self) -> float:
        """Share of wrong labels; NaN without pixels."""
        return self.wrong_before / self.pixels if self.pixels else math.nan

    @property
    def noise_after(self) -> float:
        """Share of wrong labels among those that are left."""
        left = self.pixels - self.dropped
        return self.wrong_after / left if left else math.nan

    def to_json(self) -> dict[str, Any]:
        """Counts and rates; null for what there is not."""
        rates = {"noise_before": self.noise_before, "noise_after": self.noise_after}
        told: dict[str, Any] = without_nan(asdict(self) | rates)
        return told


def trivial_scores(label: Labels) -> dict[str, Scores]:
    """Scores of detectors that need no model: what a method has to beat.

    Args:
        label: uint8 (..., S, H, W), 255 = ignore.

    Returns:
        float64 (..., S, H, W) in [0, 1]: `other_seasons`, the share of the pixel's other labelled seasons that have another
        label; `near_border`, 1 / (1 + distance in px to the nearest pixel that a pixel of another label touches).
    """
    return {"other_seasons": _other_seasons(label), "near_border": _near_border(label)}


def average_precision(right: Counts, wrong: Counts) -> float:
    """Area under precision over recall, as a sum of steps, one for each score that occurs.

    Args:
        right: int64 (N,): pixels with a right label by score, ascending.
        wrong: int64 (N,): pixels with a wrong label.

    Returns:
        In [0, 1]; NaN where no label is wrong.

    Reference: sum over thresholds n of (R_n - R_{n-1}) P_n, as sklearn.metrics.average_precision_score defines it.
    """
    if not wrong.any():
        return math.nan
    found, told = wrong[::-1].cumsum(), (right + wrong)[::-1].cumsum()
    return float((wrong[::-1] * (found / np.maximum(told, 1))).sum() / found[-1])


def _found(right: Counts, wrong: Counts) -> Found:
    counts = np.array([right.sum(), wrong.sum()])
    return Found(average_precision(right, wrong), _share(counts), int(counts.sum()))


def _share(counts: Counts) -> float:
    """Share of wrong ones among (right, wrong)."""
    return float(counts[1] / counts.sum()) if counts.sum() else math.nan


def _seasons_agree(label: Labels) -> npt.NDArray[np.bool_]:
    """bool of the label's shape: whether all labelled seasons of the pixel carry the same label."""
    known = label != IGNORE
    highest, lowest = np.where(known, label, 0).max(-3, keepdims=True), label.min(-3, keepdims=True)
    return np.broadcast_to(highest <= lowest, label.shape)


def _other_seasons(label: Labels) -> Scores:
    known = label != IGNORE
    differing = np.zeros(label.shape)
    for season in range(label.shape[-3]):
        other = label[..., season : season + 1, :, :]
        differing += known & (other != IGNORE) & (label != other)
    others = known.sum(-3, keepdims=True) - known
    share: Scores = differing / np.maximum(others, 1)
    return share


def _near_border(label: Labels) -> Scores:
    near = np.zeros(label.shape)
    maps = label.reshape(-1, *label.shape[-2:])
    for one, into in zip(maps, near.reshape(maps.shape), strict=True):
        across, down = one[:, 1:] != one[:, :-1], one[1:] != one[:-1]
        border = np.zeros(one.shape, np.bool_)
        border[:, 1:] |= across
        border[:, :-1] |= across
        border[1:] |= down
        border[:-1] |= down
        if border.any():
            into[...] = 1 / (1 + ndimage.distance_transform_edt(~border))
    return near


def without_nan(value: Any) -> Any:
    """A value of JSON types with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

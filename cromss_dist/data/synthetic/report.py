"""What is in an archive: counts of each location, summed and turned into shares once."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from cromss_dist.data.synthetic.settings import ByteArray, FloatArray
from cromss_dist.schema import CLASS_NAMES, NOISE_KINDS, NUM_CLASSES, NUM_SEASONS

IntArray = npt.NDArray[np.int64]
DISTANCES_PX = (1, 2, 4, 8)  # limits of the strata by distance to a border of the truth


@dataclass(frozen=True)
class Counts:
    """Pixel counts of one or more locations; they add up.

    Args:
        confusion: int64 (9, 9), truth by label.
        kinds: int64 (4, 5), season by noise kind.
        class_kinds: int64 (9, 5), truth by noise kind.
        distance: int64 (5, 2), pixels and wrong ones by distance to a border.
        agree: int64 (3,): pixels of a patch, those whose label is equal in all seasons, and of these the ones that are
            wrong in a season or more.
        outvoted: int64 (2,): pixels of a patch whose label is wrong in most seasons, in all seasons.
        cloud: Season pixels under cloud (opacity above 0.4).
    """

    confusion: IntArray
    kinds: IntArray
    class_kinds: IntArray
    distance: IntArray
    agree: IntArray
    outvoted: IntArray
    cloud: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def count(truth: ByteArray, label: ByteArray, kind: ByteArray, cloud: FloatArray) -> Counts:
    """Counts of one location, from (4, H, W) maps."""
    wrong = label != truth
    pair = np.bincount(truth.ravel().astype(np.int64) * NUM_CLASSES + label.ravel(), minlength=NUM_CLASSES**2)
    class_kind = np.bincount(
        truth.ravel().astype(np.int64) * len(NOISE_KINDS) + kind.ravel(), minlength=NUM_CLASSES * len(NOISE_KINDS)
    )
    strata = np.zeros((len(DISTANCES_PX) + 1, 2), np.int64)
    for season in range(NUM_SEASONS):
        line = ndimage.maximum_filter(truth[season], 3) != ndimage.minimum_filter(truth[season], 3)  # a neighbour differs
        # Without any border every pixel is far from one.
        far = ndimage.distance_transform_cdt(~line, "chessboard") + 1 if line.any() else np.full(line.shape, 999)
        stratum = np.digitize(far, DISTANCES_PX, right=True)
        strata[:, 0] += np.bincount(stratum.ravel(), minlength=len(strata))
        strata[:, 1] += np.bincount(stratum[wrong[season]], minlength=len(strata))
    same = (label == label[0]).all(axis=0)
    num_wrong = wrong.sum(axis=0)
    return Counts(
        pair.reshape(NUM_CLASSES, NUM_CLASSES),
        np.stack([np.bincount(kind[season].ravel(), minlength=len(NOISE_KINDS)) for season in range(NUM_SEASONS)]),
        class_kind.reshape(NUM_CLASSES, len(NOISE_KINDS)),
        strata,
        np.array([same.size, same.sum(), (same & (num_wrong > 0)).sum()]),
        np.array([(num_wrong > NUM_SEASONS // 2).sum(), (num_wrong == NUM_SEASONS).sum()]),
        int((cloud > 0.4).sum()),
    )


@dataclass(frozen=True)
class Report:
    """The figures of an archive; all are shares, 0-1.

    Args:
        num_locations: Locations written.
        class_shares: Of the season pixels, by true class.
        label_shares: Of the season pixels, by noisy label.
        noise_rate: Wrong labels of all season pixels.
        noise_by_kind: Of all season pixels, by kind of error.
        noise_by_class: Wrong labels, by true class; null where a class is absent.
        noise_by_label: Wrong labels, by noisy label.
        noise_by_season: Wrong labels, by season.
        noise_by_distance: Wrong labels, by distance to a border of the truth.
        seasons_agree: Pixels that carry the same label in all seasons.
        noise_where_seasons_agree: Of these, the ones wrong in a season or more.
        wrong_in_most_seasons: Pixels whose label is wrong in three seasons or more.
        wrong_in_all_seasons: Pixels whose label is wrong in all seasons.
        truth_is_plurality: By true class, whether the truth is its most frequent label.
        cloud_share: Season pixels under cloud.
    """

    num_locations: int
    class_shares: dict[str, float]
    label_shares: dict[str, float]
    noise_rate: float
    noise_by_kind: dict[str, float]
    noise_by_class: dict[str, float | None]
    noise_by_label: dict[str, float | None]
    noise_by_season: list[float]
    noise_by_distance: dict[str, float | None]
    seasons_agree: float
    noise_where_seasons_agree: float | None
    wrong_in_most_seasons: float
    wrong_in_all_seasons: float
    truth_is_plurality: dict[str, bool | None]
    cloud_share: float

    def as_json(self) -> dict[str, Any]:
        """Plain values in a fixed order."""
        return asdict(self)


def make_report(num_locations: int, total: Counts) -> Report:
    """Shares from the summed counts of all locations."""
    pixels = int(total.confusion.sum())
    right = np.diag(total.confusion)
    by_class, by_label = total.confusion.sum(axis=1), total.confusion.sum(axis=0)
    limits = ["0", *(str(limit) for limit in DISTANCES_PX)]
    names = [f"{low}-{high} px" for low, high in pairwise(limits)] + [f"over {limits[-1]} px"]
    return Report(
        num_locations=num_locations,
        class_shares=_shares(CLASS_NAMES, by_class, pixels),
        label_shares=_shares(CLASS_NAMES, by_label, pixels),
        noise_rate=_round(1 - right.sum() / pixels),
        noise_by_kind=_shares(NOISE_KINDS[1:], total.kinds.sum(axis=0)[1:], pixels),
        noise_by_class={name: _ratio(by_class[i] - right[i], by_class[i]) for i, name in enumerate(CLASS_NAMES)},
        noise_by_label={name: _ratio(by_label[i] - right[i], by_label[i]) for i, name in enumerate(CLASS_NAMES)},
        noise_by_season=[_round(row[1:].sum() / row.sum()) for row in total.kinds],
        noise_by_distance={name: _ratio(wrong, seen) for name, (seen, wrong) in zip(names, total.distance, strict=True)},
        seasons_agree=_round(total.agree[1] / total.agree[0]),
        noise_where_seasons_agree=_ratio(total.agree[2], total.agree[1]),
        wrong_in_most_seasons=_round(total.outvoted[0] / total.agree[0]),
        wrong_in_all_seasons=_round(total.outvoted[1] / total.agree[0]),
        truth_is_plurality={
            name: bool(total.confusion[i].argmax() == i) if by_class[i] else None for i, name in enumerate(CLASS_NAMES)
        },
        cloud_share=_round(total.cloud / pixels),
    )


def _round(value: float) -> float:
    return round(float(value), 5)


def _ratio(part: int, whole: int) -> float | None:
    return _round(part / whole) if whole else None


def _shares(names: tuple[str, ...], counts: IntArray, whole: int) -> dict[str, float]:
    return {name: _round(value / whole) for name, value in zip(names, counts, strict=True)}

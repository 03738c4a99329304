"""Exact counts over the pixels of many samples: sums of integers, so that no order of adding them changes a digit."""

import math
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, Sample, SampleSpec, Uint8Array
from cromss_dist.schema import IGNORE

UNITS = "stored uint8, 0-255"
IGNORED = "ignored"


MAX_EXACT = 256  # 255**2 times this is below 2**24, up to where float32 has every integer


def _sums(pixels: Uint8Array, scratch: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sum of values and of their squares, int64 (band,), of pixels (band, H, W).

    As float32, whose products BLAS sums some times faster than NumPy sums integers; in rows so short that no order of adding
    rounds anything. `scratch` holds them: fresh memory for each would cost as much again.
    """
    ones = _row(pixels[0].size)
    rows = pixels.reshape(len(pixels), -1, len(ones))
    values = scratch[: pixels.size].reshape(rows.shape)
    np.copyto(values, rows)
    first, second = (np.vecdot(values, other).sum(axis=-1, dtype=np.float64) for other in (ones, values))
    return first.astype(np.int64), second.astype(np.int64)


@lru_cache
def _row(num_pixels: int) -> npt.NDArray[np.float32]:
    """Ones, as many as the longest row that divides a band."""
    return np.ones(max(length for length in range(1, MAX_EXACT + 1) if num_pixels % length == 0), np.float32)


class Statistics:
    """Pixels of each class in each season, and mean and spread of each band's stored values.

    Args:
        spec: Of the samples; classes are those of its first value array.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.spec = spec
        self.classes = spec.values[0]
        # int64 (num_seasons, classes + 1): the ignored ones last
        self.class_counts = np.zeros((spec.num_seasons, len(self.classes.values) + 1), np.int64)
        # int64 (bands, 3) an array: pixels, sum of values, sum of squares
        self.moments = {image.name: np.zeros((len(image.bands), 3), np.int64) for image in spec.images}
        self._scratch = np.empty(max((math.prod(spec.shape(image.name)[1:]) for image in spec.images), default=0), np.float32)

    def add(self, sample: Sample) -> None:
        """Counts one sample."""
        for season, label in enumerate(sample.arrays[self.classes.name]):
            counts = np.bincount(label.ravel(), minlength=256)
            self.class_counts[season] += np.append(counts[: len(self.classes.values)], counts[IGNORE])
        for name, moments in self.moments.items():
            moments[:, 0] += sample.arrays[name].size // len(moments)
            for season in sample.arrays[name]:
                values, squares = _sums(season, self._scratch)
                moments[:, 1] += values
                moments[:, 2] += squares

    def __iadd__(self, other: Self) -> Self:
        self.class_counts += other.class_counts
        for name, moments in self.moments.items():
            moments += other.moments[name]
        return self

    def to_json(self) -> Json:
        """The manifest's `band_statistics` and `class_counts`."""
        bands: dict[str, Json] = {}
        for image in self.spec.images:
            for band, (count, total, squares) in zip(image.bands, self.moments[image.name].tolist(), strict=True):
                told: Json = {"pixels": count, "sum": total, "sum_of_squares": squares}
                if count:
                    variance = (count * squares - total**2) / count**2  # of Python integers: exact up to the division
                    told |= {"mean": round(total / count, 6), "std": round(variance**0.5, 6)}
                bands.setdefault(str(image.modality), {})[band] = told
        names = (*self.classes.values, IGNORED)
        counts = [dict(zip(names, row, strict=True)) for row in self.class_counts.tolist()]
        return {"band_statistics": {"units": UNITS, **bands}, "class_counts": counts}

    @classmethod
    def from_json(cls, spec: SampleSpec, content: Json) -> Self:
        """What `to_json` told, to be added to."""
        self = cls(spec)
        self.class_counts[:] = [[row[name] for name in (*self.classes.values, IGNORED)] for row in content["class_counts"]]
        for image in spec.images:
            told = content["band_statistics"][str(image.modality)]
            for band, moments in zip(image.bands, self.moments[image.name], strict=True):
                moments[:] = [told[band][name] for name in ("pixels", "sum", "sum_of_squares")]
        return self

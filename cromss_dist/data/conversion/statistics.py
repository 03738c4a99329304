"""Exact counts over the pixels of many samples: sums of integers, so that no order of adding them changes a digit."""

from typing import Self

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, Sample, SampleSpec
from cromss_dist.schema import IGNORE

UNITS = "stored uint8, 0-255"
IGNORED = "ignored"


def _band_sums(pixels: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Sum of each band, int64 (band,), of pixels (season, band, H, W): rows first, whose sums fit into 32 bits."""
    sums: npt.NDArray[np.int64] = pixels.sum(axis=-1, dtype=np.uint32).sum(axis=(0, 2), dtype=np.int64)
    return sums


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

    def add(self, sample: Sample) -> None:
        """Counts one sample."""
        for season, label in enumerate(sample.arrays[self.classes.name]):
            counts = np.bincount(label.ravel(), minlength=256)
            self.class_counts[season] += np.append(counts[: len(self.classes.values)], counts[IGNORE])
        for name, moments in self.moments.items():
            pixels = sample.arrays[name].astype(np.uint16)  # holds the square of a uint8
            moments[:, 0] += pixels.size // len(moments)
            moments[:, 1] += _band_sums(pixels)
            pixels *= pixels
            moments[:, 2] += _band_sums(pixels)

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

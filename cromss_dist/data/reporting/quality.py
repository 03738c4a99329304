"""How good each location and season is: clouds, missing pixels, S1-S2 shift, how mixed its label is.

All of it is told from stored values alone, by tests simple enough to state in a line; see the constants.
H rows, W columns at 10 m.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.index import ShardIndex
from cromss_dist.schema import IGNORE, LABEL_ARRAY, MODALITIES, Modality

# Cloud: bright in blue (B2), not much brighter in red (B4; bare ground is), bright in B11 where that is stored (snow is
# dark), over 50 m at least (roofs are smaller). Reflectance at the top of the atmosphere. It calls 0-4 % of a synthetic
# town or snowfield cloud, and of clouds those of an opacity above a third.
CLOUD_BLUE = 0.22
CLOUD_RED_OVER_BLUE = 1.35
CLOUD_INFRARED = 0.2
CLOUD_SMALLEST_PX = 5

SHIFT_LIMIT_PX = 10  # no larger shift is looked for
SHIFT_SMOOTHING_PX = 2.0  # of the images before their gradient, and of the correlation surface
# Of 864 pairs of images that show different places, one in a hundred came above this.
SHIFT_CONFIDENCE = 6.5

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Quality:
    """One season of one location; None where the dataset lacks what is needed to tell.

    Args:
        key: The location.
        season: 0, 1, ...
        lon: Degrees east.
        lat: Degrees north.
        s1_time: Acquisition, YYYYMMDDTHHMMSS.
        s2_time: Acquisition, YYYYMMDDTHHMMSS.
        cloud_share: Share of the pixels that look like thick cloud, 0-1. Thin cirrus is not seen.
        s1_nodata_share: Share of the pixels without a value, 0-1.
        s2_nodata_share: The same of Sentinel-2.
        shift_rows_px: How far S1 lies below S2, px of 10 m, -10 to 10.
        shift_cols_px: How far S1 lies right of S2.
        shift_confidence: Height of the correlation peak over the surface's standard deviation. Below
            `SHIFT_CONFIDENCE` the shift means nothing.
        dominant_class: The label's most frequent class; "" where all is ignored.
        dominant_share: Its share of the pixels that are not ignored, 0-1.
        ignored_share: Share of the label's pixels that are ignored, 0-1.
    """

    key: str
    season: int
    lon: float | None
    lat: float | None
    s1_time: str | None
    s2_time: str | None
    cloud_share: float | None
    s1_nodata_share: float | None
    s2_nodata_share: float | None
    shift_rows_px: float | None
    shift_cols_px: float | None
    shift_confidence: float | None
    dominant_class: str
    dominant_share: float
    ignored_share: float

    @property
    def shift_px(self) -> float | None:
        """Length of the shift, px; None where there is none or it means nothing."""
        if self.shift_rows_px is None or self.shift_cols_px is None or (self.shift_confidence or 0) < SHIFT_CONFIDENCE:
            return None
        return float(np.hypot(self.shift_rows_px, self.shift_cols_px))


@dataclass(frozen=True)
class Shift:
    """How far one image lies below and right of another, px, and how sure that is."""

    rows_px: float
    cols_px: float
    confidence: float


def measure_location(index: ShardIndex, sample_id: int) -> list[Quality]:
    """Measures one location of an open dataset, a row a season.

    Raises:
        ShardError: bytes are missing or do not match their checksum.
    """
    metadata = index.metadata(sample_id)
    return [_measure(index, sample_id, season, metadata) for season in range(index.num_seasons)]


def write_csv(path: Path, rows: Sequence[Quality]) -> None:
    """Writes a table with a header line, shares to four digits, nothing where a value is None."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Quality))
        for row in rows:
            writer.writerow(round(value, 4) if isinstance(value, float) else value for value in asdict(row).values())


def bands_at_10m(index: ShardIndex, arrays: dict[str, Uint8Array], modality: Modality) -> dict[str, Uint8Array]:
    """Each band of a modality by name as uint8 (H, W); coarser pixels are repeated.

    Args:
        index: The open dataset.
        arrays: What `index.read` returned.
        modality: Whose bands.
    """
    bands: dict[str, Uint8Array] = {}
    for spec in index.images:
        if spec.modality == modality:
            bands.update(zip(spec.bands, arrays[spec.name].repeat(spec.scale, axis=1).repeat(spec.scale, axis=2), strict=True))
    return bands


def cloud_mask(reflectance: dict[str, FloatArray]) -> Mask | None:
    """Where thick cloud is, by the test stated at the constants.

    Args:
        reflectance: B2 and B4 at least; (H, W), 0-1, clipped as stored.

    Returns:
        bool (H, W), or None without B2 and B4.
    """
    if not {"B2", "B4"} <= reflectance.keys():
        return None
    blue, red = reflectance["B2"], reflectance["B4"]
    cloud = (blue >= CLOUD_BLUE) & (red <= CLOUD_RED_OVER_BLUE * blue)
    if "B11" in reflectance:
        cloud &= reflectance["B11"] >= CLOUD_INFRARED
    return _without_specks(cloud, CLOUD_SMALLEST_PX)


def nodata_mask(stored: npt.NDArray[np.uint8], fills: npt.NDArray[np.uint8]) -> Mask:
    """Where every band has a fill value, over 3 x 3 px at least, so that single dark pixels do not count.

    Args:
        stored: (bands, H, W).
        fills: (values, bands): what missing pixels are stored as.
    """
    missing = np.zeros(stored.shape[1:], bool)
    for fill in fills:
        missing |= (stored == fill[:, None, None]).all(axis=0)
    return _without_specks(missing, 3)


def estimate_shift(moved: FloatArray, fixed: FloatArray) -> Shift:
    """Shift of `moved` against `fixed` by phase correlation of their gradient magnitudes.

    Edges of fields, shores and roads show in radar and in optical images, whatever their brightness there; so edges are
    compared. The Hann window keeps the patch's own border out of it.

    Args:
        moved: (H, W).
        fixed: (H, W).

    Reference: Kuglin and Hines, "The phase correlation image alignment method" (1975). Departs: a Gaussian damps high
        frequencies, which are speckle here; the peak is refined by a parabola through its neighbours.
    """
    height, width = fixed.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    spectra = []
    for image in (moved, fixed):
        edges = ndimage.gaussian_gradient_magnitude(image.astype(np.float32), SHIFT_SMOOTHING_PX)
        spectra.append(fft.rfft2((edges - edges.mean()) * window))
    cross = spectra[0] * np.conj(spectra[1])
    cross /= np.abs(cross) + np.finfo(np.float32).tiny
    squared = fft.fftfreq(height)[:, None] ** 2 + fft.rfftfreq(width)[None, :] ** 2
    surface = fft.fftshift(fft.irfft2(cross * np.exp(-2 * (np.pi * SHIFT_SMOOTHING_PX) ** 2 * squared), s=fixed.shape))
    reach = min(SHIFT_LIMIT_PX, min(height, width) // 4)
    top, left = height // 2 - reach, width // 2 - reach
    near = surface[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
    row, col = (int(i) for i in np.unravel_index(near.argmax(), near.shape))
    row, col = row + top, col + left
    spread = float(surface.std())
    if spread == 0:  # one of them is flat
        return Shift(0.0, 0.0, 0.0)
    rows_px = row - height // 2 + _vertex(*surface[row - 1 : row + 2, col])
    cols_px = col - width // 2 + _vertex(*surface[row, col - 1 : col + 2])
    return Shift(rows_px, cols_px, float(surface[row, col] - surface.mean()) / spread)


def _measure(index: ShardIndex, sample_id: int, season: int, metadata: Json) -> Quality:
    arrays = index.read(sample_id, season, index.arrays)
    about = metadata["seasons"][season]
    cloud: Mask | None = None
    nodata: dict[Modality, float | None] = {"s1": None, "s2": None}
    intensity: dict[Modality, FloatArray] = {}
    for modality in MODALITIES:
        bands = bands_at_10m(index, arrays, modality)
        if not bands:
            continue
        contract = index.normalisation(modality).select(tuple(bands))
        stored = np.stack(list(bands.values()))
        zero = contract.to_uint8(np.zeros((len(bands), 1, 1), np.float32), contract.bands)[:, 0, 0]
        nodata[modality] = float(nodata_mask(stored, np.stack([np.zeros_like(zero), zero])).mean())
        intensity[modality] = stored[[i for i, band in enumerate(bands) if band in ("VV", "VH", "B2", "B3", "B4", "B8")]].mean(0)
        if modality == "s2" and contract.units.startswith("reflectance"):
            lowest = np.asarray(contract.mean, np.float32) - 2 * np.asarray(contract.std, np.float32)
            step = 4 * np.asarray(contract.std, np.float32) / 255
            # Values were truncated: the middle of a step is what they were on average.
            physical = (stored + np.float32(0.5)) * step[:, None, None] + lowest[:, None, None]
            cloud = cloud_mask(dict(zip(bands, physical / np.float32(10_000), strict=True)))
    shift = estimate_shift(intensity["s1"], intensity["s2"]) if len(intensity) == 2 else None
    label = arrays[LABEL_ARRAY][season]
    counts = np.bincount(label[label != IGNORE], minlength=len(index.class_names))
    valid = int(counts.sum())
    return Quality(
        metadata["key"],
        season,
        metadata["lon"],
        metadata["lat"],
        about["s1_time"],
        about["s2_time"],
        None if cloud is None else float(cloud.mean()),
        nodata["s1"],
        nodata["s2"],
        None if shift is None else shift.rows_px,
        None if shift is None else shift.cols_px,
        None if shift is None else shift.confidence,
        index.class_names[int(counts.argmax())] if valid else "",
        float(counts.max() / valid) if valid else 0.0,
        float(1 - valid / label.size),
    )


def _without_specks(mask: Mask, smallest_px: int) -> Mask:
    # The mirrored rim lets what reaches the patch's border count as going on beyond it.
    padded = np.pad(mask, smallest_px, mode="symmetric")
    kept = ndimage.binary_opening(padded, np.ones((smallest_px, smallest_px), bool))
    return np.asarray(kept[smallest_px:-smallest_px, smallest_px:-smallest_px])


def _vertex(before: float, here: float, after: float) -> float:
    """Where, from -0.5 to 0.5, the parabola through three neighbours peaks; the middle one is the largest."""
    curvature = before - 2 * here + after
    return 0.0 if curvature >= 0 else float(np.clip(0.5 * (before - after) / curvature, -0.5, 0.5))

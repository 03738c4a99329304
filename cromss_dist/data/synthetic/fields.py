"""Random fields and shapes from which landscapes are drawn. All maps are (size, size) at 10 m a pixel."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from cromss_dist.data.synthetic.settings import FloatArray

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@lru_cache(maxsize=64)
def _gain(n: int, exponent: float | None, scale_px: float) -> FloatArray:
    """Gain of each frequency of rfft2, scaled so that unit white noise keeps unit variance; a Gaussian without exponent."""
    f2 = np.fft.fftfreq(n)[:, None] ** 2 + np.fft.rfftfreq(n)[None, :] ** 2
    if exponent is None:
        gain = np.exp(-2 * np.pi**2 * scale_px**2 * f2)
    else:
        gain = np.maximum(f2, scale_px**-2) ** (-exponent / 4)
        gain[0, 0] = 0
    # Parseval: columns of the half spectrum stand for two, but for the first (and the last when n is even).
    twice = np.full(gain.shape[1], 2.0)
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    gain /= np.sqrt((gain**2 * twice).sum() / n**2)
    return gain.astype(np.float32)


def _filtered(rng: np.random.Generator, size: int, margin: int, exponent: float | None, scale_px: float) -> FloatArray:
    # The margin keeps the transform's wrap-around out of the patch.
    n = int(fft.next_fast_len(size + margin, real=True))
    spectrum = fft.rfft2(rng.standard_normal((n, n), dtype=np.float32))
    field = fft.irfft2(spectrum * _gain(n, exponent, scale_px), s=(n, n))
    return np.ascontiguousarray(field[:size, :size], np.float32)


def gaussian_field(rng: np.random.Generator, size: int, scale_px: float) -> FloatArray:
    """Gaussian noise blurred with a standard deviation of `scale_px`; mean 0 and variance 1 in expectation."""
    return _filtered(rng, size, int(min(4 * scale_px, 160)) + 2, None, scale_px)


def fractal_field(rng: np.random.Generator, size: int, exponent: float, largest_px: float) -> FloatArray:
    """Noise with power spectrum f ** -exponent up to wavelengths of `largest_px`; variance 1 in expectation."""
    return _filtered(rng, size, int(min(largest_px, 160)), exponent, largest_px)


def top(field: FloatArray, share: float) -> BoolArray:
    """Where `field` is in its highest `share` of the patch."""
    return np.asarray(field > np.quantile(field, 1 - share))


def rotated(rng: np.random.Generator, size: int, warp_px: float, warp_scale_px: float) -> tuple[FloatArray, FloatArray]:
    """Coordinates along and across a random direction, px from the centre, bent by a smooth displacement."""
    row, col = np.indices((size, size), dtype=np.float32) - np.float32(size / 2)
    angle = rng.uniform(0, np.pi)
    along = row * np.cos(angle) + col * np.sin(angle) + warp_px * gaussian_field(rng, size, warp_scale_px)
    across = col * np.cos(angle) - row * np.sin(angle) + warp_px * gaussian_field(rng, size, warp_scale_px)
    return along.astype(np.float32), across.astype(np.float32)


def river(rng: np.random.Generator, size: int, bend_px: float) -> FloatArray:
    """Distance to a meandering line through the patch, px."""
    along, across = rotated(rng, size, bend_px * 0.25, 12)
    path = np.zeros_like(along)
    slope = np.zeros_like(along)
    for wavelength, part in ((170.0, 0.6), (75.0, 0.4), (38.0, 0.15)):
        wave, phase, amplitude = 2 * np.pi / (wavelength * rng.uniform(0.8, 1.25)), rng.uniform(0, 2 * np.pi), bend_px * part
        path += amplitude * np.sin(wave * along + phase)
        slope += amplitude * wave * np.cos(wave * along + phase)
    offset = rng.uniform(-0.3, 0.3) * size
    return np.asarray(np.abs(across - path - offset) / np.sqrt(1 + slope**2), np.float32)


def parcels(rng: np.random.Generator, size: int, side_px: float, num_domains: int) -> IntArray:
    """Irregular parcels: strips cut into fields, turned another way in each of `num_domains` parts of the patch.

    Returns:
        int64 (size, size): parcel numbers below `parcel_limit(ids)`, not all of them present.
    """
    row, col = np.indices((size, size), dtype=np.float32)
    bend = gaussian_field(rng, size, 18) * 6
    centres = rng.uniform(0, size, (num_domains, 2))
    domain = np.argmin([(row + bend - r) ** 2 + (col - bend - c) ** 2 for r, c in centres], axis=0)
    ids = np.zeros((size, size), np.int64)
    cells = int(4 * size / side_px) + 8
    base = rng.uniform(0, np.pi)
    for number in range(num_domains):
        angle = base + rng.normal(0, 0.35) + rng.integers(2) * np.pi / 2
        bow = gaussian_field(rng, size, 40) * side_px * 0.12
        along = (row * np.cos(angle) + col * np.sin(angle) + bow) / (side_px * rng.uniform(0.7, 1.2)) + cells / 2
        across = (col * np.cos(angle) - row * np.sin(angle) + bow) / (side_px * rng.uniform(1.0, 2.2)) + cells / 2
        strip = _jittered(along, rng.uniform(0, 0.7, cells))
        shifted = across + rng.uniform(0, 1, cells)[strip]
        field = _jittered(shifted, rng.uniform(0, 0.75, (cells, cells)), strip)
        ids = np.where(domain == number, (number * cells + strip) * cells + field, ids)
    return ids


def parcel_limit(ids: IntArray) -> int:
    """One above the highest parcel number."""
    return int(ids.max()) + 1


def _jittered(position: FloatArray, jitter: npt.NDArray[np.float64], strip: IntArray | None = None) -> IntArray:
    # Cell borders move back into the cell by a share of it, so that cells differ in width.
    cell = np.clip(np.floor(position).astype(np.int64), 1, jitter.shape[-1] - 1)
    limit = jitter[cell] if strip is None else jitter[strip, cell]
    return np.asarray(cell - (position - cell < limit), np.int64)


def borders(ids: npt.NDArray[np.generic]) -> BoolArray:
    """Pixels whose right or lower neighbour carries another value: lines one pixel wide."""
    line = np.zeros(ids.shape, np.bool_)
    line[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    line[:-1] |= ids[:-1] != ids[1:]
    return line


def blur(values: FloatArray, sigma_px: float) -> FloatArray:
    """Gaussian blur of the last two axes."""
    sigma = (0.0,) * (values.ndim - 2) + (sigma_px, sigma_px)
    return np.asarray(ndimage.gaussian_filter(values, sigma, mode="nearest", truncate=3.0), np.float32)

"""Sentinel-1 IW GRD of a scene: backscatter by class, season and weather, terrain, bright points and speckle."""

import numpy as np
from scipy import ndimage

from cromss_dist.data.synthetic.fields import blur, gaussian_field
from cromss_dist.data.synthetic.landscape import BARE, BUILT, CROPS, FLOODED, GRASS, SHRUB, SNOW, TREES, WATER
from cromss_dist.data.synthetic.scene import Scene
from cromss_dist.data.synthetic.settings import FloatArray, SyntheticConfig
from cromss_dist.schema import NUM_SEASONS, S1_BANDS

# Mean sigma nought by class, dB (VV, VH), at 38 degrees: leafless or calm, and what full green cover adds. Levels as in
# Ulaby and Dobson, "Handbook of Radar Scattering Statistics for Terrain" (1989), C band, and in Sentinel-1 samples.
_BASE_DB = {
    WATER: (-21.0, -28.5),
    TREES: (-9.8, -15.4),
    GRASS: (-14.0, -21.2),
    FLOODED: (-7.8, -17.4),  # stems and water make corners
    CROPS: (-11.4, -20.2),
    SHRUB: (-12.6, -17.6),
    BUILT: (-7.6, -16.8),
    BARE: (-15.6, -24.2),
    SNOW: (-17.0, -22.4),
}
_GREEN_DB = {
    TREES: (-0.3, 0.9),
    GRASS: (0.5, 1.8),
    FLOODED: (0.8, 1.5),
    CROPS: (1.6, 4.2),
    SHRUB: (0.2, 1.1),
    BUILT: (0.0, 0.5),
    BARE: (0.3, 0.8),
}
# Moist soil brightens what the wave reaches, dB from dry to wet.
_WET_DB = {GRASS: 2.2, CROPS: 3.0, SHRUB: 1.4, BARE: 3.2, BUILT: 0.6, TREES: 0.5}
# Variation within a class beyond speckle, dB.
_TEXTURE_DB = np.array([0.3, 0.7, 0.6, 1.0, 0.7, 1.0, 1.8, 0.8, 0.6], np.float32)
_FLOOR_DB = (-31.0, -33.0)  # what is left of thermal noise after its removal


def observe_s1(rng: np.random.Generator, scene: Scene, config: SyntheticConfig) -> FloatArray:
    """Renders the four Sentinel-1 scenes of a location.

    Returns:
        float32 (4, 2, H, W): VV and VH, dB.
    """
    size = scene.truth.shape[-1]
    shift = rng.integers(-config.s1_shift_px, config.s1_shift_px + 1, 2)
    rough = rng.normal(0, 0.6) + 0.6 * scene.tone + 0.4 * gaussian_field(rng, size, 25)  # tillage, stones
    points = _points(rng, scene)
    out = np.empty((NUM_SEASONS, len(S1_BANDS), size, size), np.float32)
    incidence = rng.uniform(31, 45)  # of this relative orbit
    look = rng.choice([-1.0, 1.0])  # the radar looks east or west
    slope = look * np.gradient(scene.elevation_m / 10, axis=1) * (scene.truth != WATER)
    ramp = np.linspace(-0.08, 0.08, size, dtype=np.float32)[None, :] * look  # 2.6 km of swath
    for season in range(NUM_SEASONS):
        level = _ground_db(rng, scene, season, rough)
        level -= 0.12 * (incidence - 38) + rng.normal(0, 0.35) + ramp
        # Slopes that face the radar shrink in range and brighten, those that face away dim.
        level += np.clip(10 * np.log10(np.clip(1 + slope[season] / np.tan(np.radians(incidence)), 0.15, 6)), -6, 7)
        power = 10 ** (level / 10) + points * rng.uniform(0.7, 1.3)
        power = ndimage.shift(power, (0, *shift), order=0, mode="nearest")
        power = blur(power.astype(np.float32), 0.7)
        for band, floor_db in enumerate(_FLOOR_DB):
            seen = (power[band] + np.float32(10 ** (floor_db / 10))) * _speckle(rng, size, config.looks)
            out[season, band] = np.clip(10 * np.log10(np.maximum(seen, 1e-6)), -45, 25)
    return out


def _ground_db(rng: np.random.Generator, scene: Scene, season: int, rough: FloatArray) -> FloatArray:
    truth, green, wet = scene.truth[season], scene.green[season], scene.wet[season]
    size = truth.shape[-1]
    level = np.empty((len(S1_BANDS), size, size), np.float32)
    wind = rng.uniform(0, 1) ** 1.5
    melting = rng.random() < 0.4
    common = gaussian_field(rng, size, 1.5) * 0.7 + gaussian_field(rng, size, 6) * 0.7
    soil = np.isin(truth, (GRASS, CROPS, BARE, SHRUB))
    for band in range(len(S1_BANDS)):
        own = gaussian_field(rng, size, 1.5) * 0.7 + gaussian_field(rng, size, 8) * 0.7
        part = np.array([_BASE_DB[cls][band] for cls in range(9)], np.float32)[truth]
        part += np.array([_GREEN_DB.get(cls, (0.0, 0.0))[band] for cls in range(9)], np.float32)[truth] * green
        part += np.array([_WET_DB.get(cls, 0.0) for cls in range(9)], np.float32)[truth] * (wet - 0.4) * (1 - 0.6 * green)
        part += np.where(soil, rough * (1 - 0.5 * green) * (1.0, 0.8)[band], 0)
        part += np.where((truth == WATER), wind * (7.0, 4.0)[band] + 0.7 * wind * gaussian_field(rng, size, 12), 0)
        if melting:
            part -= np.where(truth == SNOW, (4.0, 4.5)[band], 0)
        part += np.where(truth == BUILT, 3.0 * (scene.built_share - 0.6), 0)
        part += np.where(truth == BARE, (2.6, 2.2)[band] * (scene.rock - 0.4), 0)
        # Paddies and wet fields with water between the plants turn into mirrors.
        part -= np.where(truth == CROPS, 6.0 * scene.water_depth[season] * (1 - green), 0)
        level[band] = part + _TEXTURE_DB[truth] * (0.75 * common + 0.65 * own)
    return level


def _points(rng: np.random.Generator, scene: Scene) -> FloatArray:
    """float32 (2, H, W) extra power: corners of buildings, the same in all seasons."""
    built = (scene.truth == BUILT).any(axis=0)
    hit = built & (rng.random(built.shape) < 0.09 * scene.built_share)
    strength = np.where(hit, rng.exponential(1.0, built.shape) ** 1.6 * 0.9, 0).astype(np.float32)
    return np.stack([strength, 0.12 * strength])


def _speckle(rng: np.random.Generator, size: int, looks: int) -> FloatArray:
    """Gamma noise of mean 1 with `looks` looks, correlated over about 2 px.

    GRD has 20 x 22 m resolution on 10 m pixels (Sentinel-1 Product Definition), hence the correlation: each look is the
    power of complex circular noise after the point spread, and looks add up.
    """
    total = np.zeros((size, size), np.float32)
    for _ in range(looks):
        parts = blur(rng.standard_normal((2, size + 8, size + 8), dtype=np.float32), 0.65)[:, 4:-4, 4:-4]
        total += (parts**2).sum(axis=0)
    # Power that is left of unit noise after the blur, so that the mean is 1 in expectation.
    impulse = np.zeros((17, 17), np.float32)
    impulse[8, 8] = 1
    kept = float((blur(impulse, 0.65) ** 2).sum())
    return total / np.float32(2 * looks * kept)

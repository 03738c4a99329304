"""Sentinel-2 L1C of a scene: mixtures of materials, light, air, clouds and the instrument."""

from dataclasses import dataclass

import numpy as np

from cromss_dist.data.synthetic.fields import blur, fractal_field, gaussian_field
from cromss_dist.data.synthetic.landscape import BARE, BUILT, CROPS, FLOODED, GRASS, SHRUB, SNOW, TREES, WATER
from cromss_dist.data.synthetic.scene import Scene
from cromss_dist.data.synthetic.settings import FloatArray, SyntheticConfig
from cromss_dist.data.synthetic.site import Site
from cromss_dist.schema import IMAGE_ARRAYS, NUM_SEASONS, S2_BANDS

_CLOUD_REACH_PX = 48  # shadows fall this far at most, 480 m

# Surface reflectance, %, in the order of S2_BANDS. Set by hand to the shapes and levels of the ECOSTRESS spectral library
# (Meerdink et al., 2019, doi:10.1016/j.rse.2019.05.015) at the Sentinel-2 band centres; B10 sees no ground.
_MATERIALS = {
    "broadleaf": (2.0, 2.5, 4.8, 2.6, 8.0, 25, 32, 33, 35, 33, 0, 17, 7.5),
    "conifer": (1.6, 1.8, 3.2, 2.0, 4.6, 13.5, 17, 18, 19, 18, 0, 8.5, 3.8),
    "meadow": (2.8, 3.4, 6.8, 4.2, 10.5, 26, 32, 34, 36, 34, 0, 23, 12),
    "crop": (2.7, 3.2, 6.8, 3.6, 9.6, 29, 37, 39, 41, 39, 0, 20, 9.8),
    "bush": (2.6, 3.2, 5.6, 4.2, 8.6, 19, 23, 25, 26.5, 25, 0, 20, 11),
    "straw": (6.0, 7.4, 10.5, 13.5, 16.5, 20, 22.5, 24, 26, 26, 0, 32, 24),
    "litter": (4.0, 4.8, 6.6, 8.4, 10.2, 13, 14.5, 16, 17.5, 18, 0, 21, 14.5),
    "dark_soil": (4.6, 5.6, 8.0, 10.2, 12.2, 13.8, 15.2, 16.4, 17.8, 18, 0, 24, 19.5),
    "bright_soil": (10, 12.5, 18.5, 26, 29, 31, 33, 34, 36, 36, 0, 45, 40),
    "rock": (9, 10.5, 13, 15.5, 16.8, 17.8, 18.8, 19.5, 20.5, 20, 0, 23.5, 21),
    "asphalt": (7.6, 8.6, 9.8, 10.8, 11.6, 12.4, 13, 13.4, 14.4, 14, 0, 17, 16),
    "tile": (8.0, 9.2, 12, 17.5, 20, 22, 23, 23.5, 25, 25, 0, 30, 27),
    "concrete": (18, 21, 25, 28, 29.5, 30.5, 31.5, 31.5, 33, 32, 0, 34, 31),
    "clear_water": (3.4, 3.0, 2.2, 1.1, 0.8, 0.6, 0.6, 0.5, 0.5, 0.4, 0, 0.2, 0.1),
    "muddy_water": (5.2, 6.6, 9.8, 9.6, 9.0, 5.2, 4.8, 3.8, 3.2, 2.0, 0, 0.5, 0.3),
    "snow": (86, 88, 88, 87, 86, 84, 83, 81, 78, 74, 0, 9, 7),
}
_NAMES = tuple(_MATERIALS)

# Clear air at L1C: reflectance added, % (molecules and a little aerosol, so blue most), and the share that passes.
# Dark-object levels of cloud-free Sentinel-2 scenes; B9 lies in a water vapour band, B10 in one that nothing passes.
_PATH = np.array([11.0, 8.2, 5.4, 3.5, 2.7, 1.9, 1.5, 1.2, 0.9, 0.4, 0.1, 0.15, 0.1], np.float32)
_PASS = np.array([0.75, 0.80, 0.85, 0.90, 0.91, 0.92, 0.93, 0.90, 0.95, 0.35, 0.002, 0.94, 0.92], np.float32)
_HAZE = np.array([1.0, 0.9, 0.72, 0.56, 0.5, 0.42, 0.37, 0.31, 0.29, 0.1, 0.01, 0.07, 0.04], np.float32)  # aerosol, B1 = 1
_CLOUD = np.array([62, 61, 60, 61, 62, 63, 64, 63, 64, 22, 2.0, 42, 32], np.float32)  # thick cloud, %

# Brightness texture within a pixel's neighbourhood, by class: crowns, shadows of walls, furrows.
_TEXTURE = np.array([0.02, 0.13, 0.07, 0.12, 0.06, 0.13, 0.20, 0.08, 0.04], np.float32)


@dataclass(frozen=True)
class Optical:
    """Sentinel-2 of one location.

    Args:
        bands: Band -> uint16 (4, size / scale, size / scale), digital numbers (reflectance x 10000), native resolution.
        cloud: float32 (4, H, W) opacity of clouds, 0-1.
        shadow: float32 (4, H, W) depth of cloud shadows, 0-1.
        toa: float32 (4, 13, H, W) reflectance x 10000 at 10 m before the instrument.
    """

    bands: dict[str, np.ndarray[tuple[int, int, int], np.dtype[np.uint16]]]
    cloud: FloatArray
    shadow: FloatArray
    toa: FloatArray


def observe_s2(rng: np.random.Generator, scene: Scene, site: Site, config: SyntheticConfig) -> Optical:
    """Renders the four Sentinel-2 scenes of a location."""
    size = scene.truth.shape[-1]
    shape = (NUM_SEASONS, size, size)
    cloud, shadow = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    toa = np.empty((NUM_SEASONS, len(S2_BANDS), size, size), np.float32)
    materials = np.array([_MATERIALS[name] for name in _NAMES], np.float32)
    tint = 1 + 0.07 * rng.standard_normal(materials.shape).astype(np.float32)  # no two regions have the same soil or leaf
    materials = materials * tint
    for season in range(NUM_SEASONS):
        elevation, azimuth = site.sun(season)
        slope_row, slope_col = (s * (scene.truth[season] != WATER) for s in np.gradient(scene.elevation_m / 10))
        # einsum without BLAS: equal bytes whatever the number of threads.
        ground = np.einsum("khw,kb->bhw", _mixture(rng, scene, season), materials)
        texture = _TEXTURE[scene.truth[season]] * (0.8 * gaussian_field(rng, size, 0.6) + 0.6 * gaussian_field(rng, size, 2))
        ground *= np.exp(texture + 0.07 * scene.tone + rng.normal(0, 0.03))
        # Rows grow southwards. 15 % of the light is diffuse and reaches every slope alike.
        facing = -slope_col * np.sin(azimuth) + slope_row * np.cos(azimuth)
        steep = np.sqrt(1 + slope_row**2 + slope_col**2)
        direct = np.clip((1 + facing / np.tan(elevation)) / steep, 0.1, 2.2)
        light = 0.15 + 0.85 * direct
        if rng.random() < config.cloudy_share:
            cloud[season], shadow[season] = _clouds(rng, size, elevation, azimuth)
        ground *= light * (1 - 0.72 * shadow[season])
        haze = 0.2 + rng.gamma(2.0, 0.5) * (1 + 0.15 * gaussian_field(rng, size, 60))
        air = _PASS.copy()
        air[S2_BANDS.index("B9")] *= rng.uniform(0.5, 1.5)  # water vapour
        path = _PATH * rng.uniform(0.9, 1.1)
        path[S2_BANDS.index("B10")] = rng.lognormal(-1.9, 0.45)  # high thin cirrus
        veil = np.clip(haze, 0, None)[None] * _HAZE[:, None, None]
        view = path[:, None, None] + air[:, None, None] * (1 - 0.006 * veil) * ground + veil
        lit = 1 + 0.10 * gaussian_field(rng, size, 6) + 0.06 * gaussian_field(rng, size, 2)
        opacity = cloud[season]
        toa[season] = 100 * (view * (1 - opacity) + opacity * lit * _CLOUD[:, None, None] * rng.uniform(0.7, 1.15))
    return Optical(_instrument(rng, toa), cloud, shadow, toa)


def _mixture(rng: np.random.Generator, scene: Scene, season: int) -> FloatArray:
    """float32 (material, H, W): shares of the materials in each pixel; they add up to at most 1, the rest is dark."""
    truth, green, wet = scene.truth[season], scene.green[season], scene.wet[season]
    soil = np.clip(scene.soil * (1.15 - 0.6 * wet), 0, 1)
    size = truth.shape[-1]
    shares = np.zeros((len(_NAMES), size, size), np.float32)

    def add(cls: int, **parts: FloatArray | float) -> None:
        where = truth == cls
        for name, part in parts.items():
            shares[_NAMES.index(name)][where] = np.broadcast_to(np.asarray(part, np.float32), truth.shape)[where]

    patchy = np.clip(0.5 + 0.2 * gaussian_field(rng, size, 3) + 0.12 * scene.tone, 0.05, 0.95)
    muddy = np.clip(scene.turbidity[season] + 0.12 * gaussian_field(rng, size, 30) + 0.03 * gaussian_field(rng, size, 3), 0.02, 1)
    add(WATER, clear_water=1 - muddy, muddy_water=muddy)
    leaf = np.clip(green, 0, 1)
    add(
        TREES,
        broadleaf=0.92 * leaf * (1 - scene.conifer),
        conifer=0.92 * leaf * scene.conifer,
        litter=(1 - leaf) * 0.62,
        straw=(1 - leaf) * 0.12,
    )
    add(
        GRASS,
        meadow=leaf,
        straw=(1 - leaf) * patchy,
        dark_soil=(1 - leaf) * (1 - patchy) * (1 - soil),
        bright_soil=(1 - leaf) * (1 - patchy) * soil,
    )
    bare = (1 - leaf) * (1 - scene.water_depth[season])
    stubble = 0.45 * patchy * (scene.tone > 0)  # some fields are ploughed, some are stubble
    drowned = (1 - leaf) * scene.water_depth[season]
    add(
        CROPS,
        crop=leaf,
        straw=bare * stubble,
        dark_soil=bare * (1 - stubble) * (1 - soil),
        bright_soil=bare * (1 - stubble) * soil,
        muddy_water=drowned,
    )
    cover = np.clip(0.25 + 0.75 * leaf * (0.7 + 0.6 * patchy), 0.1, 0.9)
    add(
        SHRUB,
        bush=cover * np.clip(0.35 + leaf, 0, 1),
        straw=(1 - cover) * 0.5,
        dark_soil=(1 - cover) * 0.5 * (1 - soil),
        bright_soil=(1 - cover) * 0.5 * soil,
    )
    open_water = np.clip(0.55 * scene.water_depth[season] * (1.2 - leaf), 0, 0.7)
    reed = 1 - open_water
    add(
        FLOODED,
        meadow=reed * leaf,
        litter=reed * (1 - leaf) * 0.5,
        straw=reed * (1 - leaf) * 0.4,
        clear_water=open_water * (1 - muddy),
        muddy_water=open_water * muddy,
    )
    sealed = scene.built_share
    yard = 1 - sealed
    tile = np.clip(0.9 - 2.2 * np.abs(scene.roof - 0.55), 0, 1)
    add(
        BUILT,
        asphalt=sealed * (1 - scene.roof) * (1 - tile) * 0.85,
        concrete=sealed * scene.roof * (1 - tile),
        tile=sealed * tile,
        broadleaf=yard * leaf * 0.5,
        meadow=yard * leaf * 0.5,
        bright_soil=yard * (1 - leaf) * soil,
        dark_soil=yard * (1 - leaf) * (1 - soil),
    )
    stony = np.clip(scene.rock, 0, 1)
    add(
        BARE,
        rock=stony,
        bright_soil=(1 - stony) * np.clip(soil + 0.15, 0, 1) * (1 - leaf),
        dark_soil=(1 - stony) * np.clip(0.85 - soil, 0, 1),
        straw=leaf,
    )
    old = np.clip(0.75 + 0.12 * gaussian_field(rng, size, 8), 0.35, 1)  # patchy and ageing snow lets the ground through
    add(SNOW, snow=old, rock=(1 - old) * 0.5, dark_soil=(1 - old) * 0.5)
    return shares


def _clouds(rng: np.random.Generator, size: int, elevation: float, azimuth: float) -> tuple[FloatArray, FloatArray]:
    """Opacity of clouds and depth of their shadows, each (size, size), 0-1."""
    reach = _CLOUD_REACH_PX
    shape = fractal_field(rng, size + 2 * reach, 3.3, rng.uniform(50, 200))
    edge = np.quantile(shape, 1 - rng.uniform(0.08, 0.45))
    opacity = np.clip((shape - edge) / (0.8 * shape.std()), 0, 1)
    opacity = opacity * opacity * (3 - 2 * opacity)
    # The shadow lies away from the sun: rows grow southwards, columns eastwards.
    distance = min(rng.uniform(20, 60) / np.tan(elevation), reach)
    row, col = round(np.cos(azimuth) * distance), round(-np.sin(azimuth) * distance)
    here = opacity[reach : reach + size, reach : reach + size]
    cast = opacity[reach - row : reach - row + size, reach - col : reach - col + size]
    return here.astype(np.float32), (blur(cast, 1.5) * (1 - here)).astype(np.float32)


def _instrument(rng: np.random.Generator, toa: FloatArray) -> dict[str, np.ndarray[tuple[int, int, int], np.dtype[np.uint16]]]:
    """Point spread, native sampling and sensor noise: 4 DN and 0.6 % of the signal."""
    bands: dict[str, np.ndarray[tuple[int, int, int], np.dtype[np.uint16]]] = {}
    size = toa.shape[-1]
    for array in IMAGE_ARRAYS:
        if array.modality != "s2":
            continue
        scale = array.scale
        for band in array.bands:
            seen = blur(toa[:, S2_BANDS.index(band)], 0.55 if scale == 1 else 0.3 * scale)
            native = seen.reshape(NUM_SEASONS, size // scale, scale, size // scale, scale).mean(axis=(2, 4))
            native = native + rng.standard_normal(native.shape, dtype=np.float32) * (4 + 0.006 * native)
            bands[band] = np.clip(np.rint(native), 1, 65535).astype(np.uint16)  # 0 would read as no data
    return bands

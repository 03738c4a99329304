"""Land cover and the state of the ground: what both sensors look at, and the truth the labels miss."""

from dataclasses import dataclass

import numpy as np

from cromss_dist.data.synthetic import landscape
from cromss_dist.data.synthetic.fields import blur, fractal_field, gaussian_field, top
from cromss_dist.data.synthetic.landscape import BARE, BUILT, CROPS, FLOODED, GRASS, SHRUB, SNOW, TREES, WATER, Landscape
from cromss_dist.data.synthetic.settings import ByteArray, FloatArray
from cromss_dist.data.synthetic.site import Site
from cromss_dist.schema import NUM_SEASONS

# Greenness over the year: lowest, highest, phase of the peak (0 mid-winter, 0.5 midsummer), width.
# Shapes follow MODIS/Sentinel-2 NDVI curves of temperate and dry-season climates.
_DECIDUOUS = (0.12, 0.95, 0.53, 0.19)
_EVERGREEN = (0.80, 0.92, 0.50, 0.30)
_GRASS = (0.30, 0.90, 0.42, 0.20)
_SHRUB = (0.30, 0.62, 0.42, 0.22)
_DRY_GRASS = (0.08, 0.75, 0.18, 0.14)  # grows on winter rain
_CROPS = (
    (0.05, 0.95, 0.36, 0.11),  # winter cereal
    (0.03, 0.95, 0.58, 0.11),  # maize, soy, cotton
    (0.04, 0.90, 0.47, 0.10),  # spring cereal, rape
    (0.45, 0.90, 0.45, 0.22),  # fodder, alfalfa
    (0.04, 0.16, 0.45, 0.20),  # fallow
    (0.35, 0.60, 0.45, 0.25),  # orchard, vineyard
    (0.05, 0.95, 0.66, 0.11),  # paddy, under water before it grows
)
_PADDY = 6


@dataclass(frozen=True)
class Scene:
    """The ground of one location in four seasons; maps are (H, W), per season (4, H, W).

    Args:
        place: Kind of place, one of PLACES.
        truth: uint8 (4, H, W) class of each pixel, 0-8.
        green: float32 (4, H, W) share of green cover, 0-1.
        wet: float32 (4, H, W) wetness of soil, 0-1.
        water_depth: float32 (4, H, W) 0-1; standing water under crops and marsh.
        elevation_m: float32 (H, W).
        tone: float32 (H, W) lasting brightness of ground and canopy by parcel, standard normal.
        soil: float32 (H, W) 0 dark and moist to 1 bright and dry.
        rock: float32 (H, W) share of rock on bare ground, 0-1.
        conifer: float32 (H, W) share of conifers among trees, 0-1.
        built_share: float32 (H, W) sealed share of built pixels, 0-1.
        roof: float32 (H, W) 0 asphalt to 1 bright roofs.
        turbidity: float32 (4,) 0 clear to 1 muddy.
    """

    place: str
    truth: ByteArray
    green: FloatArray
    wet: FloatArray
    water_depth: FloatArray
    elevation_m: FloatArray
    tone: FloatArray
    soil: FloatArray
    rock: FloatArray
    conifer: FloatArray
    built_share: FloatArray
    roof: FloatArray
    turbidity: FloatArray


def make_scene(rng: np.random.Generator, place: str, site: Site, size_px: int) -> Scene:
    """Draws the ground of one location."""
    land = landscape.draw(rng, place, size_px)
    aridity = {"arid": 0.9, "mountain": 0.4, "wetland": 0.2}.get(place, 0.35) + rng.uniform(-0.1, 0.1)
    parcel_tone = rng.standard_normal(land.parcel.max() + 1).astype(np.float32)[land.parcel]
    tone = 0.75 * parcel_tone + 0.5 * gaussian_field(rng, size_px, 3) + 0.3 * gaussian_field(rng, size_px, 20)
    level = rng.permutation(np.array([0.0, 0.45, 0.75, 1.0])) * rng.uniform(0.8, 1.0)  # of marsh and river water
    truth = np.repeat(land.cover[None], NUM_SEASONS, axis=0)
    wet = np.empty((NUM_SEASONS, size_px, size_px), np.float32)
    for season in range(NUM_SEASONS):
        _flood(truth[season], land, float(level[season]))
        rain = rng.uniform(0.1, 0.9) * (1.1 - aridity)
        wet[season] = np.clip(rain + 0.12 * land.moisture + 0.08 * gaussian_field(rng, size_px, 10), 0, 1)
    _snow(rng, truth, land, place, site)
    green, paddy = _greenness(rng, truth, land, site, aridity)
    scene_soil = rng.uniform(0.2, 0.6) + 0.35 * (aridity - 0.4)
    return Scene(
        place,
        truth,
        green,
        wet,
        np.where(truth == FLOODED, np.float32(0.25) + 0.75 * land.shore_depth, paddy).astype(np.float32),
        land.elevation_m,
        tone.astype(np.float32),
        np.clip(scene_soil + 0.16 * tone - 0.1 * land.moisture, 0, 1).astype(np.float32),
        np.clip(rng.uniform(0.1, 0.5) + (0.3 if place == "mountain" else 0.0) + 0.2 * fractal_field(rng, size_px, 2.5, 60), 0, 1),
        np.clip(land.conifer, 0, 1),
        land.built_share,
        land.roof,
        rng.uniform(0, 1, NUM_SEASONS).astype(np.float32) * rng.uniform(0.3, 1.0),
    )


def _flood(truth: ByteArray, land: Landscape, level: float) -> None:
    # The marsh zone: open water below the season's level, flooded plants around it, meadow or mud where it is dry.
    zone = land.shore_depth >= 0
    depth = land.shore_depth - (1 - level)  # > 0 under water
    truth[zone & (depth > 0.45)] = WATER
    truth[zone & (depth <= 0.45) & (depth > -0.35)] = FLOODED
    truth[zone & (depth <= -0.35)] = np.where(land.cover == BARE, BARE, GRASS)[zone & (depth <= -0.35)]
    # Lakes and rivers bare part of their bed when the level is low.
    truth[land.bed & (level < 0.3)] = BARE


def _snow(rng: np.random.Generator, truth: ByteArray, land: Landscape, place: str, site: Site) -> None:
    for season in range(NUM_SEASONS):
        cold = 0.5 + 0.5 * np.cos(2 * np.pi * site.phase(season))  # 1 mid-winter
        if place == "mountain":
            share = np.clip(0.04 + 0.5 * cold**1.5 + rng.normal(0, 0.06), 0.02, 0.75)
        elif abs(site.lat) > 44 and cold > 0.6 and rng.random() < 0.3:
            share = rng.uniform(0.4, 0.9)
        else:
            continue
        height = land.height + 0.18 * fractal_field(rng, truth.shape[-1], 2.8, 60)
        # Snow hides from view under trees, on roads and on open water.
        truth[season][top(height, float(share)) & np.isin(truth[season], (GRASS, SHRUB, CROPS, BARE))] = SNOW


def _bump(phase: float | FloatArray, curve: tuple[float, float, float, float]) -> FloatArray:
    low, high, peak, width = curve
    distance = np.abs((np.asarray(phase, np.float32) - peak + 0.5) % 1 - 0.5)
    return np.asarray(low + (high - low) * np.exp(-((distance / width) ** 2)), np.float32)


def _greenness(
    rng: np.random.Generator, truth: ByteArray, land: Landscape, site: Site, aridity: float
) -> tuple[FloatArray, FloatArray]:
    size = truth.shape[-1]
    limit = land.parcel.max() + 1
    # A region grows a few crops: weights drawn per location.
    kind = rng.choice(len(_CROPS), limit, p=rng.dirichlet(np.full(len(_CROPS), 0.9)))[land.parcel]
    vigour = rng.normal(0, 0.12, limit)[land.parcel] + 0.07 * gaussian_field(rng, size, 4) + 0.05 * gaussian_field(rng, size, 15)
    shift = rng.normal(0, 0.03, limit)[land.parcel].astype(np.float32)
    mown = rng.random((NUM_SEASONS, limit)) < 0.2
    green = np.zeros(truth.shape, np.float32)
    paddy = np.zeros(truth.shape, np.float32)
    for season in range(NUM_SEASONS):
        phase = site.phase(season)
        value, cover = green[season], truth[season]
        grass = _bump(phase, _GRASS) * (1 - aridity) + _bump(phase, _DRY_GRASS) * aridity
        conifer = np.clip(land.conifer, 0, 1)
        for cls, curve in (
            (TREES, conifer * _bump(phase, _EVERGREEN) + (1 - conifer) * _bump(phase, _DECIDUOUS)),
            (GRASS, np.where(mown[season][land.parcel], 0.6, 1.0) * grass),
            (SHRUB, _bump(phase, _SHRUB) * (1.15 - 0.5 * aridity)),
            (FLOODED, 0.25 + 0.55 * _bump(phase, _GRASS)),
            (BUILT, 0.7 * grass),
            (BARE, 0.05),
        ):
            value[cover == cls] = np.broadcast_to(curve, cover.shape)[cover == cls]
        for number, crop in enumerate(_CROPS):
            chosen = (cover == CROPS) & (kind == number)
            value[chosen] = _bump(phase - shift[chosen], crop)
            if number == _PADDY and 0.4 < phase < 0.56:
                paddy[season][chosen] = 0.9 * (1 - value[chosen])
        # Vigour spreads what has leaves; ground without any stays bare.
        value *= np.clip(1 + 1.3 * vigour, 0.3, 1.6)
        np.clip(value, 0, 1, out=value)
        value[(cover == WATER) | (cover == SNOW)] = 0
    return blur(green, 0.4), paddy

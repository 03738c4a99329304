"""Land cover of the six kinds of place, drawn from smooth fields, parcels, rivers and towns."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cromss_dist.data.synthetic.fields import borders, fractal_field, gaussian_field, parcel_limit, parcels, river, top
from cromss_dist.data.synthetic.settings import ByteArray, FloatArray

WATER, TREES, GRASS, FLOODED, CROPS, SHRUB, BUILT, BARE, SNOW = range(9)
BoolArray = npt.NDArray[np.bool_]

# Height range within 2.6 km, metres.
_RELIEF_M = {"farmland": 14, "forest": 60, "town": 12, "arid": 40, "mountain": 1100, "wetland": 8}


@dataclass
class Landscape:
    """Land cover before the seasons change it, and the fields the seasons need. Maps are (size, size)."""

    rng: np.random.Generator
    size: int
    height: FloatArray  # standardised terrain
    moisture: FloatArray  # standardised; high in hollows
    elevation_m: FloatArray
    cover: ByteArray
    parcel: npt.NDArray[np.int64]
    conifer: FloatArray
    built_share: FloatArray
    roof: FloatArray
    shore_depth: FloatArray  # 0 (high) to 1 (low) within the marsh, -1 outside
    bed: BoolArray = field(init=False)  # river bed or lake shore that low water lays bare

    def __post_init__(self) -> None:
        self.bed = np.zeros((self.size, self.size), np.bool_)

    def noise(self, scale_px: float) -> FloatArray:
        """A fresh unit-variance field."""
        return gaussian_field(self.rng, self.size, scale_px)

    def paint(self, where: BoolArray, cls: int) -> None:
        """Sets the class."""
        self.cover[where] = cls


def draw(rng: np.random.Generator, place: str, size_px: int) -> Landscape:
    """Draws the land cover of a `place`."""
    height = fractal_field(rng, size_px, 4.3 if place == "mountain" else 3.6, 220)
    height = (height - height.mean()) / max(float(height.std()), 1e-6)
    moisture = 0.7 * gaussian_field(rng, size_px, 16) - 0.6 * height
    side = rng.uniform(20, 38) if rng.random() < 0.7 else rng.uniform(9, 14)  # small holdings in some regions
    ids = parcels(rng, size_px, side, int(rng.integers(2, 6)))
    zeros = np.zeros((size_px, size_px), np.float32)
    land = Landscape(
        rng=rng,
        size=size_px,
        height=height,
        moisture=moisture,
        elevation_m=(height * _RELIEF_M[place] / 4).astype(np.float32),
        cover=np.full((size_px, size_px), GRASS, np.uint8),
        parcel=ids,
        conifer=(rng.uniform(0.1, 0.7) + 0.45 * fractal_field(rng, size_px, 2.6, 70)).astype(np.float32),
        built_share=zeros + 0.75,
        roof=np.clip(0.4 + 0.3 * gaussian_field(rng, size_px, 1.2), 0, 1),
        shore_depth=zeros - 1,
    )
    match place:
        case "farmland":
            _farmland(land)
        case "forest":
            _forest(land)
        case "town":
            _town(land)
        case "arid":
            _arid(land)
        case "mountain":
            _mountain(land)
        case _:
            _wetland(land)
    return land


def _fields(land: Landscape, where: BoolArray, shares: dict[int, float]) -> None:
    """Gives each parcel in `where` one class at the given shares; hedges line some of the borders."""
    limit = parcel_limit(land.parcel)
    classes = land.rng.choice(list(shares), limit, p=list(shares.values()))
    land.cover[where] = classes[land.parcel][where]
    hedged = (land.rng.random(limit) < land.rng.uniform(0.05, 0.4))[land.parcel]
    line = borders(land.parcel)
    land.paint(where & line & hedged & (land.noise(2) > -0.3), TREES)
    land.paint(where & line & ~hedged & (land.rng.random(limit) < 0.35)[land.parcel], GRASS)


def _river(land: Landscape, half_width_px: float, bank: int | None, bend_px: float = 22) -> None:
    distance = river(land.rng, land.size, bend_px)
    width = half_width_px * (1 + 0.2 * land.noise(20))
    if bank is not None:
        land.paint(distance < width + 2.2 + 2.2 * np.maximum(land.noise(4), -0.8), bank)
    land.paint(distance < width, WATER)
    # Gravel bars along the inner bends fall dry.
    land.bed |= (distance < width) & (distance > width - 1.6) & (land.noise(8) > 0.2)


def _lake(land: Landscape, share: float) -> None:
    basin = -land.height + 0.35 * land.moisture + 0.08 * land.noise(5)
    land.paint(top(basin, share), WATER)
    land.bed |= top(basin, share) & ~top(basin, share * 0.88)


def _road(land: Landscape, half_width_px: float, cls: int) -> None:
    land.paint(river(land.rng, land.size, 7) < half_width_px, cls)


def _settlement(land: Landscape, urban: BoolArray, block_px: float, density: float) -> None:
    """Blocks of houses, yards, parks and lots between streets."""
    rng = land.rng
    ids = parcels(rng, land.size, block_px, int(rng.integers(2, 5)))
    limit = parcel_limit(ids)
    kind = rng.choice(5, limit, p=[0.74 * density + 0.1, 0.16 - 0.04 * density, 0.12, 0.10, 0.52 - 0.70 * density])[ids]
    block_share = np.clip(rng.normal(0.35 + 0.4 * density, 0.16, limit), 0.25, 0.98).astype(np.float32)[ids]
    land.built_share = np.where(urban, np.clip(block_share + 0.16 * land.noise(0.9), 0.15, 1), land.built_share).astype(
        np.float32
    )
    roof = rng.beta(1.2, 1.6, limit).astype(np.float32)[ids]
    land.roof = np.where(urban, np.clip(roof + 0.18 * land.noise(0.8), 0, 1), land.roof).astype(np.float32)
    for number, cls in ((0, BUILT), (1, GRASS), (2, TREES), (3, BARE)):
        land.paint(urban & (kind == number), cls)
    gardens = urban & (kind == 0) & (block_share < 0.55) & (land.noise(1.6) > 0.9)
    land.paint(gardens, TREES)
    land.paint(urban & (kind == 0) & (block_share < 0.6) & (land.noise(1.6) > 1.2), GRASS)
    street = urban & borders(ids)
    land.paint(street, BUILT)
    land.built_share[street] = 0.9
    land.roof[street] = 0.12


def _village(land: Landscape, count: int, radius_px: float, where: BoolArray) -> None:
    row, col = np.indices((land.size, land.size), dtype=np.float32)
    centres = land.rng.uniform(0.1, 0.9, (count, 2)) * land.size
    spot = np.max([np.exp(-((row - r) ** 2 + (col - c) ** 2) / (2 * radius_px**2)) for r, c in centres], axis=0)
    _settlement(land, where & (spot + 0.12 * land.noise(3) > 0.5), 6.5, 0.45)


def _farmland(land: Landscape) -> None:
    everywhere = np.ones_like(land.bed)
    _fields(land, everywhere, {CROPS: 0.76, GRASS: 0.11, TREES: 0.04, SHRUB: 0.04, BARE: 0.05})
    land.paint(top(land.moisture + 0.3 * land.noise(5), 0.07), TREES)
    if land.rng.random() < 0.7:
        _river(land, land.rng.uniform(1.2, 7), TREES)
    _road(land, 0.8, BUILT)
    _village(land, int(land.rng.integers(1, 4)), 17, land.cover != WATER)


def _forest(land: Landscape) -> None:
    rng = land.rng
    stands = parcels(rng, land.size, 34, 4)
    limit = parcel_limit(stands)
    land.parcel = stands
    land.conifer = (land.conifer + rng.normal(0, 0.35, limit)[stands]).astype(np.float32)
    land.cover[:] = TREES
    cut = rng.choice(4, limit, p=[0.80, 0.10, 0.06, 0.04])[stands]
    for number, cls in ((1, SHRUB), (2, GRASS), (3, BARE)):
        land.paint(cut == number, cls)
    land.paint(top(land.noise(7) + 0.5 * land.noise(2.5), 0.14), SHRUB)
    land.paint(top(land.noise(9) + 0.4 * land.noise(2.5), 0.10), GRASS)
    open_land = top(land.noise(28) + 0.1 * land.noise(3), 0.10)
    _fields(land, open_land, {CROPS: 0.5, GRASS: 0.4, SHRUB: 0.1})
    bog = top(-land.height + 0.6 * land.noise(9), 0.16)
    land.shore_depth[bog] = np.clip(0.5 + 0.35 * land.noise(5), 0, 0.8)[bog]
    land.paint(bog, GRASS)
    _lake(land, rng.uniform(0.03, 0.16))
    land.shore_depth[land.cover == WATER] = -1
    _road(land, 0.7, BARE)
    if rng.random() < 0.5:
        _village(land, 1, 11, land.cover != WATER)


def _town(land: Landscape) -> None:
    rng = land.rng
    _fields(land, np.ones_like(land.bed), {CROPS: 0.42, GRASS: 0.22, TREES: 0.12, SHRUB: 0.14, BARE: 0.10})
    urban = top(land.noise(45) + 0.35 * land.noise(10), rng.uniform(0.5, 0.72))
    _settlement(land, urban, rng.uniform(9, 13), 0.62)
    core = top(land.noise(35), 0.12) & urban
    works = core & (rng.random(parcel_limit(land.parcel)) < 0.6)[land.parcel]  # halls and yards on whole parcels
    land.paint(works, BUILT)
    land.built_share[works] = 0.97
    land.paint(top(land.noise(14) + 0.2 * land.noise(3), 0.05), TREES)
    if rng.random() < 0.7:
        _river(land, rng.uniform(2, 9), TREES if rng.random() < 0.5 else None)
    for _ in range(2):
        _road(land, 1.0, BUILT)


def _arid(land: Landscape) -> None:
    rng = land.rng
    land.cover[:] = BARE
    drainage = np.abs(fractal_field(rng, land.size, 2.8, 120)) + 0.02 * land.noise(1.5)
    land.paint(top(land.noise(12) + 0.8 * land.moisture + 0.7 * land.noise(2.5), 0.26), SHRUB)
    land.paint(~top(drainage, 0.90), SHRUB)
    land.paint(top(land.moisture + 0.6 * land.noise(5) + 0.5 * land.noise(2), 0.10), GRASS)
    if rng.random() < 0.75:  # irrigated land: pivots or an oasis along the valley
        if rng.random() < 0.5:
            row, col = np.indices((land.size, land.size), dtype=np.float32)
            radius = rng.uniform(18, 36)
            grid = [(r, c) for r in range(4) for c in range(4)]
            for r, c in (grid[int(i)] for i in rng.choice(16, int(rng.integers(3, 8)), replace=False)):
                distance = np.hypot(row - (r * 2.12 + 0.6) * radius, col - (c * 2.12 + 0.6) * radius)
                land.paint(distance < radius, CROPS)
        else:
            _fields(land, top(land.moisture + 0.15 * land.noise(6), 0.3), {CROPS: 0.7, TREES: 0.12, SHRUB: 0.06, BARE: 0.12})
    if rng.random() < 0.6:
        _lake(land, rng.uniform(0.03, 0.10))
    _road(land, 0.7, BUILT)
    if rng.random() < 0.6:
        _village(land, 1, 17, land.cover != WATER)


def _mountain(land: Landscape) -> None:
    zone = land.height + 0.16 * land.noise(6) + 0.10 * land.noise(2)
    levels = np.quantile(zone, np.array([0.34, 0.56, 0.76]) + land.rng.uniform(-0.06, 0.06))
    slope = np.hypot(*np.gradient(land.height))
    land.cover[:] = np.array([TREES, SHRUB, GRASS, BARE], np.uint8)[np.digitize(zone, levels)]
    land.paint(top(slope + 0.02 * land.noise(3), 0.12) & (zone > levels[0]), BARE)
    land.paint(top(land.noise(9), 0.10) & (zone < levels[0]), GRASS)
    valley = ~top(land.height, 0.87) & (land.noise(12) > -0.6)
    land.parcel = parcels(land.rng, land.size, 14, 3)
    _fields(land, valley, {CROPS: 0.35, GRASS: 0.45, TREES: 0.20})
    land.conifer += 0.3
    if land.rng.random() < 0.6:
        _lake(land, land.rng.uniform(0.03, 0.10))
    _village(land, 1, 11, valley & (land.cover != WATER))


def _wetland(land: Landscape) -> None:
    rng = land.rng
    row, col = np.indices((land.size, land.size), dtype=np.float32) / land.size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    ground = 0.45 * land.height + 3.0 * (row * np.cos(angle) + col * np.sin(angle)) + 0.08 * land.noise(4)
    rank = np.argsort(np.argsort(ground.ravel())).reshape(ground.shape).astype(np.float32) / ground.size
    sea, marsh = rng.uniform(0.28, 0.42), rng.uniform(0.20, 0.28)
    _fields(land, np.ones_like(land.bed), {CROPS: 0.40, GRASS: 0.26, TREES: 0.16, SHRUB: 0.14, BARE: 0.04})
    land.paint(top(land.noise(9) + 0.4 * land.noise(3), 0.10), TREES)
    zone = (rank > sea) & (rank < sea + marsh)
    land.paint(zone, GRASS)
    creek = np.abs(fractal_field(rng, land.size, 2.6, 60)) < 0.07  # tidal creeks cut the marsh
    depth = 1 - (rank - sea) / marsh + 0.10 * land.noise(3)
    land.shore_depth = np.where(zone, np.clip(depth, 0, 1), -1).astype(np.float32)
    land.paint(rank <= sea, WATER)
    beach = (rank > sea - 0.015) & (rank < sea + 0.05) & (land.noise(25) > 0.1)
    land.paint(beach, BARE)
    land.shore_depth[beach | (zone & creek)] = -1
    land.paint(zone & creek & ~beach, WATER)
    if rng.random() < 0.6:
        _river(land, rng.uniform(2, 6), None)
        land.bed &= rank > sea  # the river ends in the sea, which has no bars of its own
    land.shore_depth[land.cover == WATER] = -1
    _village(land, 2, 18, (rank > sea + marsh) & (land.cover != WATER))

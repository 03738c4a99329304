"""Tiny archives of other layouts: tiles that hold all bands, dates for folders, other names, one label for all seasons."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio import Affine

Pixels = npt.NDArray[np.generic]


def write_bands(path: Path, pixels: Pixels, nodata: float | None = None, **options: object) -> Pixels:
    """All bands, shape (band, H, W) or (H, W), in one GeoTIFF of 10 m in UTM; returns them as (band, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = pixels.reshape(-1, *pixels.shape[-2:])
    profile = {"driver": "GTiff", "height": bands.shape[1], "width": bands.shape[2], "count": len(bands), "nodata": nodata}
    transform = Affine(10, 0, 400000, 0, -10, 5000000)
    with rasterio.open(path, "w", **profile, dtype=bands.dtype.name, crs="EPSG:32633", transform=transform, **options) as dataset:
        dataset.write(bands)
    return bands


class Drawer:
    """Random pixels of plausible range; every array differs from every other."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(11)

    def db(self, bands: int, size_px: int) -> Pixels:
        """Backscatter, float32."""
        return self._rng.normal(-15, 5, (bands, size_px, size_px)).astype(np.float32)

    def reflectance(self, bands: int, size_px: int) -> Pixels:
        """Digital numbers, uint16."""
        return self._rng.integers(1, 5000, (bands, size_px, size_px), dtype=np.uint16)

    def classes(self, low: int, high: int, size_px: int, dtype: str = "uint8") -> Pixels:
        """Stored label values low-high."""
        return self._rng.integers(low, high + 1, (size_px, size_px)).astype(dtype)


def write_tiles(root: Path, names: tuple[str, ...], prefix: str, label: str, top_class: int, size_px: int) -> dict[str, Pixels]:
    """Tiles in the layout of the downstream sets, by path."""
    draw, written = Drawer(), {}
    for name in names:
        for folder, pixels in (
            ("image_s1/s1", draw.db(2, size_px)),
            ("image_s2/s2", draw.reflectance(13, size_px)),
            (f"label_{label}/{label}", draw.classes(0, top_class, size_px)),
        ):
            path = f"{prefix}/{folder}_{name}.tif"
            written[path] = write_bands(root / path, pixels)
    return written

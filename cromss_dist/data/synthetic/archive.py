"""Writes a synthetic archive in the layout of SSL4EO-S12 and NoLDO-S12, whole or not at all."""

import csv
import json
import os
import signal
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from functools import partial, reduce
from multiprocessing import get_context
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.warp import transform as reproject

from cromss_dist.data.staging import replacing
from cromss_dist.data.synthetic.location import Location, synthesise
from cromss_dist.data.synthetic.readme import readme
from cromss_dist.data.synthetic.report import Counts, Report, count, make_report
from cromss_dist.data.synthetic.settings import SyntheticConfig
from cromss_dist.data.synthetic.site import Site
from cromss_dist.errors import ConfigError, OutputExistsError
from cromss_dist.schema import NUM_SEASONS, S1_BANDS

GENERATOR = "cromss_dist.data.synthetic"  # marks report.json, and so a folder that may be replaced
_PIXEL_M = 10.0
_DEGREES_LAT = _PIXEL_M / 111_320  # latitude of a pixel


def write_archive(
    out: Path,
    config: SyntheticConfig,
    progress: Callable[[int], None] | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
) -> Report:
    """Writes an archive with its truth, noise kinds, README.md and report.json.

    Equal configs give equal bytes, whatever `workers`. The folder is built beside `out` and renamed at the end, so that
    `out` is complete whenever it exists.

    Args:
        out: Folder to create.
        config: Everything that decides the content.
        progress: Called with the number of locations done, in this process.
        workers: Processes; 1 works in this one.
        overwrite: Replace `out` if an earlier call wrote it.

    Returns:
        The figures that report.json holds.

    Raises:
        ConfigError: workers is below 1, or one of them was killed.
        OutputExistsError: `out` exists; with `overwrite`, if it is not a synthetic archive.
        OSError: the disk or the folder does not take a file.
    """
    out = Path(os.path.abspath(out))
    if workers < 1:
        raise ConfigError(f"workers={workers} is not allowed; give 1 or more processes.")
    _check_output(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial_out:
        rows: list[list[str]] = []
        counts: list[Counts] = []
        with closing(_write_all(partial_out, config, workers)) as written:  # no worker may write once the folder is removed
            for scenes, counted in written:
                rows.append([str(len(rows)), *scenes])
                counts.append(counted)
                if progress is not None:
                    progress(len(rows))
        report = make_report(len(rows), reduce(add, counts))
        with (partial_out / "dw_complete_ids.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["ids", *(f"sub{n + 1}" for n in range(NUM_SEASONS))], *rows])
        (partial_out / "README.md").write_text(readme(config, report))
        _write_json(partial_out / "report.json", {"generator": GENERATOR, "config": asdict(config), "report": report.as_json()})
    return report


def _check_output(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputExistsError(
            f"{out} exists already; choose another folder, or give --overwrite to replace a synthetic archive."
        )
    try:
        marker = json.loads((out / "report.json").read_text())["generator"]
    except (OSError, ValueError, KeyError, TypeError):
        marker = None
    if marker != GENERATOR or out.is_symlink():
        raise OutputExistsError(
            f"{out} was not written by this generator (no report.json of its own), so it is left alone; choose another folder."
        )


def _write_all(out: Path, config: SyntheticConfig, workers: int) -> Generator[tuple[tuple[str, ...], Counts]]:
    write = partial(_write_location, out, config)
    if workers == 1:
        yield from map(write, range(config.num_locations))
        return
    # spawn: no threads or locks of the parent, the same on every platform.
    with ProcessPoolExecutor(min(workers, config.num_locations), mp_context=get_context("spawn")) as pool:
        try:
            # Ctrl-C reaches the whole process group: workers inherit it blocked, and this process alone stops them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                written = pool.map(write, range(config.num_locations))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield from written
        except BrokenProcessPool as error:
            raise ConfigError(
                f"One of the {workers} worker processes was killed, most likely for lack of memory; give fewer workers or a "
                "smaller size_px."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_location(out: Path, config: SyntheticConfig, index: int) -> tuple[tuple[str, ...], Counts]:
    location = synthesise(config, index)
    site, name = location.site, f"{index:07d}"
    crs, origin = _grid(site, config.size_px)
    for season in range(NUM_SEASONS):
        s1 = out / "s1" / name / site.s1_scenes[season]
        s1.mkdir(parents=True)
        for number, band in enumerate(S1_BANDS):
            _write_tif(s1 / f"{band}.tif", location.s1[season, number], crs, origin)
        _write_json(s1 / "metadata.json", _s1_metadata(location, season))
        s2 = out / "s2c" / name / site.s2_scenes[season]
        s2.mkdir(parents=True)
        for band, values in location.s2.items():
            _write_tif(s2 / f"{band}.tif", values[season], crs, origin @ Affine.scale(config.size_px / values.shape[-1]))
        _write_json(s2 / "metadata.json", _s2_metadata(location, season))
        for folder, file, labels in (
            ("dw_noisy_labels", "label.tif", location.label),
            ("reference_labels", "label.tif", location.truth),
            ("noise_kinds", "kind.tif", location.kind),
        ):
            target = out / folder / name / site.s2_scenes[season]
            target.mkdir(parents=True)
            _write_tif(target / file, labels[season], crs, origin)
    return site.s2_scenes, count(location.truth, location.label, location.kind, location.cloud)


def _grid(site: Site, size_px: int) -> tuple[CRS, Affine]:
    """Coordinates of the files and the transform of the 10 m grid."""
    crs = CRS.from_epsg(site.epsg)
    half = size_px / 2
    if site.utm:
        (east,), (north,) = reproject(CRS.from_epsg(4326), crs, [site.lon], [site.lat])
        # Sentinel-2 tiles start on multiples of 60 m, so that all three grids share a corner.
        left, upper = (round((value + sign * half * _PIXEL_M) / 60) * 60 for value, sign in ((east, -1), (north, 1)))
        return crs, Affine(_PIXEL_M, 0, left, 0, -_PIXEL_M, upper)
    degrees_lon = _DEGREES_LAT / float(np.cos(np.radians(site.lat)))
    return crs, Affine(degrees_lon, 0, site.lon - half * degrees_lon, 0, -_DEGREES_LAT, site.lat + half * _DEGREES_LAT)


def _write_tif(path: Path, values: npt.NDArray[np.generic], crs: CRS, transform: Affine) -> None:
    height, width = values.shape
    profile = {"driver": "GTiff", "count": 1, "width": width, "height": height, "dtype": values.dtype.name}
    # Through memory: GDAL drops what a full disk refuses when it closes a file, Python raises.
    with MemoryFile() as memory:
        with memory.open(crs=crs, transform=transform, **profile) as file:
            file.write(values, 1)
        path.write_bytes(memory.read())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _milliseconds(time: datetime) -> int:
    return int(time.timestamp()) * 1000


def _footprint(site: Site, size_px: int) -> dict[str, Any]:
    half_lat = size_px / 2 * _DEGREES_LAT
    half_lon = half_lat / float(np.cos(np.radians(site.lat)))
    corners = ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))
    return {
        "type": "LinearRing",
        "coordinates": [[round(site.lon + half_lon * x, 8), round(site.lat + half_lat * y, 8)] for x, y in corners],
    }


def _s1_metadata(location: Location, season: int) -> dict[str, Any]:
    site, scene = location.site, location.site.s1_scenes[season]
    return {
        "system:id": f"COPERNICUS/S1_GRD/{scene}",
        "system:index": scene,
        "system:time_start": _milliseconds(site.s1_times[season]),
        "system:footprint": _footprint(site, location.truth.shape[-1]),
        "instrumentMode": "IW",
        "platform_number": scene[2],
        "productType": "GRD",
        "resolution_meters": 10,
        "transmitterReceiverPolarisation": list(S1_BANDS),
        "synthetic": True,
    }


def _s2_metadata(location: Location, season: int) -> dict[str, Any]:
    site, scene = location.site, location.site.s2_scenes[season]
    elevation, azimuth = (float(np.degrees(angle)) for angle in site.sun(season))
    return {
        "system:id": f"COPERNICUS/S2/{scene}",
        "system:index": scene,
        "system:time_start": _milliseconds(site.s2_times[season]),
        "system:footprint": _footprint(site, location.truth.shape[-1]),
        "CLOUDY_PIXEL_PERCENTAGE": round(float((location.cloud[season] > 0.4).mean()) * 100, 4),
        "MEAN_SOLAR_AZIMUTH_ANGLE": round(azimuth % 360, 6),
        "MEAN_SOLAR_ZENITH_ANGLE": round(90 - elevation, 6),
        "MGRS_TILE": scene.rsplit("_T", 1)[1],
        "PROCESSING_BASELINE": "02.09",
        "synthetic": True,
    }

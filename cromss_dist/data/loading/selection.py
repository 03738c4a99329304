"""Which locations and which of their seasons are trained on: filters on what is known of them, decided before any order.

The order sees only the outcome, ids and allowed seasons, so filters change nothing of what is promised about it.
N locations of S seasons in the dataset, L of them selected.
"""

import csv
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.data.loading.draws import FloatArray, IntArray
from cromss_dist.data.reporting.quality import SHIFT_CONFIDENCE
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import ConfigError

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Region: TypeAlias = tuple[float, float, float, float]

NUM_NAMES_SHOWN = 3
MEASURES = ("cloud_share", "s1_nodata_share", "s2_nodata_share", "shift_rows_px", "shift_cols_px", "shift_confidence")


@dataclass(frozen=True)
class Selection:
    """The locations that a training set is made of.

    Args:
        ids: int64 (L,), ascending: sample ids in the dataset.
        seasons: bool (L, S), at least one a row: the seasons that may be drawn.
    """

    ids: IntArray
    seasons: BoolArray

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the outcome: filters that select the same have the same."""
        found = hashlib.sha256(f"{self.seasons.shape}".encode())
        found.update(self.ids.astype("<i8").tobytes())
        found.update(np.packbits(self.seasons).tobytes())
        return found.hexdigest()

    def take(self, places: IntArray) -> "Selection":
        """The part at `places`, ascending int64 indices into `ids`: what `split` returned for the selected keys."""
        return Selection(self.ids[places], self.seasons[places])

    def only(self, seasons: Sequence[int]) -> "Selection":
        """The part whose seasons are among `seasons`; locations without one of them drop out.

        Raises:
            ConfigError: a season is not there or named twice.
        """
        num_seasons = self.seasons.shape[1]
        _check_filters(num_seasons, seasons, None)
        allowed = self.seasons & np.isin(np.arange(num_seasons), seasons)
        left = allowed.any(axis=1)
        return Selection(self.ids[left], allowed[left])

    def sizes(self, shard_sizes: IntArray) -> IntArray:
        """How many of the selected locations each shard has: int64 (K,) for shards of `shard_sizes` samples, (K,)."""
        ends = np.searchsorted(self.ids, np.cumsum(shard_sizes)).astype(np.int64)
        return np.diff(ends, prepend=0)


def select(
    dataset: Dataset,
    *,
    seasons: Sequence[int] | None = None,
    region: Region | None = None,
    max_cloud_share: float | None = None,
    max_nodata_share: float | None = None,
    max_shift_px: float | None = None,
    quality: Path | None = None,
) -> Selection:
    """Selects what passes every filter given; a location without an allowed season drops out.

    What is not known: a location of unknown place lies in no region; a season of unknown cloud or nodata share passes no
    limit on it (the dataset lacks the bands to tell). A shift that cannot be told passes, because that is so wherever
    the land shows no edges, and dropping it would select by landscape.

    Args:
        dataset: To select from.
        seasons: 0 to S - 1; None: all.
        region: West, south, east, north in degrees, borders included; west > east crosses 180 degrees.
        max_cloud_share: Largest share of cloudy pixels, 0-1.
        max_nodata_share: Largest share of pixels without a value, 0-1, in the worse of the modalities.
        max_shift_px: Largest shift between S1 and S2, px of 10 m.
        quality: The quality.csv that tools/report.py wrote of this dataset; needed for the three limits, else not read.
            It must list every location and season that `seasons` and `region` leave.

    Raises:
        ConfigError: a filter's value is out of range, the table is not of this dataset or not complete, or nothing is
            left; says then how much each filter took.
    """
    _check_filters(dataset.num_seasons, seasons, region)
    limits = {"max_cloud_share": max_cloud_share, "max_nodata_share": max_nodata_share, "max_shift_px": max_shift_px}
    _check_limits(limits, quality)
    allowed = np.ones((int(dataset.shard_sizes.sum()), dataset.num_seasons), bool)
    taken: dict[str, int] = {}

    def keep(name: str, passes: BoolArray) -> None:
        taken[name] = int(np.count_nonzero(allowed & ~passes))
        np.logical_and(allowed, passes, out=allowed)

    if seasons is not None:
        keep("seasons", np.isin(np.arange(dataset.num_seasons), seasons))
    if region is not None:
        keep("region", _inside(region, dataset.places.lon, dataset.places.lat)[:, None])
    if quality is not None and any(limit is not None for limit in limits.values()):
        table = _read_quality(quality, dataset, allowed)
        if max_cloud_share is not None:
            keep("max_cloud_share", table["cloud_share"] <= max_cloud_share)
        if max_nodata_share is not None:
            keep("max_nodata_share", np.fmax(table["s1_nodata_share"], table["s2_nodata_share"]) <= max_nodata_share)
        if max_shift_px is not None:
            shift_px = np.hypot(table["shift_rows_px"], table["shift_cols_px"])
            keep("max_shift_px", ~((shift_px > max_shift_px) & (table["shift_confidence"] >= SHIFT_CONFIDENCE)))
    ids = np.flatnonzero(allowed.any(axis=1)).astype(np.int64)
    if len(ids) == 0:
        told = ", ".join(f"{name} took {count:,}" for name, count in taken.items())
        raise ConfigError(
            f"The filters leave nothing of {len(allowed):,} locations: of {allowed.size:,} seasons {told or 'none were there'}. "
            "Loosen them, or give a dataset that has what they ask for (a place or measure that is not known does not pass)."
        )
    return Selection(ids, allowed[ids])


def draw_seasons(uniform: FloatArray, allowed: BoolArray) -> IntArray:
    """Picks uniformly among the allowed seasons; where all are, it is floor(uniform x S).

    Args:
        uniform: float64 (B,) in [0, 1): `Draws(...).season`.
        allowed: bool (B, S), at least one a row: `selection.seasons[places]`.

    Returns:
        int64 (B,), 0 to S - 1.
    """
    rank = np.cumsum(allowed, axis=1)
    season: IntArray = (rank > np.floor(uniform * rank[:, -1])[:, None]).argmax(axis=1)
    return season


def _inside(region: Region, lon: FloatArray, lat: FloatArray) -> BoolArray:
    west, south, east, north = region
    width = east - west + (360 if east < west else 0)
    # NaN compares false: what has no place lies nowhere.
    return ((lon - west) % 360 <= width) & (lat >= south) & (lat <= north)


def _check_filters(num_seasons: int, seasons: Sequence[int] | None, region: Region | None) -> None:
    if seasons is not None and (not seasons or len(set(seasons)) < len(seasons) or not set(seasons) <= set(range(num_seasons))):
        raise ConfigError(
            f"seasons={list(seasons)} is not allowed; give distinct numbers from 0 to {num_seasons - 1}, or null for all."
        )
    if region is None:
        return
    west, south, east, north = region
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise ConfigError(
            f"region={list(region)}: give west, south, east, north in degrees, longitudes from -180 to 180 (west > east "
            "crosses 180), latitudes from -90 to 90 with south <= north."
        )


def _check_limits(limits: dict[str, float | None], quality: Path | None) -> None:
    for name, limit in limits.items():
        highest = np.inf if name == "max_shift_px" else 1
        if limit is not None and not 0 <= limit <= highest:
            raise ConfigError(f"{name}={limit}: give a number from 0 {'up' if highest == np.inf else 'to 1'}.")
        if limit is not None and quality is None:
            raise ConfigError(f"{name}={limit} needs the dataset's measures; give its quality.csv (tools/report.py writes it).")


def _read_quality(path: Path, dataset: Dataset, wanted: BoolArray) -> dict[str, FloatArray]:
    """The measures as float64 (N, S), NaN where the table has nothing; it must list what is `wanted`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            places, values = _read_rows(path, csv.reader(file), dataset)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the quality.csv of tools/report.py.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no table of comma-separated values ({error}); write it by tools/report.py.") from error
    listed = np.bincount(places, minlength=wanted.size).reshape(wanted.shape)
    for wrong, what in ((wanted & (listed == 0), "not listed"), (listed > 1, "listed more than once")):
        if wrong.any():
            shown = [f"{dataset.locations[i]} season {season}" for i, season in np.argwhere(wrong)[:NUM_NAMES_SHOWN]]
            raise ConfigError(
                f"{path}: {np.count_nonzero(wrong):,} seasons of the dataset are {what} ({', '.join(shown)}); measure all of "
                "it by tools/report.py without --sample."
            )
    table = np.full((wanted.size, len(MEASURES)), np.nan)
    table[places] = values
    return {name: table[:, i].reshape(wanted.shape) for i, name in enumerate(MEASURES)}


def _read_rows(path: Path, rows: Iterator[list[str]], dataset: Dataset) -> tuple[IntArray, FloatArray]:
    """Where in (N x S) each line belongs, int64 (R,), and its measures, float64 (R, len(MEASURES))."""
    header = next(rows, [])
    if missing := [name for name in ("key", "season", *MEASURES) if name not in header]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; give the quality.csv that tools/report.py wrote.")
    key, season = header.index("key"), header.index("season")
    columns = [header.index(name) for name in MEASURES]
    id_of = {location: i for i, location in enumerate(dataset.locations)}
    places, values = array("q"), array("d")  # a million rows of Python lists would keep the garbage collector busy
    for line, row in enumerate(rows, 2):
        try:
            known = id_of.get(row[key])
            place = int(row[season])
            values.extend([float(row[i] or "nan") for i in columns])
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{path}, line {line}, is malformed ({error}); write it again by tools/report.py.") from error
        if known is None or not 0 <= place < dataset.num_seasons:
            raise ConfigError(
                f"{path}, line {line}: {row[key]} season {place} is not in the dataset of {len(id_of):,} locations and "
                f"{dataset.num_seasons} seasons; give the quality.csv that tools/report.py wrote of this dataset."
            )
        places.append(known * dataset.num_seasons + place)
    return np.frombuffer(places, np.int64), np.frombuffer(values).reshape(-1, len(MEASURES))

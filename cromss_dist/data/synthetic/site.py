"""Where and when: coordinates, sun, acquisition times and scene names of a location."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from cromss_dist.schema import NUM_SEASONS

# Latitudes where such places are common; either hemisphere.
_LATITUDES = {
    "farmland": (30, 54),
    "forest": (40, 60),
    "town": (25, 55),
    "arid": (14, 34),
    "mountain": (38, 50),
    "wetland": (8, 50),
}


@dataclass(frozen=True)
class Site:
    """A location's place on Earth and its four acquisitions.

    Args:
        lon: Longitude of the centre, degrees.
        lat: Latitude of the centre, degrees.
        utm: Whether its files are in UTM; else in EPSG:4326. The real archive has both.
        s2_times: Sensing start of each Sentinel-2 scene, UTC, in order of date.
        s1_times: Sensing start of the Sentinel-1 scene beside each, UTC.
        s2_scenes: Sentinel-2 scene names; they sort by date.
        s1_scenes: Sentinel-1 scene names; S1A and S1B mix so that they never sort by date.
    """

    lon: float
    lat: float
    utm: bool
    s2_times: tuple[datetime, ...]
    s1_times: tuple[datetime, ...]
    s2_scenes: tuple[str, ...]
    s1_scenes: tuple[str, ...]

    @property
    def epsg(self) -> int:
        """EPSG code of the files' coordinates."""
        zone = int((self.lon + 180) // 6) + 1
        return (32600 if self.lat >= 0 else 32700) + zone if self.utm else 4326

    def phase(self, season: int) -> float:
        """Part of the year since local mid-winter, 0-1: 0.5 is midsummer on either hemisphere."""
        day = self.s2_times[season].timetuple().tm_yday
        return float(((day - 10) / 365.25 + (0.5 if self.lat < 0 else 0.0)) % 1)

    def sun(self, season: int) -> tuple[float, float]:
        """Elevation and azimuth (clockwise from north) of the sun at the Sentinel-2 overpass, radians."""
        day = self.s2_times[season].timetuple().tm_yday
        declination = np.radians(-23.44) * np.cos(2 * np.pi * (day + 10) / 365.25)
        hour = np.radians(-22.5)  # 10:30 local solar time
        lat = np.radians(self.lat)
        sine = np.sin(lat) * np.sin(declination) + np.cos(lat) * np.cos(declination) * np.cos(hour)
        east = -np.sin(hour) * np.cos(declination)
        north = np.cos(lat) * np.sin(declination) - np.sin(lat) * np.cos(declination) * np.cos(hour)
        # Patches in polar night would be black: keep the sun at 12 degrees or higher, as archives avoid such scenes.
        return max(float(np.arcsin(sine)), np.radians(12)), float(np.arctan2(east, north))


def make_site(rng: np.random.Generator, place: str) -> Site:
    """Draws a site where `place` is plausible."""
    low, high = _LATITUDES[place]
    lat = float(rng.uniform(low, high) * (1 if rng.random() < 0.75 else -1))
    lon = float(rng.uniform(-120, 150))
    utm = bool(rng.random() < 0.3)
    tile = f"{int((lon + 180) // 6) + 1:02d}{'CDEFGHJKLMNPQRSTUVWX'[int((lat + 80) // 8)]}{_letters(rng, 2)}"
    first = datetime(2019, 1, 1, tzinfo=UTC) + timedelta(days=int(rng.integers(0, 500)))
    s2_times = tuple(
        (first + timedelta(days=91 * season + int(rng.integers(-12, 13)))).replace(hour=0)
        + timedelta(hours=(10.6 - lon / 15) % 24, seconds=int(rng.integers(0, 900)))
        for season in range(NUM_SEASONS)
    )
    ascending = rng.random() < 0.5
    s1_times = tuple(
        (time + timedelta(days=int(rng.integers(-4, 5)))).replace(hour=0, minute=0, second=0, microsecond=0)
        + timedelta(hours=((18.0 if ascending else 6.0) - lon / 15) % 24, seconds=int(rng.integers(0, 60)))
        for time in s2_times
    )
    # Raw names sort by satellite first: at least one S1B before an S1A breaks the order by date.
    patterns = [p for p in (f"{n:04b}".replace("0", "A").replace("1", "B") for n in range(16)) if "BA" in p]
    satellites = patterns[int(rng.integers(len(patterns)))]
    return Site(
        lon,
        lat,
        utm,
        s2_times,
        s1_times,
        tuple(f"{_stamp(t)}_{_stamp(t + timedelta(seconds=int(rng.integers(60, 900))))}_T{tile}" for t in s2_times),
        tuple(_s1_name(rng, satellite, t) for satellite, t in zip(satellites, s1_times, strict=True)),
    )


def _stamp(time: datetime) -> str:
    return time.strftime("%Y%m%dT%H%M%S")


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join("ABCDEFGHJKLMNPQRSTUV"[int(i)] for i in rng.integers(0, 20, count))


def _s1_name(rng: np.random.Generator, satellite: str, time: datetime) -> str:
    # Orbit numbers grow by 175 in 12 days; S1B flew its first orbits two years after S1A.
    epoch = datetime(2014, 4, 3, tzinfo=UTC) if satellite == "A" else datetime(2016, 4, 25, tzinfo=UTC)
    orbit = int((time - epoch).total_seconds() / 86400 * 175 / 12)
    take = int(orbit * 7.58) + int(rng.integers(0, 8))
    span = f"{_stamp(time)}_{_stamp(time + timedelta(seconds=25))}"
    return f"S1{satellite}_IW_GRDH_1SDV_{span}_{orbit:06d}_{take:06X}_{int(rng.integers(65536)):04X}"

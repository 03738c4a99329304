"""An archive that exists only as arithmetic: what converter, cubes and verifier are tested with."""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cromss_dist.data.sample import Json, Rejected, Sample, SampleSpec, ValueSpec
from cromss_dist.errors import InputChangedError
from cromss_dist.schema import CLASS_NAMES, IGNORE, IMAGE_ARRAYS, NORMALISATION, NUM_SEASONS


def spec_of(patch_px: int = 24, num_seasons: int = NUM_SEASONS, values: Sequence[ValueSpec] | None = None) -> SampleSpec:
    """All bands of both sensors and a label; small."""
    return SampleSpec(
        patch_px=patch_px,
        num_seasons=num_seasons,
        images=IMAGE_ARRAYS,
        values=(ValueSpec("label", CLASS_NAMES),) if values is None else tuple(values),
        normalisation=NORMALISATION,
        normalised_by={"s1": "converter", "s2": "converter"},
    )


class FakeSource:
    """A Source of pixels drawn by seed and key: equal arguments give equal samples in any process.

    Args:
        num_locations: Keys are 0000000, 0000001, ... unless `keys` are given, which are sorted here.
        spec: What its samples have in common.
        seed: Another one gives other pixels.
        keys: Instead of numbers.
        rejected: Key -> reason for which it cannot be read.
        duplicates: Key -> how often it was repeated.
        same_as: Key -> key whose pixels it has.
        changed: Keys whose input is another one than when the archive was opened.
        delay_s: How long a read takes.
    """

    def __init__(
        self,
        num_locations: int = 7,
        spec: SampleSpec | None = None,
        seed: int = 0,
        keys: Sequence[str] | None = None,
        rejected: Mapping[str, str] | None = None,
        duplicates: Mapping[str, int] | None = None,
        same_as: Mapping[str, str] | None = None,
        changed: Sequence[str] = (),
        delay_s: float = 0,
    ) -> None:
        self.spec = spec or spec_of()
        self.seed = seed
        self.keys = tuple(sorted(keys)) if keys is not None else tuple(f"{i:07d}" for i in range(num_locations))
        self.rejected = dict(rejected or {})
        self.duplicates = Counter(duplicates or {})
        self.same_as = dict(same_as or {})
        self.changed = tuple(changed)
        self.delay_s = delay_s
        self.asides = {"strays": 3, "unlabelled": 2}
        self.size_bytes = 1000 * len(self.keys)
        stated = repr((self.keys, seed, sorted(self.rejected.items()), sorted(self.duplicates.items()), self.same_as))
        self.fingerprint = hashlib.sha256(stated.encode()).hexdigest()

    def read(self, key: str) -> Sample:
        """Draws one location."""
        time.sleep(self.delay_s)
        if key in self.rejected:
            raise Rejected(self.rejected[key], f"s1/{key}/VV.tif", "it was made so for a test")
        if key in self.changed:
            raise InputChangedError(f"s1/{key}/VV.tif changed after the archive was opened.")
        rng = np.random.default_rng([self.seed, *self.same_as.get(key, key).encode(errors="surrogatepass")])
        arrays = {image.name: rng.integers(0, 256, self.spec.shape(image.name), dtype=np.uint8) for image in self.spec.images}
        for values in self.spec.values:
            drawn = rng.integers(0, len(values.values) + 1, self.spec.shape(values.name), dtype=np.uint8)
            arrays[values.name] = np.where(drawn == len(values.values), np.uint8(IGNORE), drawn)
        return Sample(key, arrays, self._metadata(key), ("cropped",) if rng.integers(2) else ())

    def _metadata(self, key: str) -> Json:
        place = int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:2])
        lon, lat = place / 65536 * 360 - 180, place % 1000 / 1000 * 160 - 80
        return {
            "key": key,
            "lon": lon,
            "lat": lat,
            "seasons": [
                {
                    "s1_scene": f"S1A_{key}_{season}",
                    "s1_time": f"2020{3 * season + 1:02d}05T010203",
                    "s2_scene": f"S2A_{key}_{season}",
                    "s2_time": f"2020{3 * season + 1:02d}07T040506",
                    "crs": "EPSG:4326",
                    "transform": [9e-5, 0.0, lon, 0.0, -9e-5, lat],
                }
                for season in range(self.spec.num_seasons)
            ],
        }

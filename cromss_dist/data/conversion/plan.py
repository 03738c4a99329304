"""What a conversion will do, decided before it starts: which location goes to which part, with which settings.

A part is a run of consecutive keys: one tar, and one shard of every array of the cube. The map is a pure function of the
sorted keys, so parts can be written in any order, by anyone, and again.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, TypeAlias

from cromss_dist.data.sample import Json, SampleSpec, Source
from cromss_dist.data.store.manifest import SCHEMA_VERSION, canonical
from cromss_dist.data.store.shards import sample_bytes
from cromss_dist.errors import ConfigError, InputChangedError

Sinks: TypeAlias = Literal["shards", "cube", "both"]
PLAN = "plan.json"
# Another version of these may write other bytes for the same archive: imagecodecs decodes lossy GeoTIFFs, rasterio brings
# PROJ, which computes longitude and latitude and names the CRS.
CODECS: dict[Sinks, tuple[str, ...]] = {"shards": ("numpy", "imagecodecs", "rasterio")}
CODECS["cube"] = (*CODECS["shards"], "zarr", "numcodecs")
CODECS["both"] = CODECS["cube"]
INPUT_FIELDS = ("fingerprint", "keys_sha256", "num_inputs", "arrays", "normalised_by")


@dataclass(frozen=True)
class Plan:
    """A conversion.

    Args:
        keys: Sorted, each once.
        per_part: Locations in a part; the last one may have fewer.
        first_part: Number of the first part: not 0 when parts are appended.
        sinks: What is written.
        content: All that decides the bytes of the result, as plan.json states it.
    """

    keys: tuple[str, ...]
    per_part: int
    first_part: int
    sinks: Sinks
    content: Json

    @property
    def digest(self) -> str:
        """sha256 (hex) of `content`: parts of another plan are not gone on with."""
        return hashlib.sha256(canonical(self.content)).hexdigest()

    @property
    def parts(self) -> range:
        """Numbers of the parts."""
        return range(self.first_part, self.first_part + math.ceil(len(self.keys) / self.per_part))

    def keys_of(self, part: int) -> tuple[str, ...]:
        """The locations of a part."""
        start = (part - self.first_part) * self.per_part
        return self.keys[start : start + self.per_part]

    @property
    def has_shards(self) -> bool:
        """Whether tars are written."""
        return self.sinks != "cube"

    @property
    def has_cube(self) -> bool:
        """Whether a cube is written."""
        return self.sinks != "shards"

    def check_resumes(self, begun: Json, restart: str) -> None:
        """Compares with the plan of a conversion that was begun; `restart` says how to begin anew.

        Raises:
            InputChangedError: the inputs are others.
            ConfigError: the settings are others, or a codec has another version.
        """
        differing = [name for name in self.content if self.content[name] != begun.get(name)]
        settings = [name for name in differing if name not in INPUT_FIELDS]
        if settings:
            told = ", ".join(f"{name} {begun.get(name)} (now {self.content[name]})" for name in settings)
            raise ConfigError(f"A conversion was begun with other settings: {told}. Repeat it with those, or {restart}.")
        if differing:
            raise InputChangedError(
                f"The inputs are not those that the conversion was begun with: {', '.join(differing)} changed. Some file has "
                f"another name, size or time; restore it, or {restart}."
            )


def locations_per_part(spec: SampleSpec, shard_size_mib: float) -> int:
    """Locations in a tar of at most `shard_size_mib`, one at least.

    Raises:
        ConfigError: the size is not positive and finite.
    """
    if not 0 < shard_size_mib < math.inf:
        raise ConfigError(f"shard_size_mib={shard_size_mib} is not allowed; give a size above 0, 256 or 512 for large archives.")
    return max(1, int(shard_size_mib * 2**20) // sample_bytes(spec))


def make_plan(source: Source, sinks: Sinks, per_part: int, first_part: int = 0, base: str | None = None) -> Plan:
    """Plans a conversion.

    Args:
        source: The archive.
        sinks: What to write.
        per_part: Locations in a part.
        first_part: Number of its first part.
        base: Digest of the dataset that is appended to.
    """
    keys = tuple(sorted(source.keys))
    content = {
        "format": "cromss-plan",
        "schema_version": SCHEMA_VERSION,
        "write": sinks,
        "locations_per_part": per_part,
        "first_part": first_part,
        "base": base,
        "versions": {name: version(name) for name in CODECS[sinks]},
        "arrays": source.spec.arrays(),
        "normalisation": source.spec.contracts(),
        "normalised_by": source.spec.normalised_by,
        "num_inputs": len(keys) + source.duplicates.total(),
        "keys_sha256": hashlib.sha256(canonical({"keys": keys})).hexdigest(),
        "fingerprint": source.fingerprint,
    }
    return Plan(keys, per_part, first_part, sinks, json.loads(canonical(content)))  # as it is read back

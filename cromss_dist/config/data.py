"""What is read, and how it gets into batches.

Layer 1.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cromss_dist.config.check import require
from cromss_dist.schema import S1_BANDS, S2_BANDS, Modality, check_bands


@dataclass(frozen=True)
class FilterConfig:
    """Which locations and seasons are used; null takes all.

    Args:
        seasons: Seasons that training draws from: `[0, 2]`. Validation has its own, `data.val_seasons`.
        region: West, south, east, north in degrees: `[5, 45, 15, 55]`; a region across 180 degrees has west > east.
        max_cloud_share: Largest share of cloudy pixels, in [0, 1]; needs `quality`, as the next two.
        max_nodata_share: Largest share of pixels without a value, of either modality, in [0, 1].
        max_shift_px: Largest shift of S1 against S2, px at 10 m; one that cannot be told counts as none.
        quality: `quality.csv` of each dataset, in their order, written by `tools/report.py`: `[shards-report/quality.csv]`.
    """

    seasons: tuple[int, ...] | None = None
    region: tuple[float, float, float, float] | None = None
    max_cloud_share: float | None = None
    max_nodata_share: float | None = None
    max_shift_px: float | None = None
    quality: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadingConfig:
    """How samples get from files into batches; changes no sample and no order.

    Args:
        kind: What is read of a dataset that has both: 'shards' or 'cube'; 'auto' takes shards where there are some.
        threads: Threads that read and check samples, of each rank or, with `workers`, of each worker process.
        workers: Processes of each rank that read; 0 reads in the rank's own.
        prefetch_batches: Micro batches read ahead on each rank, and by each worker process.
        lookahead_batches: Micro batches whose remote shards are fetched ahead; nothing for data on this node.
        timeout_s: Seconds a batch may take to be read before the run ends with an error that says what hangs.
        on_corrupt: A sample whose bytes do not match their checksum: 'stop' ends the run, 'replace' takes its neighbour
            instead, on every machine the same one, and says so.
        cache: Folder of this node for shards of remote datasets; null is `shards` in
            `CROMSS_CACHE`, else in `~/.cache/cromss`.
        cache_gib: Size that the cache is kept under, GiB.
    """

    kind: Literal["auto", "shards", "cube"] = "auto"
    threads: int = 2
    workers: int = 0
    prefetch_batches: int = 2
    lookahead_batches: int = 64
    timeout_s: float = 600.0
    on_corrupt: Literal["stop", "replace"] = "stop"
    cache: str | None = None
    cache_gib: float = 100.0

    def __post_init__(self) -> None:
        for name in ("threads", "prefetch_batches"):
            require(getattr(self, name) >= 1, f"data.reading.{name}", getattr(self, name), "give at least 1")
        for name in ("workers", "lookahead_batches"):
            require(getattr(self, name) >= 0, f"data.reading.{name}", getattr(self, name), "give 0 or more")
        for name in ("timeout_s", "cache_gib"):
            # Clocks and counts of bytes overflow far above that.
            require(0 < getattr(self, name) <= 1e6, f"data.reading.{name}", getattr(self, name), "give more than 0, up to 1e6")


@dataclass(frozen=True)
class ViewConfig:
    """What training sees of a patch.

    Args:
        crop_px: Side of the random training crop, px at 10 m.
        flip_p: Probability of a flip (horizontal, vertical or both, equally likely).
        rotate_p: Probability of a rotation.
        rotate_max_deg: Rotation angles are uniform in +- this, degrees.
    """

    crop_px: int = 256
    flip_p: float = 0.5
    rotate_p: float = 0.2
    rotate_max_deg: float = 90.0

    def __post_init__(self) -> None:
        require(self.crop_px >= 16, "data.crop_px", self.crop_px, "give at least 16 px")
        for name in ("flip_p", "rotate_p"):
            require(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "give a probability in [0, 1]")
        require(0 <= self.rotate_max_deg <= 180, "data.rotate_max_deg", self.rotate_max_deg, "give 0 to 180 degrees")


@dataclass(frozen=True)
class DataConfig(ViewConfig):
    """What is read and how it is augmented.

    Args:
        shards: Folder or URL with `manifest.json`, written by `tools/shard.py`; or several, each with its weight in the
            mixture: `{ours: 0.7, s3://bucket/theirs: 0.3}`.
        s1_bands: Sentinel-1 bands by name, in the order the model sees them.
        s2_bands: Sentinel-2 bands by name, in the order the model sees them.
        val_fraction: Share of the locations held out for validation; at least one of each dataset.
        val_seasons: Seasons of each held-out location that are scored.
        window: Samples that are shuffled among themselves, at least; a larger one has more shards open at a time.
        tail: What becomes of the samples behind an epoch's last full batch: 'carry' goes on into the next epoch inside the
            batch, so that none is lost; 'drop' leaves them out, others each epoch; 'pad' fills the batch up with weight 0.
        filter: Which locations and seasons are used.
        reading: How samples get from files into batches.
    """

    shards: dict[str, float] | str = "shards"
    s1_bands: tuple[str, ...] = S1_BANDS
    s2_bands: tuple[str, ...] = S2_BANDS
    val_fraction: float = 0.01
    val_seasons: tuple[int, ...] = (0, 1, 2, 3)
    window: int = 2048
    tail: Literal["carry", "drop", "pad"] = "carry"
    filter: FilterConfig = field(default_factory=FilterConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bands("s1", self.s1_bands)
        check_bands("s2", self.s2_bands)
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "give a share in (0, 1)")
        ok = (
            bool(self.val_seasons)
            and set(self.val_seasons) <= {0, 1, 2, 3}
            and len(set(self.val_seasons)) == len(self.val_seasons)
        )
        require(ok, "data.val_seasons", self.val_seasons, "give distinct seasons out of 0, 1, 2, 3")
        require(self.window >= 1, "data.window", self.window, "give at least 1 sample")
        ok = bool(self.weights) and all(math.isfinite(weight) and weight > 0 for weight in self.weights.values())
        require(ok, "data.shards", self.shards, "give a folder or URL, or several with a positive weight each")
        ok = len({absolute_location(location) for location in self.weights}) == len(self.weights)
        require(ok, "data.shards", self.shards, "a folder is named twice; give it once, with the sum of its weights")
        require(
            len(self.weights) == 1 or self.tail == "carry",
            "data.tail",
            self.tail,
            "the datasets of a mixture have epochs of their own; set 'carry'",
        )

    @property
    def bands(self) -> dict[Modality, tuple[str, ...]]:
        """The bands of each modality."""
        return {"s1": self.s1_bands, "s2": self.s2_bands}

    @property
    def weights(self) -> dict[str, float]:
        """The datasets and their weights in the mixture."""
        return self.shards if isinstance(self.shards, dict) else {self.shards: 1.0}

    def with_absolute_paths(self) -> "DataConfig":
        """The same with paths that hold in every working directory."""
        shards = self.shards
        return replace(
            self,
            shards={absolute_location(name): weight for name, weight in shards.items()}
            if isinstance(shards, dict)
            else absolute_location(shards),
            filter=replace(self.filter, quality=tuple(absolute_location(path) for path in self.filter.quality)),
            reading=replace(self.reading, cache=self.reading.cache and absolute_location(self.reading.cache)),
        )


def absolute_location(location: str) -> str:
    """A path that holds in every working directory; a URL does already."""
    return location if "://" in location else str(Path(location).expanduser().absolute())

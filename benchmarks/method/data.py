"""The datasets of the proof: synthetic archives through the project's own converter, noisy and with the truth as labels.

Of the pretraining places `default` has the noisy labels and `clean` the truth, with equal images. Of the test places `test` is
noisy, for detection, and `test-tiles` has the truth of one season a place, for the transfer, as `labelled-tiles` of others.
Controls have the images of the first pretraining and test places, and labels that are wrong in another way.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from benchmarks.method.plan import CONTROLS, Size
from benchmarks.method.separability import separability
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Sample, SampleSpec, Source, ValueSpec
from cromss_dist.data.synthetic import Noise, SyntheticConfig, write_archive
from cromss_dist.schema import LABEL_ARRAY, REFERENCE_ARRAY

Part = Literal["pretraining", "labelled", "test"]


@dataclass(frozen=True)
class Truth:
    """A `Source`: an archive whose labels are its reference labels; nothing else that tells of labels is left in it.

    Args:
        archive: With reference labels.
        one_season: Whether only one season of each location is taken, season i % S of the i-th.
    """

    archive: Source
    one_season: bool = False

    @property
    def spec(self) -> SampleSpec:
        """With one array of values: the label."""
        spec = self.archive.spec
        (names,) = (value.values for value in spec.values if value.name == REFERENCE_ARRAY)
        seasons = 1 if self.one_season else spec.num_seasons
        return replace(spec, num_seasons=seasons, values=(ValueSpec(LABEL_ARRAY, names),))

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the archive."""
        return self.archive.keys

    @property
    def duplicates(self) -> Counter[str]:
        """Those of the archive."""
        return self.archive.duplicates

    @property
    def asides(self) -> dict[str, int]:
        """Those of the archive."""
        return self.archive.asides

    @property
    def fingerprint(self) -> str:
        """Of the archive and of what is taken from it."""
        return hashlib.sha256(f"{self.archive.fingerprint} truth {self.one_season}".encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Those of the archive."""
        return self.archive.size_bytes

    def read(self, key: str) -> Sample:
        """Reads one location; see `Source.read`."""
        sample = self.archive.read(key)
        seasons = slice(None)
        if self.one_season:
            season = self.keys.index(key) % self.archive.spec.num_seasons
            seasons = slice(season, season + 1)
        arrays = {spec.name: sample.arrays[spec.name][seasons] for spec in self.spec.images}
        arrays[LABEL_ARRAY] = sample.arrays[REFERENCE_ARRAY][seasons]
        return replace(sample, arrays=arrays, metadata=sample.metadata | {"seasons": sample.metadata["seasons"][seasons]})


def dataset(work: Path, name: str) -> Path:
    """Folder of a dataset."""
    return work / "data" / name


def parts_of(size: Size) -> Iterator[tuple[Part, Noise]]:
    """The archives that are made, the largest first."""
    yield "pretraining", "default"
    yield "test", "default"
    yield "labelled", "default"
    for noise in size.controls:
        yield "pretraining", noise
        yield "test", noise


def make_datasets(work: Path, size: Size, part: Part, noise: Noise, console: Console) -> dict[str, Any]:
    """Makes an archive and its datasets, and removes the archive.

    Returns:
        The generator's report, and the digest of each dataset.
    """
    archive = work / "archives" / f"{part}-{noise}"
    workers = max(1, (os.cpu_count() or 1) // size.processes)  # the cores that no other job has
    report = write_archive(archive, SyntheticConfig(**size.archive_of(part, noise)), workers=workers, overwrite=True)
    source: Source = open_archive(archive)
    sources: dict[str, Source]
    match part:
        case "pretraining":
            sources = {noise: source} if noise in CONTROLS else {"default": source, "clean": Truth(source)}
        case "test":
            sources = {f"test-{noise}": source} if noise in CONTROLS else {"test": source, "test-tiles": Truth(source, True)}
        case "labelled":
            sources = {"labelled-tiles": Truth(source, True)}
    (work / "data").mkdir(parents=True, exist_ok=True)
    digests = {name: convert(of, dataset(work, name), overwrite=True, restart=True).digest for name, of in sources.items()}
    shutil.rmtree(archive)
    console.print(f"{len(source.keys)} places: {', '.join(digests)}")
    return {"report": report.as_json(), "digests": digests}


def measure_separability(work: Path, console: Console) -> dict[str, Any]:
    """How far single pixels give the class away: see `separability`."""
    told = separability(dataset(work, "clean"), dataset(work, "test-tiles"))
    console.print_json(data=told)
    return dict(told)

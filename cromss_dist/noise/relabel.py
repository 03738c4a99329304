"""New shards with cleaned labels: a dataset converted again, in which nothing but the noisy label differs.

Layer 4.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.append import Base
from cromss_dist.data.conversion.convert import Runner, Summary, convert, run_here
from cromss_dist.data.conversion.parts import Progress
from cromss_dist.data.sample import Json, Sample, SampleSpec
from cromss_dist.data.store.manifest import canonical
from cromss_dist.data.store.shards import sample_bytes
from cromss_dist.errors import InputChangedError
from cromss_dist.noise.observatory import LABEL_CONFIDENCE, SUGGESTED, SUGGESTED_CONFIDENCE, check_made_of, origin_of
from cromss_dist.noise.rule import Rule
from cromss_dist.schema import LABEL_ARRAY

RELABELLED = "relabelled"  # the ledger's note on locations some of whose labels are others


@dataclass(frozen=True)
class RelabelledArchive:
    """A `data.sample.Source` of the samples of a dataset with cleaned labels.

    Args:
        archive: The dataset.
        observations: The observatory's cube of it.
        rule: How labels are cleaned.
    """

    archive: StoredArchive
    observations: StoredArchive
    rule: Rule

    @property
    def spec(self) -> SampleSpec:
        """That of the dataset."""
        return self.archive.spec

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the dataset."""
        return self.archive.keys

    @property
    def duplicates(self) -> Counter[str]:
        """None."""
        return Counter()

    @property
    def asides(self) -> dict[str, int]:
        """Those of the dataset."""
        return self.archive.asides

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over dataset, cube and rule."""
        return hashlib.sha256(canonical(self.origin)).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of both."""
        return self.archive.size_bytes + self.observations.size_bytes

    @property
    def origin(self) -> Json:
        """What the manifest says of where the labels come from."""
        return {
            "kind": RELABELLED,
            "dataset": self.archive.digest,
            "observations": self.observations.digest,
            "model_sha256": origin_of(self.observations)["model_sha256"],
            "run_id": origin_of(self.observations)["run_id"],
            "rule": self.rule.to_json(),
        }

    def read(self, key: str) -> Sample:
        """Reads one location and cleans its labels.

        Raises:
            InputChangedError: the cube has looked at other labels.
            ShardError: bytes are missing or changed.
        """
        sample, observed = self.archive.read(key), self.observations.read(key).arrays
        label = sample.arrays[LABEL_ARRAY]
        if not np.array_equal(observed[LABEL_ARRAY], label):
            raise InputChangedError(f"{key} has other labels in {self.observations.location} than in {self.archive.location}.")
        of_pixel = (observed[name] for name in (SUGGESTED, LABEL_CONFIDENCE, SUGGESTED_CONFIDENCE))
        cleaned = self.rule.judge(label, *of_pixel).cleaned
        notes = () if np.array_equal(cleaned, label) else (RELABELLED,)
        return replace(sample, arrays=sample.arrays | {LABEL_ARRAY: cleaned}, notes=notes)


def relabel(
    archive: StoredArchive,
    observations: StoredArchive,
    rule: Rule,
    out: Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    run: Runner = run_here,
    progress: Progress | None = None,
) -> Summary:
    """Writes a dataset again with cleaned labels; shards or cube, and parts, as the old one has them.

    Args:
        archive: The dataset.
        observations: The observatory's cube of it.
        rule: How labels are cleaned.
        out: Folder to create.
        overwrite: Whether an earlier dataset of ours at `out` is replaced.
        restart: Whether what a killed call left is thrown away.
        run: Who does the parts.
        progress: Called with key and status as locations are done.

    Raises:
        ConfigError: the cube is of another dataset, or `out` is one of the two.
        InputChangedError, OutputExistsError, StorageError, ShardError: as `convert`.
    """
    check_made_of(observations, archive)
    for source in (archive, observations):
        source.check_apart(out)
    cleaned, manifest = RelabelledArchive(archive, observations, rule), archive.dataset.manifest
    base = Base(Path(archive.location), manifest, archive.dataset.tables)
    return convert(
        cleaned,
        out,
        write=base.sinks,
        shard_size_mib=(base.locations_per_part + 0.5) * sample_bytes(cleaned.spec) / 2**20,
        overwrite=overwrite,
        restart=restart,
        run=run,
        progress=progress,
        origin=cleaned.origin,
    )

"""From an archive to a folder of shards: plan, read, write, verify, publish; every input is accounted for.

All work happens in a hidden folder beside the output, which a single rename publishes once every byte was read back.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cromss_dist.data.archive import Archive
from cromss_dist.data.sample import Rejected, Sample
from cromss_dist.data.shards import (
    FORMAT,
    LEDGER,
    SCHEMA_VERSION,
    Checksums,
    ShardEntry,
    read_manifest,
    sample_bytes,
    season_checksums,
    verify_shard,
    write_manifest,
    write_shard,
)
from cromss_dist.data.staging import replacing, write_atomically
from cromss_dist.errors import (
    ConfigError,
    EmptyLabelError,
    OutputExistsError,
    RejectedInputsError,
    ShardError,
    UnreadableInputError,
)
from cromss_dist.schema import CLASS_NAMES, IGNORE, IMAGE_ARRAYS, LABEL_ARRAY, NUM_CLASSES, NUM_SEASONS

NUM_REJECTS_SHOWN = 5


@dataclass(frozen=True)
class Summary:
    """What was written.

    `ledger` counts inputs, written, duplicate and each `rejected.<reason>`; `class_counts` is int64 (4, 10): pixels a
    season of each class, the ignored ones last.
    """

    folder: Path
    num_samples: int
    num_shards: int
    size_bytes: int
    ledger: dict[str, int]
    class_counts: npt.NDArray[np.int64]
    digest: str


def plan_shards(archive: Archive, shard_size_mib: float) -> list[tuple[str, tuple[str, ...]]]:
    """Name and location keys of each shard: a pure function of what the archive lists, whatever turns out unreadable.

    Raises:
        ConfigError: the shard size is not positive and finite.
    """
    if not 0 < shard_size_mib < float("inf"):
        raise ConfigError(f"shard_size_mib={shard_size_mib} is not allowed; give a size above 0, 256 or 512 for large archives.")
    size = sample_bytes(archive.spec)
    per_shard = max(1, int(shard_size_mib * 2**20) // size)
    keys = archive.locations
    return [(f"shard-{i:06d}.tar", keys[start : start + per_shard]) for i, start in enumerate(range(0, len(keys), per_shard))]


def write_shards(
    archive: Archive,
    out: str | Path,
    shard_size_mib: float = 256,
    max_reject_fraction: float = 0.001,
    overwrite: bool = False,
    progress: Callable[[str, str], None] | None = None,
) -> Summary:
    """Converts an archive into shards, or leaves nothing behind.

    Args:
        archive: From `open_archive`.
        out: Folder to create.
        shard_size_mib: Size of a tar, at most, MiB; a shard has at least one sample.
        max_reject_fraction: Share of the inputs that may be rejected, in [0, 1].
        overwrite: Whether an earlier output of ours at `out` is replaced.
        progress: Called with key and status (written, rejected, duplicate) as inputs are done.

    Raises:
        OutputExistsError: `out` is there, and is not to be, or must not be, replaced.
        UnreadableInputError, EmptyLabelError, RejectedInputsError: too many inputs were rejected, mostly because files
            are damaged, labels are empty, or for other reasons. Stops at the first too many.
        ConfigError: an argument is out of range.
    """
    out = Path(os.path.abspath(out))
    if not 0 <= max_reject_fraction <= 1:
        raise ConfigError(f"max_reject_fraction={max_reject_fraction} is not allowed; give a share in [0, 1].")
    check_output(out, overwrite)
    plan = plan_shards(archive, shard_size_mib)
    with replacing(out) as staging:
        ledger, statistics = _Ledger(archive, max_reject_fraction, progress), _Statistics()
        entries = []
        for name, keys in plan:
            if entry := write_shard(staging, name, _read_samples(archive, name, keys, ledger, statistics)):
                verify_shard(staging, entry)
                entries.append(entry)
        if not entries:
            raise ledger.too_many()
        write_atomically(staging / LEDGER, ledger.text)
        digest = write_manifest(staging, _manifest_content(archive, entries, ledger, statistics))
        read_manifest(staging)
    return Summary(
        folder=out,
        num_samples=ledger.counts["written"],
        num_shards=len(entries),
        size_bytes=sum(entry.size for entry in entries),
        ledger={
            "inputs": _num_inputs(archive),
            **ledger.counts,
            **{f"rejected.{r}": n for r, n in sorted(ledger.reasons.items())},
        },
        class_counts=statistics.class_counts,
        digest=digest,
    )


def check_output(out: Path, overwrite: bool) -> None:
    """Raises OutputExistsError unless `out` is free or may be replaced, ConfigError unless its parent is there."""
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is not a folder; create it, or choose another place for the output.")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{out} is there already; choose another folder, or pass --overwrite to replace shards written earlier."
        )
    if out.is_symlink():
        raise OutputExistsError(f"{out} is a link and is not replaced; give the folder it points to, {out.resolve()}.")
    try:
        read_manifest(out)
    except ShardError as error:
        raise OutputExistsError(f"{out} is not replaced, because it does not look like shards of ours: {error}") from error


class _Ledger:
    """One line an input: written, rejected for a reason, or duplicate."""

    def __init__(self, archive: Archive, max_reject_fraction: float, progress: Callable[[str, str], None] | None) -> None:
        self.num_inputs = _num_inputs(archive)
        self.max_rejects = int(max_reject_fraction * _num_inputs(archive))
        self.progress = progress
        self.counts = Counter({"written": 0, "duplicate": 0, "rejected": 0})
        self.reasons: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.rejects: list[Rejected] = []
        self.lines: list[str] = []

    @property
    def text(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines).encode()

    def add(self, key: str, status: str, **more: Any) -> None:
        self.counts[status] += 1
        self.lines.append(json.dumps({"key": key, "status": status, **more}))
        if self.progress:
            self.progress(key, status)

    def reject(self, key: str, error: Rejected) -> None:
        self.reasons[error.reason] += 1
        if len(self.rejects) < NUM_REJECTS_SHOWN:
            self.rejects.append(error)
        self.add(key, "rejected", reason=error.reason, path=error.path, detail=error.detail)
        if self.counts["rejected"] > self.max_rejects:
            raise self.too_many()

    def too_many(self) -> RejectedInputsError:
        reason = self.reasons.most_common(1)[0][0]
        kinds = {"truncated": UnreadableInputError, "unreadable": UnreadableInputError, "label_empty": EmptyLabelError}
        return kinds.get(reason, RejectedInputsError)(
            f"{self.counts['rejected']} of the first {self.counts.total()} inputs (of {self.num_inputs}) were rejected, "
            f"{self.max_rejects} are allowed, and nothing was written. First rejects: {'; '.join(map(str, self.rejects))}. "
            "Mend or remove these locations, or raise --max_reject_fraction if their loss is acceptable."
        )


class _Statistics:
    """Exact counts over all written samples: class pixels a season, uint8 histograms a band."""

    def __init__(self) -> None:
        self.class_counts = np.zeros((NUM_SEASONS, NUM_CLASSES + 1), np.int64)
        self.histograms = {(spec.name, band): np.zeros(256, np.int64) for spec in IMAGE_ARRAYS for band in spec.bands}

    def add(self, sample: Sample) -> None:
        for season, label in enumerate(sample.arrays[LABEL_ARRAY]):
            counts = np.bincount(label.ravel(), minlength=256)
            self.class_counts[season] += np.append(counts[:NUM_CLASSES], counts[IGNORE])
        for spec in IMAGE_ARRAYS:
            for index, band in enumerate(spec.bands):
                self.histograms[spec.name, band] += np.bincount(sample.arrays[spec.name][:, index].ravel(), minlength=256)

    def bands(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and standard deviation of each band's stored uint8 values, by modality."""
        values = np.arange(256)
        result: dict[str, dict[str, dict[str, float]]] = {}
        for spec in IMAGE_ARRAYS:
            for band in spec.bands:
                histogram = self.histograms[spec.name, band]
                mean = float(histogram @ values / histogram.sum())
                variance = float(histogram @ (values - mean) ** 2 / histogram.sum())
                result.setdefault(str(spec.modality), {})[band] = {"mean": round(mean, 6), "std": round(variance**0.5, 6)}
        return result


def _num_inputs(archive: Archive) -> int:
    return len(archive.keys) + archive.duplicates.total()


def _read_samples(
    archive: Archive, shard: str, keys: tuple[str, ...], ledger: _Ledger, statistics: _Statistics
) -> Iterator[tuple[Sample, Checksums]]:
    repeated = archive.duplicates
    for key in keys:
        try:
            sample = archive.read(key)
        except Rejected as error:
            ledger.reject(key, error)
        else:
            statistics.add(sample)
            ledger.add(key, "written", shard=shard, notes=list(sample.notes))
            ledger.notes.update(sample.notes)
            yield sample, season_checksums(sample)
        for _ in range(repeated[key]):
            ledger.add(key, "duplicate")


def _manifest_content(archive: Archive, entries: list[ShardEntry], ledger: _Ledger, statistics: _Statistics) -> dict[str, Any]:
    assert ledger.counts.total() == _num_inputs(archive), f"{ledger.counts} do not add up to {_num_inputs(archive)} inputs"
    assert ledger.counts["written"] == sum(entry.samples for entry in entries)
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "patch_px": archive.patch_px,
        "num_samples": ledger.counts["written"],
        "arrays": archive.spec.arrays(),
        "normalisation": archive.spec.contracts(),
        "normalised_by": archive.spec.normalised_by,
        "band_statistics": {"units": "stored uint8, 0-255", **statistics.bands()},
        "class_counts": [dict(zip((*CLASS_NAMES, "ignored"), map(int, row), strict=True)) for row in statistics.class_counts],
        "ledger": {
            "inputs": _num_inputs(archive),
            **ledger.counts,
            "reasons": dict(sorted(ledger.reasons.items())),
            "notes": dict(sorted(ledger.notes.items())),
            "unlabelled": archive.unlabelled,
            "strays": archive.strays,
            "sha256": hashlib.sha256(ledger.text).hexdigest(),
        },
        "shards": [asdict(entry) for entry in entries],
    }

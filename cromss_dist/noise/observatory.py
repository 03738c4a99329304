"""What a pretrained segmenter thinks of the labels of a dataset, pixel by pixel, as a cube.

The cube is a dataset like any other, written by the conversion library: a killed command goes on after the last finished
part, every chunk has its checksum, the manifest names dataset and model, and the result appears in one step.
Layer 4. S seasons, C classes, H rows, W columns.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import Runner, Summary, convert, run_here
from cromss_dist.data.conversion.parts import Progress
from cromss_dist.data.sample import Json, MeasureSpec, Sample, SampleSpec, Uint8Array, ValueSpec, to_measure
from cromss_dist.data.store.manifest import MANIFEST, canonical, read_manifest
from cromss_dist.data.store.shards import sample_bytes
from cromss_dist.errors import ConfigError, ShardError
from cromss_dist.losses.confidence import label_confidence, refine
from cromss_dist.noise.segmenter import Segmenter
from cromss_dist.schema import IGNORE, LABEL_ARRAY

SUGGESTED, LABEL_CONFIDENCE, SUGGESTED_CONFIDENCE, AGREEMENT = (
    "suggested",
    "label_confidence",
    "suggested_confidence",
    "agreement",
)
MEASURES = (
    MeasureSpec(LABEL_CONFIDENCE, "refined confidence in the noisy label, mean of both branches"),
    MeasureSpec(SUGGESTED_CONFIDENCE, "probability of the suggested class in the mean of both branches"),
    MeasureSpec(AGREEMENT, "overlap of what the two branches say: sum over classes of the smaller probability"),
)
ORIGIN = "noise observatory"
MIN_PARTS = 16  # where there are as many locations: work for as many processes, and seldom more than this to do again
MAX_PART_MIB = 64.0


@dataclass(frozen=True)
class Observatory:
    """A `data.sample.Source` that looks at the samples of a dataset: labels and truth as they are, and what is thought of them.

    Args:
        archive: The dataset.
        segmenter: Who looks.
    """

    archive: StoredArchive
    segmenter: Segmenter

    @property
    def spec(self) -> SampleSpec:
        """Labels (and reference and kind, where there are any), the suggested label, and three measures; no image."""
        seen = self.archive.spec
        values = (*seen.values, ValueSpec(SUGGESTED, seen.values[0].values))
        return SampleSpec(seen.patch_px, seen.num_seasons, (), values, {}, {}, MEASURES)

    @property
    def keys(self) -> tuple[str, ...]:
        """The dataset's locations, sorted."""
        return self.archive.keys

    @property
    def duplicates(self) -> Counter[str]:
        """None."""
        return Counter()

    @property
    def asides(self) -> dict[str, int]:
        """None."""
        return {}

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over dataset and model."""
        return hashlib.sha256(canonical(self.origin)).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of what is looked at."""
        return self.archive.size_bytes

    @property
    def origin(self) -> Json:
        """What the manifest says of where it comes from."""
        network = self.segmenter
        return {"kind": ORIGIN, "dataset": self.archive.digest, "model_sha256": network.sha256, "run_id": network.run_id}

    def read(self, key: str) -> Sample:
        """Looks at one location.

        Raises:
            ShardError: bytes of the dataset are missing or changed.
        """
        seen = self.archive.read(key)
        spec = self.archive.spec
        said = look(self.segmenter.probabilities(spec, seen.arrays), seen.arrays[LABEL_ARRAY])
        kept = {value.name: seen.arrays[value.name] for value in spec.values}
        return Sample(key, {name: (kept | said)[name] for name in self.spec.names}, seen.metadata, ())


def look(probs: torch.Tensor, label: Uint8Array) -> dict[str, Uint8Array]:
    """What two branches make of a label.

    Args:
        probs: float32 (2, S, C, H, W), sums to 1 over C.
        label: uint8 (S, H, W), 255 = ignore.

    Returns:
        uint8 (S, H, W) each: `suggested`, the likeliest class of the branches' mean; and, as `data.sample.to_measure` stores
        them, its probability `suggested_confidence`; `label_confidence` = mean over branches d of (c_d + c_1 c_2) / 2, c_d the
        probability that d gives the noisy label (none where that is ignored); `agreement` = sum over classes of min(P_1, P_2).

    Reference: CromSS, section III-C, for the refinement.
    Departs: one figure a pixel, the mean of both branches', which finds wrong labels best (docs/noise.md).
    """
    of_pixel, suggested = probs.mean(0).max(1)
    known = label != IGNORE
    classes = torch.from_numpy(label).to(probs.device, torch.int64).where(torch.from_numpy(known).to(probs.device), 0)
    refined = refine(torch.stack([label_confidence(of_branch, classes) for of_branch in probs])).mean(0)
    agreement = torch.minimum(probs[0], probs[1]).sum(1).clamp(0, 1)
    return {
        SUGGESTED: suggested.to(torch.uint8).cpu().numpy(),
        LABEL_CONFIDENCE: to_measure(refined.cpu().numpy(), known),
        SUGGESTED_CONFIDENCE: to_measure(of_pixel.cpu().numpy()),
        AGREEMENT: to_measure(agreement.cpu().numpy()),
    }


def observe(
    observatory: Observatory,
    out: Path,
    *,
    part_mib: float = MAX_PART_MIB,
    overwrite: bool = False,
    restart: bool = False,
    run: Runner = run_here,
    progress: Progress | None = None,
) -> Summary:
    """Writes the cube, going on where a killed call was; one that is there of this dataset and model is taken as it is.

    Args:
        observatory: Dataset and model.
        out: Folder to create: `cube.zarr`, its records and a manifest.
        part_mib: Size of a part at most, before compression, MiB: what one process does, and holds, at a time.
        overwrite: Whether an earlier dataset of ours at `out` is replaced.
        restart: Whether what a killed call left is thrown away.
        run: Who does the parts.
        progress: Called with key and status as locations are done.

    Raises:
        BandError, CheckpointError: the model does not fit the dataset, see `Segmenter.check_takes`.
        ConfigError: `out` is the dataset itself, or as `convert`.
        OutputExistsError, StorageError, ShardError: as `convert`.
    """
    observatory.archive.check_apart(out)
    shard_size_mib = _part_mib(observatory, part_mib)
    observatory.segmenter.check_takes(observatory.archive.spec)
    if not overwrite and (manifest := _manifest_at(out)) and manifest.get("origin") == observatory.origin:
        return Summary(out, manifest)
    return convert(
        observatory,
        out,
        write="cube",
        shard_size_mib=shard_size_mib,
        overwrite=overwrite,
        restart=restart,
        run=run,
        progress=progress,
        origin=observatory.origin,
    )


def open_observations(location: str | Path) -> StoredArchive:
    """The cube of an earlier `observe`.

    Raises:
        ConfigError: it is another dataset.
        ShardError, DownloadError: as `open_dataset`.
    """
    observations = StoredArchive.of(location)
    if origin_of(observations).get("kind") != ORIGIN:
        raise ConfigError(f"{location} is no cube of the noise observatory; give the folder that `cromss noise` has written.")
    return observations


def check_made_of(observations: StoredArchive, archive: StoredArchive) -> None:
    """That a cube is of this dataset.

    Raises:
        ConfigError: it is of another one.
    """
    if (looked_at := origin_of(observations)["dataset"]) != archive.digest:
        raise ConfigError(
            f"{observations.location} was made of the dataset {looked_at}, not of {archive.location}, which is {archive.digest}; "
            "give the dataset that the observatory looked at."
        )


def origin_of(archive: StoredArchive) -> dict[str, Any]:
    """What a dataset was computed from; empty where that is an archive."""
    return archive.dataset.manifest.get("origin") or {}


def _manifest_at(out: Path) -> Json | None:
    try:
        return read_manifest(out) if (out / MANIFEST).is_file() else None
    except ShardError:
        return None  # not ours: the conversion says so


def _part_mib(observatory: Observatory, part_mib: float) -> float:
    """A size that holds a sixteenth of the locations, rounded up, or `part_mib` if that is less."""
    if not 0 < part_mib < math.inf:
        raise ConfigError(f"part_mib={part_mib} is not allowed; give a size above 0, such as {MAX_PART_MIB:g}.")
    locations = math.ceil(len(observatory.keys) / MIN_PARTS)
    return min(part_mib, (locations + 0.5) * sample_bytes(observatory.spec) / 2**20)

"""Counts the locations of an archive that a first draft describes, and decodes the files of a few of them."""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.layout.description import ArchiveDescription
from cromss_dist.data.reporting.quality import SHIFT_CONFIDENCE, Shift, estimate_shift
from cromss_dist.data.survey.path_patterns import Pattern
from cromss_dist.data.survey.survey import Probe, Survey
from cromss_dist.errors import ArchiveEmptyError
from cromss_dist.schema import LABEL_ARRAY, MODALITIES, Modality

NUM_SAMPLED = 12  # locations of which every file is decoded
SMALLEST_PX = 32  # side of the smallest image that a shift is looked for in

Scenes: TypeAlias = dict[str, dict[str, set[str]]]  # role -> location -> names of its scenes
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass
class Census:
    """What `take_census` counted.

    Args:
        scenes: Of every location, by role.
        complete: Number of locations that have files of every role.
        num_scenes: Number of Sentinel-2 scenes (of Sentinel-1, without it) -> complete locations that have so many.
        sampled: (role, band) -> rasters of the sampled locations, one pixel of each.
        label_counts: Stored label value -> pixels, of the sampled locations.
        shifts: Sampled location -> S1 against S2, px of 10 m; those that show one.
    """

    scenes: Scenes
    complete: int
    num_scenes: Counter[int]
    sampled: dict[tuple[str, str], list[Probe]] = field(default_factory=dict)
    label_counts: Counter[int] = field(default_factory=Counter)
    shifts: dict[str, Shift] = field(default_factory=dict)

    @property
    def locations(self) -> dict[str, int]:
        """Role -> number of locations that have files of it."""
        return {role: len(of_role) for role, of_role in self.scenes.items()}

    @property
    def odd(self) -> list[str]:
        """Of the sampled rasters those of another size or type than most of their role and band."""
        told = []
        for probes in self.sampled.values():
            (usual, _), *_ = Counter(_make(probe) for probe in probes).most_common(1)
            told += [f"{p.path}: {_make(p)}, most are {usual}" for p in probes if _make(p) != usual]
        return told


def take_census(survey: Survey, description: ArchiveDescription, patterns: Sequence[Pattern]) -> Census:
    """Counts locations and scenes, and decodes the files of a few locations.

    Args:
        survey: Of the archive.
        description: A draft that tells roles, locations and scenes.
        patterns: Of the files of its required roles.

    Raises:
        ArchiveEmptyError: no location has all roles.
        UnreadableInputError: of a role no file of the sampled locations can be decoded.
    """
    scenes: Scenes = {role: {} for role in description.required_roles}
    for entry in survey.entries(patterns):
        match = description.match(entry.path)
        if match is not None and match.role in scenes:
            scenes[match.role].setdefault(match.key, set()).add(match.scene)
    complete = set.intersection(*(set(of_role) for of_role in scenes.values()))
    counted = "s2" if "s2" in scenes else "s1"
    census = Census(scenes, len(complete), Counter(len(scenes[counted][key]) for key in complete))
    if not complete:
        counts = ", ".join(f"{number} of {role}" for role, number in census.locations.items())
        raise ArchiveEmptyError(
            f"{survey.inventory.root}: no location has all of {', '.join(scenes)} ({counts}), going by the paths "
            f"{', '.join(p.text for p in patterns)}. Write the description by hand: docs/archives.md."
        )
    images: dict[str, dict[Modality, list[tuple[Match, Probe]]]] = {
        key: {modality: [] for modality in MODALITIES}
        for key in nsmallest(NUM_SAMPLED, complete, key=lambda key: zlib.crc32(key.encode()))
    }
    for entry in survey.entries(patterns):
        match = description.match(entry.path)
        probe = survey.probe(entry) if match is not None and match.key in images else None
        if match is None or probe is None:
            continue
        if match.role == LABEL_ARRAY:
            values, counts_of = np.unique(probe.pixels, return_counts=True)
            census.label_counts.update({int(v): int(n) for v, n in zip(values, counts_of, strict=True) if np.isfinite(v)})
        for modality in MODALITIES:
            if match.role == modality:
                images[match.key][modality].append((match, probe))
        # The pixels of all samples at once would not be small; the rest of what is known of them is.
        census.sampled.setdefault((match.role, match.band), []).append(replace(probe, pixels=probe.pixels[:, :1, :1]))
    for role in scenes:
        if not any(role == sampled for sampled, _ in census.sampled):
            raise survey.unreadable(role)
    for key, of_modality in sorted(images.items()):
        shift = _shift(of_modality)
        if shift is not None:
            census.shifts[key] = shift
    return census


def _shift(scenes: dict[Modality, list[tuple[Match, Probe]]]) -> Shift | None:
    """S1 against S2 of a location's first scenes that show a confident shift; None where none does."""
    pictures: dict[Modality, list[FloatArray]] = {}
    for modality, files in scenes.items():
        by_scene: dict[tuple[str, str], list[Probe]] = {}
        for match, probe in files:
            by_scene.setdefault((match.time, match.scene), []).append(probe)
        pictures[modality] = [_intensity(by_scene[scene]) for scene in sorted(by_scene)]
    for radar, optical in zip(pictures["s1"], pictures["s2"], strict=False):
        height, width = (min(a, b) for a, b in zip(radar.shape, optical.shape, strict=True))
        if min(height, width) >= SMALLEST_PX:
            shift = estimate_shift(radar[:height, :width], optical[:height, :width])
            if shift.confidence >= SHIFT_CONFIDENCE:
                return shift
    return None


def _intensity(probes: Sequence[Probe]) -> FloatArray:
    """Mean of the finest bands, strong values tamed."""
    finest = max(probe.header.height for probe in probes)
    stack = np.concatenate([p.pixels.astype(np.float32) for p in probes if p.header.height == finest])
    stack = np.nan_to_num(stack, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = np.percentile(stack, (1, 99), axis=(1, 2), keepdims=True)
    return np.asarray(np.clip(stack, low, high).mean(axis=0), np.float32)


def _make(probe: Probe) -> str:
    shape = probe.header
    return f"{shape.height} x {shape.width} px, {shape.bands} band{'s'[: shape.bands > 1]}, {shape.dtype}"

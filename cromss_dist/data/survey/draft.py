"""Drafts the description of an archive from what a survey found, and says of each guess that it is one."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cromss_dist.data.archives.layout.description import ArchiveDescription, dump
from cromss_dist.data.archives.layout.files import ImageFiles, LocationList, OffsetRule, Units, ValueFiles
from cromss_dist.data.archives.normalise import VALUE_DTYPES
from cromss_dist.data.sample import Rejected
from cromss_dist.data.survey.census import NUM_SAMPLED, Census, Scenes, take_census
from cromss_dist.data.survey.draft_paths import DraftedPath, draft_paths
from cromss_dist.data.survey.path_patterns import Pattern
from cromss_dist.data.survey.survey import RASTERS, Probe, Survey
from cromss_dist.errors import ArchiveEmptyError
from cromss_dist.schema import BANDS, IMAGE_ARRAYS, LABEL_ARRAY, MODALITIES, NUM_CLASSES, S2_9, S2_12, S2_BANDS, S2_RGB, Modality

MAX_CLASSES = 64
MAX_LIST_BYTES = 2**26
# Number of bands of a file -> the order that is usual.
USUAL_BANDS: dict[Modality, dict[int, tuple[str, ...]]] = {
    "s1": {1: ("VV",), 2: ("VV", "VH")},
    "s2": {13: S2_BANDS, 12: S2_12, 10: tuple(b for b in S2_BANDS if b not in ("B1", "B9", "B10")), 9: S2_9,
           4: ("B2", "B3", "B4", "B8"), 3: S2_RGB},
}  # fmt: skip
OFFSET_SINCE, OFFSET_DN = "20220125", 1000.0  # processing baseline 04.00, see configs/archives/noldo_s12.yaml
BASELINE = "PROCESSING_BASELINE"


@dataclass
class Draft:
    """A drafted description and what it rests on.

    Args:
        description: The draft.
        remarks: Dotted key -> what was seen, or what was guessed and why it may be wrong.
        patterns: Role -> the pattern of its files.
        census: Locations, and what the files of a few of them hold.
        unused: Patterns of rasters that nothing in the draft matches.
    """

    description: ArchiveDescription
    remarks: dict[str, str]
    patterns: dict[str, Pattern]
    census: Census
    unused: tuple[Pattern, ...]

    @property
    def text(self) -> str:
        """The YAML, with a comment at each guess."""
        return _commented(dump(self.description), self.remarks)


def draft(survey: Survey, name: str) -> Draft:
    """Drafts a description.

    Args:
        survey: What `survey.look` found.
        name: Name of the description.

    Raises:
        ArchiveEmptyError: no images or no labels are among the files, or nothing in their paths names the location.
        UnreadableInputError: of images or labels no file can be decoded.
    """
    patterns = _roles(survey)
    paths = draft_paths(patterns, [p for p in survey.patterns if p.extension == ".json"])
    remarks: dict[str, str] = {}
    images: dict[Modality, ImageFiles] = {}
    for modality in MODALITIES:
        if modality in patterns:
            images[modality] = _image_files(modality, patterns[modality], paths[modality], survey, remarks)
    values: dict[str, ValueFiles] = {}
    for role in (LABEL_ARRAY, "reference", "kind"):
        if role in patterns:
            values[role] = ValueFiles(
                paths[role].path,
                "noise_kinds" if role == "kind" else "dynamic_world",
                scene_of=paths[role].scene_of or ("s2" if "s2" in images else "s1"),
                optional=role != LABEL_ARRAY,
            )
    fields = {piece: regex for path in paths.values() for piece, regex in path.fields.items()}
    description = ArchiveDescription(name, images, values, paths[LABEL_ARRAY].key, fields, "drafted by tools/describe.py")
    census = take_census(survey, description, [patterns[role] for role in description.required_roles])
    used = [*patterns.values()]
    unused = tuple(p for p in survey.patterns if p.extension in RASTERS and p not in used)
    for pattern in unused:
        same = survey.role(pattern)
        if same in patterns and survey.probes.get(pattern.text):
            at = f"{'images' if same in MODALITIES else 'values'}.{same}.path"
            remarks[at] = f"guess: {pattern.text} ({pattern.count} files) was left out, and could be this too"
    found = Draft(description, remarks, patterns, census, unused)
    _refine(survey, found, paths)
    return found


def _roles(survey: Survey) -> dict[str, Pattern]:
    """Role -> pattern; of several the one with most files, and names before pixels."""
    patterns: dict[str, Pattern] = {}
    for pattern in sorted(survey.patterns, key=lambda pattern: survey.named_role(pattern) is None):
        role = survey.role(pattern)
        if role is not None:
            patterns.setdefault(role, pattern)
    if LABEL_ARRAY not in patterns and "reference" in patterns:
        patterns[LABEL_ARRAY] = patterns.pop("reference")
    if LABEL_ARRAY not in patterns or not {"s1", "s2"} & patterns.keys():
        raise _incomplete(survey, patterns)
    for role, pattern in patterns.items():
        if not survey.probes.get(pattern.text):
            raise survey.unreadable(f"{role} ({pattern.text})")
    return patterns


def _incomplete(survey: Survey, patterns: dict[str, Pattern]) -> ArchiveEmptyError:
    lacking = [what for what, roles in (("images", {"s1", "s2"}), ("labels", {LABEL_ARRAY})) if not roles & patterns.keys()]
    seen = ", ".join(f"{pattern.text} ({pattern.count} files)" for pattern in survey.patterns[:5])
    told = (
        f"{survey.inventory.root}: a dataset needs images and labels as GeoTIFFs (.tif), and no {' or '.join(lacking)} were found"
    )
    if any(pattern.text.endswith((".mdb", ".lmdb", ".zarr.zip")) for pattern in survey.patterns):
        return ArchiveEmptyError(
            f"{survey.inventory.root} holds LMDBs or .zarr.zip files, which need no description: tools/shard.py reads them as "
            "they are."
        )
    other = next((p for p in survey.patterns if p.extension not in RASTERS and survey.named_role(p) is not None), None)
    if other is not None:
        return ArchiveEmptyError(
            f"{told}, but {other.text} ({other.count} files): {other.extension or 'such files'} cannot be read; make GeoTIFFs of "
            "them under the same names, see docs/archives.md."
        )
    return ArchiveEmptyError(
        f"{told}. Its most frequent paths are {seen}. If some of them are, copy the nearest description of configs/archives and "
        "write their paths into it: docs/archives.md."
    )


def _image_files(modality: Modality, pattern: Pattern, path: DraftedPath, survey: Survey, remarks: dict[str, str]) -> ImageFiles:
    at = f"images.{modality}"
    bands: tuple[str, ...] | dict[str, str | int]
    gsd_m: int | Literal["native"] = "native"
    if pattern.bands:
        told = {band: pattern.bands[band] for band in BANDS[modality] if band in pattern.bands}
        bands = tuple(told) if all(ours == theirs for ours, theirs in told.items()) else dict(told)
    else:
        number = survey.probes[pattern.text][0].header.bands
        usual = USUAL_BANDS[modality].get(number, BANDS[modality][:number])
        bands = usual
        if usual != BANDS[modality]:
            remarks[f"{at}.bands"] = f"guess: a file has {number} bands without names: check which they are, and their order"
        gsd_m = 10
    return ImageFiles(path.path, bands, path.scene, "auto", gsd_m, metadata=None)


def _refine(survey: Survey, found: Draft, paths: dict[str, DraftedPath]) -> None:
    """Puts into the description what only the pixels tell."""
    description, census = found.description, found.census
    images = {modality: _with_values(modality, files, found, paths, survey) for modality, files in description.images.items()}
    values = {name: _with_classes(name, files, found) for name, files in description.values.items()}
    seasons, most = census.num_scenes.most_common(1)[0]
    if most < census.complete:
        others = ", ".join(f"{n} locations have {number}" for number, n in sorted(census.num_scenes.items()) if number != seasons)
        found.remarks["seasons"] = f"guess: {others}; those will be rejected"
    locations = _location_list(survey, description, census.scenes)
    found.description = replace(description, images=images, values=values, seasons=seasons, locations=locations)


def _with_values(
    modality: Modality, files: ImageFiles, found: Draft, paths: dict[str, DraftedPath], survey: Survey
) -> ImageFiles:
    at = f"images.{modality}"
    probes = [probe for (role, _), of_band in found.census.sampled.items() if role == modality for probe in of_band]
    dtypes = Counter(probe.header.dtype for probe in probes)
    dtype = dtypes.most_common(1)[0][0]
    low, high = min(probe.low for probe in probes), max(probe.high for probe in probes)
    told = f"{dtype}, 1st to 99th percentile {low:.4g} to {high:.4g}"
    units: Units
    if dtype == "uint8":
        units = "uint8"
        found.remarks[f"{at}.units"] = f"guess: {told}, taken as the published uint8, which is kept as it is"
    elif modality == "s1":
        units = "dB" if low < 0 else "linear"
        found.remarks[f"{at}.units"] = f"seen: {told}"
    else:
        units = "reflectance" if high <= 3 else "reflectance_x10000"
        found.remarks[f"{at}.units"] = f"seen: {told}"
    metadata, offset = paths[modality].metadata, None
    if modality == "s2" and units == "reflectance_x10000":
        offset = _offset(survey, metadata, probes, found)
    gsd_m = _distance(files, found, modality)
    return replace(files, units=units, gsd_m=gsd_m, metadata=metadata if offset and offset.field else None, offset=offset)


def _offset(survey: Survey, metadata: str | None, probes: Sequence[Probe], found: Draft) -> OffsetRule | None:
    """Whether digital numbers have the offset of processing baseline 04.00."""
    if metadata is not None:
        for pattern in (p for p in survey.patterns if p.extension == ".json"):
            path = next(iter(pattern.examples.values()))[0]
            try:
                stated = json.loads(survey.inventory.read(survey.find(pattern, path)))
            except (Rejected, ValueError, RecursionError):
                continue
            if isinstance(stated, dict) and BASELINE in stated:
                return OffsetRule(OFFSET_DN, BASELINE, 4.0)
    times = [match.time for probe in probes if (match := found.description.match(probe.path)) is not None]
    if times and max(times)[:8] >= OFFSET_SINCE and min(probe.low for probe in probes) >= 0.9 * OFFSET_DN:
        found.remarks["images.s2.offset"] = "guess: no value below 900 and scenes after January 2022: the offset seems to be in"
        return OffsetRule(OFFSET_DN)
    return None


def _distance(files: ImageFiles, found: Draft, modality: Modality) -> int | Literal["native"]:
    """10 where bands that the instrument has at several resolutions are all of one size."""
    if not files.one_file_a_band:
        return files.gsd_m
    scale = {band: spec.scale for spec in IMAGE_ARRAYS for band in spec.bands}
    sizes: dict[int, Counter[int]] = {}
    for (role, band), probes in found.census.sampled.items():
        if role == modality:
            sizes.setdefault(scale[band], Counter()).update(probe.header.height for probe in probes)
    common = {scale: of_scale.most_common(1)[0][0] for scale, of_scale in sizes.items()}
    return 10 if len(common) > 1 and len(set(common.values())) == 1 else "native"


def _with_classes(name: str, files: ValueFiles, found: Draft) -> ValueFiles:
    if name != LABEL_ARRAY:
        return files
    seen = sorted(value for value in found.census.label_counts if value != 255)
    words = {piece.constant.lower() for piece in found.patterns[name].pieces if piece.kind == "text" and piece.constant}
    is_dw = bool(words & {"dw", "dynamicworld"})
    if is_dw and seen and seen[-1] in (NUM_CLASSES, NUM_CLASSES + 1):
        found.remarks["values.label.map"] = f"guess: values {seen} were seen, taken as 0 unmarked, 1-9 Dynamic World, 10 cloud"
        ours: dict[int | Literal["other"], int | Literal["ignore"]] = {value + 1: value for value in range(NUM_CLASSES)}
        return replace(files, map={0: "ignore", **ours, NUM_CLASSES + 1: "ignore"})
    if is_dw or (len(seen) >= 7 and seen[0] >= 0 and seen[-1] == NUM_CLASSES - 1):
        if not is_dw:
            found.remarks["values.label.classes"] = f"guess: values {seen} were seen, taken as Dynamic World's 0-8"
        return files
    makes = {
        (p.header.bands, p.header.dtype) for (role, _), probes in found.census.sampled.items() if role == name for p in probes
    }
    wrong = sorted((bands, dtype) for bands, dtype in makes if bands > 1 or dtype not in VALUE_DTYPES)
    if wrong:
        bands, dtype = wrong[0]
        found.remarks["values.label.path"] = (
            f"edit: these files have {bands} band{'s'[: bands > 1]} of {dtype}; a label has one, of integers: write class numbers"
        )
        return files
    if not seen or len(seen) > MAX_CLASSES or seen[0] < 0:
        found.remarks["values.label.path"] = (
            f"guess: {len(seen)} values from {seen[:1]} to {seen[-1:]} were seen: is this a label?"
        )
        return files
    found.remarks["values.label.classes"] = (
        f"edit: name the values; {seen} were seen in {min(NUM_SAMPLED, found.census.complete)} locations"
    )
    contiguous = seen == list(range(len(seen)))
    plain: dict[int | Literal["other"], int | Literal["ignore"]] = {value: number for number, value in enumerate(seen)}
    return replace(files, classes=tuple(f"class_{value}" for value in seen), map=None if contiguous else plain)


def _location_list(survey: Survey, description: ArchiveDescription, scenes: Scenes) -> LocationList | None:
    """A csv at top level whose first column names locations."""
    keys = scenes[LABEL_ARRAY]
    for pattern in (p for p in survey.patterns if p.extension == ".csv" and "/" not in p.text and p.count == 1):
        path = next(iter(pattern.examples.values()))[0]
        try:
            text = survey.inventory.read(survey.find(pattern, path), MAX_LIST_BYTES).decode("utf-8", "replace")
        except Rejected:
            continue
        lines = [line for line in csv.reader(io.StringIO(text)) if line]
        for digits in sorted({0, *(len(key) for key in keys if key.isdigit())}):
            named = {line[0].strip().zfill(digits): line[1:] for line in lines}
            known = {key: cells for key, cells in named.items() if key in keys}
            if 2 * len(known) > len(lines):
                return LocationList(path, _scenes_named(description, known, scenes), digits)
    return None


def _scenes_named(description: ArchiveDescription, lines: dict[str, list[str]], scenes: Scenes) -> Modality | None:
    """The modality whose scenes the further columns of a list of locations name."""
    for modality, files in description.images.items():
        of_key = scenes[modality]
        if "{scene}" in files.path and all(
            cells and {c.strip() for c in cells} <= of_key.get(k, set()) for k, cells in lines.items()
        ):
            return modality
    return None


def _commented(text: str, remarks: dict[str, str]) -> str:
    """YAML with a comment above the line of each key; a key inside braces gets it above the braces."""
    lines: list[str] = []
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        named = re.match(r"( *)([A-Za-z0-9_]+):", line)
        if named:
            indent = len(named[1])
            stack = [(depth, key) for depth, key in stack if depth < indent] + [(indent, named[2])]
            at = ".".join(key for _, key in stack)
            in_braces = line.rstrip().endswith("}") or "{" in line.partition(":")[2][:3]
            for key, why in remarks.items():
                if key == at or (in_braces and key.startswith(f"{at}.")):
                    lines.append(f"{named[1]}# {why}" if key == at else f"{named[1]}# {key.removeprefix(at + '.')}: {why}")
        lines.append(line)
    return "\n".join(lines) + "\n"

"""Which scenes make up the seasons of a location: the list of locations, and pairing by acquisition time."""

import csv
from collections import Counter
from dataclasses import dataclass, field

from cromss_dist.data.archives.inventory.entries import Entry
from cromss_dist.data.archives.layout.description import ArchiveDescription
from cromss_dist.data.archives.layout.templates import pieces
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import UnreadableInputError
from cromss_dist.schema import LABEL_ARRAY, Modality

Slots = dict[str, dict[str, dict[str, Entry]]]  # role -> scene -> band -> file


@dataclass(frozen=True)
class Listed:
    """What a csv says: the scenes of each location, and the locations it names more than once.

    Args:
        scenes: Further cells of a location's first line.
        duplicates: How often a location has further lines that say the same.
        conflicts: Locations that have lines that say otherwise.
    """

    scenes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    duplicates: Counter[str] = field(default_factory=Counter)
    conflicts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scene:
    """One acquisition of a location, and the files of one modality in it."""

    name: str
    time: str
    files: dict[str, Entry]


def read_list(data: bytes, name: str, known: ArchiveDescription) -> Listed:
    """Reads the csv of the locations.

    Args:
        data: Its bytes.
        name: Its path in the archive, for messages.
        known: Says what a key looks like.

    Raises:
        UnreadableInputError: it is no csv, or a line begins with no key; the first line may be a header.
    """
    try:
        rows = list(csv.reader(data.decode("utf-8-sig").splitlines()))
    except (ValueError, csv.Error) as error:
        raise UnreadableInputError(f"{name} is no csv: {error}; replace it by the one the labels came with.") from error
    digits = 0 if known.locations is None else known.locations.digits
    scenes: dict[str, tuple[str, ...]] = {}
    duplicates: Counter[str] = Counter()
    conflicts = set()
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        first = cells[0]
        key = first.lstrip("0").zfill(digits) if digits and first.isascii() and first.isdecimal() else first
        if not known.is_key(key):
            if number == 1 and not first.isdecimal():
                continue  # the header
            wanted = f"a location's number of up to {digits} digits" if digits else "the key of a location"
            raise UnreadableInputError(f"{name} line {number} begins with {first!r}; expected {wanted}. Mend the line.")
        named = tuple(filter(None, cells[1:]))
        if key not in scenes:
            scenes[key] = named
            continue
        duplicates[key] += 1
        if scenes[key] != named:
            conflicts.add(key)
    return Listed(scenes, duplicates, frozenset(conflicts))


def sort_files(entries: list[Entry]) -> Slots:
    """The files of a location by role, scene and band.

    Raises:
        Rejected: conflicting_duplicate: two files claim the same place.
    """
    slots: Slots = {}
    for entry in entries:
        place = slots.setdefault(entry.role, {}).setdefault(entry.scene, {})
        if entry.band in place:
            raise Rejected("conflicting_duplicate", entry.path, f"{place[entry.band].path} is the same file of this location")
        place[entry.band] = entry
    return slots


def pair(known: ArchiveDescription, key: str, slots: Slots, listed: tuple[str, ...] | None) -> dict[Modality, list[Scene]]:
    """The scenes of each modality, season by season: in order of acquisition time, not of their names.

    Names of S1 scenes begin with the satellite, so their order as text is not their order in time.

    Args:
        known: The layout.
        key: The location.
        slots: Its files.
        listed: Cells of the csv behind the key; None without a csv, or where it does not name this location.

    Raises:
        Rejected: missing_label, missing_season or missing_modality.
    """
    label = known.values[LABEL_ARRAY]
    labels = slots.get(LABEL_ARRAY)
    if not labels:
        raise Rejected("missing_label", known.expected_path(LABEL_ARRAY, key), "the location has no label")
    of_csv = known.locations.scenes_of if known.locations is not None and listed is not None else None
    chosen: dict[Modality, list[str]] = {}
    if "scene" in pieces(label.path):  # the labels say which scenes they are of; the csv knows better
        chosen[label.scene_of] = sorted(labels)
    if of_csv is not None and listed is not None:
        chosen[of_csv] = [cell for cell in listed if known.scene_time(of_csv, cell) is not None]
    for modality, names in chosen.items():
        place, reason = (
            (known.locations.csv, "missing_season")
            if modality == of_csv and known.locations
            else (known.expected_path(LABEL_ARRAY, key), "missing_label")
        )
        _require_seasons(names, known.seasons, reason, place)
    for modality in known.images:
        if modality not in slots:
            raise Rejected("missing_modality", known.expected_path(modality, key), f"the location has no {modality} file")
    paired = {}
    for modality in known.images:
        there = slots[modality]
        names = chosen.get(modality, sorted(there))
        for name in names:
            if name not in there:
                raise Rejected("missing_season", known.expected_path(modality, key, name), "the scene is not there")
            if modality == label.scene_of and "scene" in pieces(label.path) and name not in labels:
                raise Rejected("missing_label", known.expected_path(LABEL_ARRAY, key, name), "the scene has no label")
        _require_seasons(names, known.seasons, "missing_season", known.expected_path(modality, key))
        scenes = [Scene(name, next(iter(there[name].values())).time, there[name]) for name in names]
        paired[modality] = sorted(scenes, key=lambda scene: (scene.time, scene.name))
    return paired


def file_of_season(known: ArchiveDescription, role: str, key: str, slots: Slots, scene: Scene) -> Entry:
    """The file of a value array that goes with a scene: of the same name, or of the same time, or the only one.

    Raises:
        Rejected: missing_file.
    """
    there, named = slots.get(role, {}), pieces(known.values[role].path)
    wanted = [scene.name] if "scene" in named else [scene.time, scene.time[:8]] if "time" in named else [""]
    if "scene" not in named and known.seasons == 1 and len(there) == 1:
        wanted = list(there)
    for name in wanted:
        if name in there:
            return there[name][""]
    raise Rejected("missing_file", known.expected_path(role, key, scene.name), "the file is not there")


def _require_seasons(scenes: list[str], seasons: int, reason: str, path: str) -> None:
    if len(set(scenes)) != seasons or len(scenes) != seasons:
        raise Rejected(reason, path, f"it has {len(set(scenes))} scenes; expected {seasons}, one a season")

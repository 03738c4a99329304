"""Scenes by name: when each was acquired, and the csv that says which scenes make up a location's seasons."""

import csv
import re
from pathlib import Path

from cromss_dist.errors import UnreadableInputError

# The names are Sentinel product names shortened by Earth Engine; fields are separated by underscores.
S2_SCENE = re.compile(r"(\d{8}T\d{6})_\w+")
S1_SCENE = re.compile(r"S1[A-D]_[A-Z0-9]+_[A-Z0-9]+_[A-Z0-9]+_(\d{8}T\d{6})_\w+")


def scene_names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    """Names in `folder` that are scenes; .DS_Store and its like are none."""
    return [path.name for path in folder.iterdir() if pattern.fullmatch(path.name)]


def acquisition_time(scene: str) -> str:
    """Acquisition time in a scene's name, YYYYMMDDTHHMMSS: its fifth field for S1, its first for S2."""
    match = S1_SCENE.fullmatch(scene) or S2_SCENE.fullmatch(scene)
    assert match is not None
    return match.group(1)


def read_scenes(path: Path) -> tuple[dict[str, tuple[str, ...]], list[str], set[str]]:
    """The csv's scenes by location key, the keys of repeated lines, and the keys whose lines disagree."""
    scenes: dict[str, tuple[str, ...]] = {}
    duplicates: list[str] = []
    conflicts: set[str] = set()
    if not path.is_file():
        return scenes, duplicates, conflicts
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (ValueError, csv.Error) as error:
        raise UnreadableInputError(f"{path.name} is no csv: {error}; replace it by the one the labels came with.") from error
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and not cells[0].isdecimal()):
            continue  # a blank line, or the header
        if not (cells[0].isdecimal() and len(cells[0]) <= 7):
            raise UnreadableInputError(
                f"{path.name} line {number} begins with {cells[0]!r}; expected a location id of up to 7 digits. Mend the line."
            )
        key, named = f"{int(cells[0]):07d}", tuple(cells[1:])
        if key not in scenes:
            scenes[key] = named
            continue
        duplicates.append(key)
        if scenes[key] != named:
            conflicts.add(key)
    return scenes, duplicates, conflicts

"""Path templates of a description from patterns of paths: which pieces name the location, which the scene, and the rest.

Pieces that name the location are those whose values images and labels have in common.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cromss_dist.data.archives.layout.templates import TIME
from cromss_dist.data.survey.path_patterns import Kind, Pattern, Piece, split_path
from cromss_dist.errors import ArchiveEmptyError
from cromss_dist.schema import LABEL_ARRAY, MODALITIES, Modality

KEY_KINDS = ("number", "decimal", "code", "word")
FIELD_NAMES: dict[Kind, str] = {
    "number": "number", "decimal": "decimal", "code": "code", "satellite": "satellite", "split": "split", "season": "season",
    "word": "word", "time": "other_time",
}  # fmt: skip


@dataclass(frozen=True)
class DraftedPath:
    """How the files of one role are found.

    Args:
        path: Template.
        scene: Regular expression of its `{scene}`; '{time}' where it has none.
        fields: Regular expressions of its other pieces.
        key: Template of a location's name, the same for all roles.
        scene_of: Modality whose `{scene}` it has too.
        metadata: Template of the JSON file that lies beside a scene's images.
    """

    path: str
    scene: str
    fields: dict[str, str]
    key: str
    scene_of: Modality | None = None
    metadata: str | None = None


def draft_paths(patterns: Mapping[str, Pattern], side_files: Sequence[Pattern]) -> dict[str, DraftedPath]:
    """Templates of each role.

    Args:
        patterns: Role -> its pattern; 'label' and 's1' or 's2' at least.
        side_files: Patterns of the JSON files.

    Raises:
        ArchiveEmptyError: nothing in the paths is common to images and labels.
    """
    keys, by_scene = _key_pieces(patterns, by_scene=True), True
    if not keys:  # the scene alone names the location
        keys, by_scene = _key_pieces(patterns, by_scene=False), False
    if not keys:
        raise _nameless(patterns)
    drafted: dict[str, DraftedPath] = {}
    for role in (*MODALITIES, *(role for role in patterns if role not in MODALITIES)):
        if role not in patterns:
            continue
        of_images = [modality for modality in MODALITIES if modality in drafted]
        path, scene, fields = _template(patterns[role], keys, role, by_scene)
        scene_of = None
        if role not in MODALITIES and scene is not None:
            same = [modality for modality in of_images if drafted[modality].scene == scene]
            scene_of = same[-1] if same else None
            if scene_of is None:  # the scene in a label's path is named otherwise than the images': only its time counts
                path, scene, fields = _template(patterns[role], keys, role, by_scene=False)
        key = "_".join(f"{{{name}}}" for name in keys)
        metadata = _metadata(patterns[role], side_files, keys, role) if role in MODALITIES and by_scene else None
        drafted[role] = DraftedPath(path, scene or "{time}", fields, key, scene_of, metadata)
    return drafted


def _key_pieces(patterns: Mapping[str, Pattern], by_scene: bool) -> dict[str, Piece]:
    """Field name -> the label's piece that names the location; none of a scene's name if `by_scene`."""
    label = patterns[LABEL_ARRAY]
    images = [patterns[modality] for modality in MODALITIES if modality in patterns]
    common: list[Piece] = []
    for place, piece in enumerate(label.pieces):
        if (
            piece.kind not in KEY_KINDS
            or (by_scene and place in _scene_places(label))
            or any(_same(label, piece, other) for other in common)
        ):
            continue
        if all(any(piece.shares(other) for other in image.pieces) for image in images):
            common.append(piece)
    varied = [piece for piece in common if piece.constant is None]
    common = varied or common
    decimals = [piece for piece in common if piece.kind == "decimal"]
    named: dict[str, Piece] = {}
    for piece in common:
        if len(decimals) == 2 and piece.kind == "decimal":
            name = "lon" if piece is decimals[0] else "lat"
        else:
            name = "region" if piece.kind == "word" else "id"
        named[_unused(name, named)] = piece
    return named


def _nameless(patterns: Mapping[str, Pattern]) -> ArchiveEmptyError:
    told = ", ".join(f"{role}: {pattern.text}" for role, pattern in patterns.items())
    mosaic = all(pattern.count == 1 for pattern in patterns.values())
    return ArchiveEmptyError(
        f"Nothing in the paths names the location in images and labels alike ({told}). "
        + ("There is one file of each kind: cut a mosaic into patches of one size first." if mosaic else "")
        + ("" if mosaic else "Write the description by hand, or rename the files: docs/archives.md.")
    )


def _same(pattern: Pattern, one: Piece, other: Piece) -> bool:
    """Whether two pieces of a pattern always say the same."""
    places = [next(i for i, piece in enumerate(pattern.pieces) if piece is wanted) for wanted in (one, other)]
    paths = [split_path(path) for of_band in pattern.examples.values() for path in of_band]
    return all(parts[places[0]][1] == parts[places[1]][1] for parts in paths) and one.values == other.values


def _scene_places(pattern: Pattern) -> set[int]:
    """Places in folders or names that hold a time and, beyond it, a satellite, a code or another time; without times, seasons."""
    found: set[int] = set()
    if not any(piece.kind == "time" for piece in pattern.pieces):
        return {i for i, piece in enumerate(pattern.pieces) if piece.kind == "season" and piece.constant is None}
    for places in _segments(pattern):
        kinds = [pattern.pieces[i].kind for i in places]
        if "time" in kinds and (kinds.count("time") > 1 or {"satellite", "code"} & set(kinds)):
            variable = [i for i in places if pattern.pieces[i].kind in ("time", "satellite", "code")]
            found.update(range(variable[0], variable[-1] + 1))
    return found


def _segments(pattern: Pattern) -> list[list[int]]:
    segments: list[list[int]] = [[]]
    for place, piece in enumerate(pattern.pieces):
        if piece.constant == "/":
            segments.append([])
        else:
            segments[-1].append(place)
    return segments


def _template(
    pattern: Pattern, keys: Mapping[str, Piece], role: str, by_scene: bool = True
) -> tuple[str, str | None, dict[str, str]]:
    """Template, regular expression of the scene (None: the path has none) and fields."""
    scenes = _scene_places(pattern) if by_scene else set()
    names = _names(pattern, keys, scenes)
    path, scene, fields = "", None, {name: _regex(piece) for name, piece in keys.items()}
    timed = False
    in_scene = ""
    for place, piece in enumerate(pattern.pieces):
        if place in scenes:
            in_scene += _scene_regex(piece, first_time="{time}" not in in_scene)
            if place + 1 not in scenes:
                if scene is None or scene == in_scene:
                    scene = in_scene
                    path += "{scene}"
                else:  # a second folder of another make: its first time is not the acquisition's
                    name = _unused("folder", fields)
                    fields[name] = in_scene.replace("{time}", TIME)
                    path += f"{{{name}}}"
                in_scene = ""
        elif place in names:
            path += f"{{{names[place]}}}"
        elif piece.kind == "band":
            path += "{band}"
        elif piece.kind == "time" and not timed and scene is None and not scenes:
            path += "{time}"
            timed = True
        elif piece.constant is not None:
            path += piece.constant
        elif piece.kind == "time" and scene is None and not scenes:
            path += "{time}" if _repeats_time(pattern, place) else _field(piece, fields, role)
        else:
            path += _field(piece, fields, role)
    return path, scene, fields


def _names(pattern: Pattern, keys: Mapping[str, Piece], scenes: set[int]) -> dict[int, str]:
    """Place -> name of the field of the key that stands there; each field once at least where it can be."""
    names: dict[int, str] = {}
    for name, key in keys.items():
        places = [i for i, p in enumerate(pattern.pieces) if i not in names and i not in scenes and key.shares(p)]
        if places:
            first = pattern.pieces[places[0]]
            names.update({place: name for place in places if place == places[0] or _same(pattern, first, pattern.pieces[place])})
    return names


def _repeats_time(pattern: Pattern, place: int) -> bool:
    first = next(piece for piece in pattern.pieces if piece.kind == "time")
    return _same(pattern, first, pattern.pieces[place])


def _field(piece: Piece, fields: dict[str, str], role: str) -> str:
    name = _unused(f"{role}_{FIELD_NAMES[piece.kind]}" if piece.kind != "split" else "split", fields)
    fields[name] = _regex(piece)
    return f"{{{name}}}"


def _metadata(pattern: Pattern, side_files: Sequence[Pattern], keys: Mapping[str, Piece], role: str) -> str | None:
    """Template of the JSON file in the folder of a scene's images."""
    folders = len(_segments(pattern)) - 1
    path = _template(pattern, keys, role)[0].rpartition("/")[0]
    for side in side_files:
        template, _, _ = _template(side, keys, role) if len(_segments(side)) - 1 == folders else ("", None, {})
        if template and template.rpartition("/")[0] == path and "{scene}" in template:
            return template
    return None


def _regex(piece: Piece) -> str:
    match piece.kind:
        case "number":
            return f"[0-9]{{{next(iter(piece.lengths))}}}" if len(piece.lengths) == 1 else "[0-9]+"
        case "decimal":
            return "-?[0-9]+[.p][0-9]+"
        case "time":
            return TIME
        case "split" | "season" | "satellite":
            return "|".join(sorted(re.escape(value) for value in piece.values))
        case _:
            return "[A-Za-z0-9]+" if all(value.isascii() for value in piece.values) else r"[^\W_]+"


def _scene_regex(piece: Piece, first_time: bool) -> str:
    match piece.kind:
        case "time":
            return "{time}" if first_time else "[0-9T]+"
        case "season":
            return _regex(piece)
        case "satellite":
            return f"{next(iter(piece.values))[:2]}[A-D]"
        case "text" if piece.constant is not None:
            return re.escape(piece.constant)
        case _:
            return "[A-Za-z0-9]+"


def _unused(name: str, taken: Mapping[str, object]) -> str:
    number = 2
    unused = name
    while unused in taken:
        unused, number = f"{name}{number}", number + 1
    return unused

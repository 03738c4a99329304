"""What paths have in common: `s1/0000200/S1A_.._20200329T..../VV.tif` as literal text and pieces of a few kinds.

Nothing is known of the archive yet: a piece is told by its looks alone. Which pieces name the location, and which the
scene, is told later by comparing their values between patterns (`Piece.shares`).
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Literal, TypeAlias

from cromss_dist.data.archives.layout.templates import TIME, plain_time
from cromss_dist.schema import S1_BANDS, S2_BANDS

Kind: TypeAlias = Literal["text", "time", "number", "decimal", "code", "satellite", "band", "split", "season", "word"]
NUM_KEPT = 64  # values of a piece that are kept, those of the smallest hash: the same ones in every pattern that has them
NUM_EXAMPLES = 4
MIN_WORDS = 3  # alternatives of one word that make it a piece

# Names of bands in archives, in lower case, to ours.
BAND_NAMES = {
    **{band.lower(): band for band in (*S1_BANDS, *S2_BANDS)},
    **{f"b{band[1:]:0>2}".lower(): band for band in S2_BANDS if band[1:].isdigit()},
    "b08a": "B8A",
    "coastal": "B1",
    "blue": "B2",
    "green": "B3",
    "red": "B4",
    "nir": "B8",
    "swir1": "B11",
    "swir2": "B12",
}
# What the words of a path say of its files.
ROLE_WORDS = {
    "s1": ("s1", "sar", "radar", "grd", "sentinel1"),
    "s2": ("s2", "s2c", "s2a", "l1c", "l2a", "msi", "optical", "sentinel2", "multispectral"),
    "label": ("label", "labels", "lc", "landcover", "mask", "masks", "gt", "dw", "osm", "class", "classes", "annotation",
              "annotations", "target", "targets", "dfc"),
    "reference": ("reference", "truth"),
    "kind": ("kind", "kinds"),
}  # fmt: skip
_MEANT = {word for words in ROLE_WORDS.values() for word in words}
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")
_SEASONS = ("spring", "summer", "autumn", "fall", "winter")
_TOKEN = re.compile(rf"(?<![0-9]){TIME}(?![0-9])|(?<![0-9A-Za-z])-?[0-9]+[.p][0-9]{{3,}}|[^\W_]+|[\W_]")
_SATELLITE = re.compile(r"S[12][A-D]")
_NUMBERED = re.compile(r"([A-Za-z]+)([0-9]+)")  # p100, tile12, ROIs1868

Part: TypeAlias = tuple[Kind, str]


def split_path(path: str) -> list[Part]:
    """A path as parts of literal text and pieces, in order; joined they are the path."""
    segments = path.split("/")
    parts: list[Part] = []
    for number, segment in enumerate(segments):
        if number:
            parts.append(("text", "/"))
        parts += _split_segment(segment, last=number == len(segments) - 1)
    return parts


def _split_segment(segment: str, last: bool) -> list[Part]:
    stem = segment.rpartition(".")[0] if last and "." in segment else segment
    found = [token for token in _TOKEN.findall(stem)]
    words = [i for i, token in enumerate(found) if token[0].isalnum()]
    of_scene = False  # after satellite and time, whatever follows varies: orbit, checksum, tile
    parts: list[Part] = []
    for i, token in enumerate(found):
        if plain_time(token) and re.fullmatch(TIME, token):
            of_scene = of_scene or "T" in token or any(kind == "satellite" for kind, _ in parts)
            parts.append(("time", token))
        elif not (token[0].isalnum() or len(token) > 1):
            parts.append(("text", token))
        elif last and i == words[-1] and token.lower() in BAND_NAMES:
            parts.append(("band", token))
        elif of_scene:
            parts.append(("code", token))
        else:
            parts += _split_token(token)
    parts.append(("text", segment[len(stem) :]))
    return parts


def _split_token(token: str) -> list[Part]:
    if not token.isalnum():
        return [("decimal", token)]
    if token.lower() in _MEANT:
        return [("text", token)]
    if token.isascii() and token.isdigit():
        return [("number", token)]
    if re.fullmatch(r"[0-9]+p[0-9]{3,}", token):
        return [("decimal", token)]
    if _SATELLITE.fullmatch(token):
        return [("satellite", token)]
    if token.lower() in _SPLITS:
        return [("split", token)]
    if token.lower() in _SEASONS:
        return [("season", token)]
    numbered = _NUMBERED.fullmatch(token)
    if numbered:
        return [("text", numbered[1]), ("number", numbered[2])]
    return [("code" if any(c.isdigit() for c in token) and len(token) > 3 else "text", token)]


@dataclass
class Piece:
    """One place of a pattern: what stands there in the paths that have the pattern."""

    kind: Kind
    values: dict[str, int] = field(default_factory=dict)  # of the smallest hashes, to their hash
    lengths: set[int] = field(default_factory=set)
    _bar: int = 2**32  # a hash below it is kept

    def add(self, value: str) -> None:
        """Takes a value into account."""
        self.lengths.add(len(value))
        number = zlib.crc32(value.encode())
        if number < self._bar:
            self.values[value] = number
            if len(self.values) > 2 * NUM_KEPT:
                self.values = dict(nsmallest(NUM_KEPT, self.values.items(), key=lambda item: item[1]))
                self._bar = max(self.values.values())

    @property
    def constant(self) -> str | None:
        """The value, where there is one only."""
        return next(iter(self.values)) if len(self.values) == 1 else None

    def shares(self, other: "Piece") -> bool:
        """Whether the two have most values in common, judged by those that both would have kept."""
        if self.kind != other.kind:
            return False
        bar = min(self._bar, other._bar)
        mine = {value for value, number in self.values.items() if number <= bar}
        theirs = {value for value, number in other.values.items() if number <= bar}
        return 2 * len(mine & theirs) > min(len(mine), len(theirs))


@dataclass
class Pattern:
    """Files whose paths look alike.

    Args:
        pieces: In order; literal text too.
        count: Files.
        examples: Paths, a few for each band.
        numbers: What `Patterns.add` returned for these files.
    """

    pieces: list[Piece]
    count: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """For people: literal text, and kinds of pieces in angle brackets."""
        return "".join(piece.constant or f"<{piece.kind}>" for piece in self.pieces if piece.constant != "")

    @property
    def extension(self) -> str:
        """Such as '.tif', in lower case; '' for none."""
        return (self.pieces[-1].constant or "").lower()

    @property
    def bands(self) -> dict[str, str]:
        """Our band name -> the archive's, where the path names it; empty otherwise."""
        found = [piece for piece in self.pieces if piece.kind == "band"]
        return {BAND_NAMES[value.lower()]: value for piece in found for value in piece.values}

    def add(self, path: str, parts: Iterable[Part]) -> None:
        """Takes a path into account."""
        self.count += 1
        band = ""
        for piece, (kind, value) in zip(self.pieces, parts, strict=True):
            piece.add(value)
            band = value if kind == "band" else band
        kept = self.examples.setdefault(band, [])
        if len(kept) < NUM_EXAMPLES:
            kept.append(path)


class Patterns:
    """The patterns of an archive's paths, gathered one path at a time in bounded memory."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, Pattern]] = {}

    def add(self, path: str) -> int:
        """Takes a path into account; returns the number of its pattern."""
        parts = split_path(path)
        name = "".join(value if kind == "text" else f"<{kind}>" for kind, value in parts)
        if name not in self._found:
            number = len(self._found)
            self._found[name] = number, Pattern([Piece(kind) for kind, _ in parts], numbers=(number,))
        number, pattern = self._found[name]
        pattern.add(path, parts)
        return number

    def merged(self) -> list[Pattern]:
        """The patterns, most files first; those that differ in one word only, of a name and no role, are one."""
        patterns = [pattern for _, pattern in self._found.values()]
        while True:
            alike: dict[str, list[tuple[Pattern, str]]] = {}
            for pattern in patterns:
                texts = [str(p.constant) if p.kind == "text" else f"<{p.kind}>" for p in pattern.pieces[:-1]]
                for word in {text for text in texts if text.isalnum() and text.lower() not in _MEANT}:
                    rest = "\0".join("<word>" if text == word else text for text in texts)
                    alike.setdefault(f"{rest}\0{pattern.extension}", []).append((pattern, word))
            group = max(alike.values(), key=len, default=[])
            if len(group) < MIN_WORDS:
                return sorted(patterns, key=lambda p: (-p.count, p.text))
            gone = [pattern for pattern, _ in group]
            patterns = [p for p in patterns if not any(p is pattern for pattern in gone)]
            patterns.append(_merge(gone, [i for i, piece in enumerate(gone[0].pieces[:-1]) if piece.constant == group[0][1]]))


def _merge(group: list[Pattern], places: list[int]) -> Pattern:
    merged = Pattern([Piece(piece.kind) for piece in group[0].pieces])
    for place in places:
        merged.pieces[place].kind = "word"
    for pattern in group:
        merged.count += pattern.count
        merged.numbers += pattern.numbers
        for piece, part in zip(merged.pieces, pattern.pieces, strict=True):
            for value in part.values:
                piece.add(value)
            piece.lengths |= part.lengths
        for band, paths in pattern.examples.items():
            merged.examples[band] = [*merged.examples.get(band, []), *paths][:NUM_EXAMPLES]
    return merged

"""Looks at a folder that nobody has described: which files there are, what they hold, which look odd.

Everything is found in bounded memory, containers in the folder included: the files themselves are rows of the
inventory; what is kept here are patterns of paths and facts of a sample.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cromss_dist.data.archives.geotiff import Place, decode, header, place
from cromss_dist.data.archives.inventory.entries import Entry, Match
from cromss_dist.data.archives.inventory.inventory import Inventory, take_inventory
from cromss_dist.data.archives.inventory.listing import Progress
from cromss_dist.data.archives.tiff_directory import Header
from cromss_dist.data.sample import Rejected
from cromss_dist.data.survey.path_patterns import ROLE_WORDS, Pattern, Patterns
from cromss_dist.errors import ArchiveEmptyError, UnreadableInputError

RASTERS = (".tif", ".tiff")
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
NUM_NAMED = 10  # odd files of a kind that are named
_BUCKETS = 1024
_ROLE = "file"


@dataclass(frozen=True)
class Probe:
    """One raster that was decoded.

    Args:
        path: Relative to the archive.
        header: Size and type.
        place: Where it lies.
        low: 1st percentile of its finite pixels.
        high: 99th percentile.
        pixels: (bands, H, W).
    """

    path: str
    header: Header
    place: Place
    low: float
    high: float
    pixels: npt.NDArray[np.generic]


@dataclass
class Survey:
    """What `look` found.

    Args:
        inventory: Of all files, each a row.
        patterns: Patterns of the paths, most files first.
        extensions: Files and bytes of each extension.
        bytes_of: Bytes of each pattern, by its text.
        empty: First paths of files of no bytes.
        num_empty: All of those.
        probes: Rasters decoded of each pattern, by its text.
        damaged: Those that could not be.
    """

    inventory: Inventory
    patterns: list[Pattern]
    extensions: dict[str, tuple[int, int]] = field(default_factory=dict)
    bytes_of: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    num_empty: int = 0
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    damaged: list[Rejected] = field(default_factory=list)

    @property
    def num_files(self) -> int:
        """Regular files, in containers too."""
        return sum(pattern.count for pattern in self.patterns)

    def role(self, pattern: Pattern) -> str | None:
        """'s1', 's2', 'label', 'reference' or 'kind' where bands, words of the path or pixels say so; None for no raster."""
        if pattern.extension not in RASTERS:
            return None
        return self.named_role(pattern) or self._role_by_pixels(pattern)

    def named_role(self, pattern: Pattern) -> str | None:
        """What bands and words of the path say, whatever kind of file it is."""
        if pattern.bands:
            return "s1" if set(pattern.bands) <= {"VV", "VH"} else "s2"
        told: list[str] = []  # from the file's name up to the top folder: the last word of a path says most
        for piece in reversed(pattern.pieces[:-1]):
            text = next(iter(piece.values)).lower()
            if piece.kind == "satellite":
                told.append(text[:2])
            elif piece.kind == "text":
                told += [role for role, words in ROLE_WORDS.items() if text in words]
        return next((role for role in told if role in ("reference", "kind")), told[0] if told else None)

    def _role_by_pixels(self, pattern: Pattern) -> str | None:
        probes = self.probes.get(pattern.text)
        if not probes:
            return None
        first = probes[0].header
        if first.bands == 1 and not first.dtype.startswith("float"):
            return "label"
        return "s1" if first.bands <= 2 else "s2"

    def unreadable(self, what: str) -> UnreadableInputError:
        """The error for an archive none of whose rasters of a kind could be decoded."""
        return UnreadableInputError(
            f"{self.inventory.root}: none of the {what} files tried can be read; of {len(self.damaged)} bad rasters the "
            f"first is {self.damaged[0]}. Mend them; cut large ones into patches."
        )

    def entries(self, patterns: Sequence[Pattern]) -> Iterator[Entry]:
        """Every file of these patterns."""
        wanted = {number for pattern in patterns for number in pattern.numbers}
        for key in self.inventory.keys(_ROLE):
            if int(key.split("/")[0]) in wanted:
                yield from self.inventory.files(key)

    def find(self, pattern: Pattern, path: str) -> Entry:
        """The file at a path of this pattern."""
        keys = (_key(number, path) for number in pattern.numbers)
        return next(entry for key in keys for entry in self.inventory.files(key) if entry.path == path)

    def probe(self, entry: Entry) -> Probe | None:
        """Decodes a raster; None, and a line in `damaged`, where it cannot be."""
        try:
            data = self.inventory.read(entry)
            found = header(data, entry.path)
            pixels = decode(data, entry.path, DTYPES, None, None).pixels
            where = place(data, entry.path)
        except Rejected as rejected:
            self.damaged.append(rejected)
            return None
        finite = pixels[np.isfinite(pixels)]
        low, high = np.percentile(finite, (1, 99)) if finite.size else (np.nan, np.nan)
        return Probe(entry.path, found, where, float(low), float(high), pixels)


def look(root: Path, work: Path | None = None, allow_partial: bool = False, progress: Progress | None = None) -> Survey:
    """Finds all files of a folder and decodes a few of each kind.

    Args:
        root: The folder.
        work: As in `take_inventory`.
        allow_partial: As in `take_inventory`.
        progress: As in `take_inventory`.

    Raises:
        ArchiveMissingError: `root` is no folder.
        ArchiveEmptyError: there is no file in it.
        UnreadableInputError: a container is cut off, damaged, or lacks a part.
    """
    patterns = Patterns()
    inventory = take_inventory(root, lambda path: Match(_ROLE, _key(patterns.add(path), path)), work, allow_partial, progress)
    survey = Survey(inventory, patterns.merged())
    if not survey.patterns:
        raise ArchiveEmptyError(f"{root} holds no file, nor do containers in it; give the folder of an archive.")
    for pattern in survey.patterns:
        size = 0
        for entry in survey.entries([pattern]):
            size += entry.size
            if entry.size == 0:
                survey.num_empty += 1
                survey.empty += [entry.path] * (len(survey.empty) < NUM_NAMED)
        survey.bytes_of[pattern.text] = size
        files, total = survey.extensions.get(pattern.extension, (0, 0))
        survey.extensions[pattern.extension] = files + pattern.count, total + size
        if pattern.extension in RASTERS:
            paths = [path for of_band in pattern.examples.values() for path in of_band[:2]]
            probes = [survey.probe(survey.find(pattern, path)) for path in paths]
            survey.probes[pattern.text] = [probe for probe in probes if probe is not None]
    return survey


def _key(number: int, path: str) -> str:
    # Buckets, so that a path is found, and all are gone through, without all of them in memory.
    return f"{number:06d}/{zlib.crc32(path.encode()) % _BUCKETS:04d}"

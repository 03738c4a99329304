"""What the cube of the observatory says in sum: by class, by region, which places are worst; and, where truth is known, how
well it finds it.

Counts are whole numbers of pixels and of stored measures, so that any order of adding parts gives the same figures.
Layer 4. C classes.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import Runner, run_here
from cromss_dist.data.sample import MEASURE_ONE, Json, Sample, Uint8Array
from cromss_dist.data.staging import write_atomically
from cromss_dist.noise.detection import Cleaning, Detection, Scores, trivial_scores, without_nan
from cromss_dist.noise.observatory import AGREEMENT, LABEL_CONFIDENCE, SUGGESTED, SUGGESTED_CONFIDENCE, origin_of
from cromss_dist.noise.rule import Rule
from cromss_dist.schema import IGNORE, KIND_ARRAY, LABEL_ARRAY, REFERENCE_ARRAY

SUMMARY, CLASSES, REGIONS, CONFUSION, WORST = "summary.json", "classes.csv", "regions.csv", "confusion.csv", "worst.csv"
REGION_DEG = 10
NO_REGION = "unknown"
NUM_WORST = 100  # places that are listed
_LOCATIONS_A_JOB = 64

Counts = npt.NDArray[np.int64]


@dataclass(order=True)
class Place:
    """A location in the season in which most of its labels are suspicious."""

    suspicious: float  # share of its labelled pixels
    key: str
    season: int


class Tally:
    """Sums over the labelled pixels of some locations, of each class of the noisy label.

    Args:
        class_names: C of them.
    """

    COUNTED = ("pixels", "suspicious", "replaced", "dropped")
    MEASURED = (LABEL_CONFIDENCE, SUGGESTED_CONFIDENCE, AGREEMENT)
    FIELDS = (*COUNTED, *MEASURED)

    def __init__(self, class_names: Sequence[str]) -> None:
        num = len(class_names)
        self.class_names = tuple(class_names)
        self.by_class = np.zeros((len(self.FIELDS), num), np.int64)
        self.suggested = np.zeros((num, num), np.int64)  # rows the label: all labelled pixels
        self.replaced = np.zeros((num, num), np.int64)  # and those that the rule replaces
        self.by_region: dict[str, Counts] = {}  # int64 (FIELDS,)
        self.worst: list[Place] = []  # of those that have suspicious labels
        self.detection: Detection | None = None
        self.cleaning: Cleaning | None = None

    def add(self, sample: Sample, rule: Rule) -> None:
        """Counts a location of the cube."""
        arrays, num = sample.arrays, len(self.class_names)
        label, suggested = arrays[LABEL_ARRAY], arrays[SUGGESTED]
        verdict = rule.judge(label, suggested, arrays[LABEL_CONFIDENCE], arrays[SUGGESTED_CONFIDENCE])
        known = label != IGNORE
        of_label = label[known].astype(np.int64)
        dropped = known & (verdict.cleaned == IGNORE)
        counted = (known, verdict.suspicious, verdict.replaced, dropped)
        measured = (arrays[name] for name in self.MEASURED)
        # Sums of bytes: exact in float64, in which bincount adds weights.
        rows = np.stack([np.bincount(of_label, weights=of_pixel[known], minlength=num) for of_pixel in (*counted, *measured)])
        sums = rows.astype(np.int64)
        self.by_class += sums
        region = region_of(sample.metadata.get("lon"), sample.metadata.get("lat"))
        self.by_region[region] = self.by_region.get(region, 0) + sums.sum(1)
        pairs = label.astype(np.int64) * num + suggested
        for counts, where in ((self.suggested, known), (self.replaced, verdict.replaced)):
            counts += np.bincount(pairs[where], minlength=num * num).reshape(num, num)
        pixels, suspicious = known.sum((1, 2)), verdict.suspicious.sum((1, 2))
        shares = suspicious / np.maximum(pixels, 1)
        if suspicious.any():
            season = int(shares.argmax())
            self._keep_worst([Place(float(shares[season]), sample.key, season)])
        if REFERENCE_ARRAY in arrays:
            self._score(arrays, verdict.cleaned)

    def _score(self, arrays: dict[str, Uint8Array], cleaned: Uint8Array) -> None:
        label, reference = arrays[LABEL_ARRAY], arrays[REFERENCE_ARRAY]
        self.detection = self.detection or Detection(self.class_names)
        self.cleaning = self.cleaning or Cleaning()
        doubt = np.where(label == IGNORE, 0, MEASURE_ONE - arrays[LABEL_CONFIDENCE].clip(0, MEASURE_ONE)) / MEASURE_ONE
        scores: dict[str, Scores] = {LABEL_CONFIDENCE: doubt, AGREEMENT: 1 - arrays[AGREEMENT] / MEASURE_ONE}
        self.detection.add(label, reference, scores | trivial_scores(label), arrays.get(KIND_ARRAY))
        self.cleaning.add(label, cleaned, reference)

    def _keep_worst(self, places: Sequence[Place]) -> None:
        # Of equally bad ones the first keys, whatever the order in which they came.
        self.worst = sorted([*self.worst, *places], key=lambda place: (-place.suspicious, place.key))[:NUM_WORST]

    def __iadd__(self, other: Self) -> Self:
        self.by_class += other.by_class
        self.suggested += other.suggested
        self.replaced += other.replaced
        for region, sums in other.by_region.items():
            self.by_region[region] = self.by_region.get(region, 0) + sums
        self._keep_worst(other.worst)
        if other.detection is not None and other.cleaning is not None:
            self.detection = self.detection or Detection(self.class_names)
            self.detection += other.detection
            self.cleaning = self.cleaning or Cleaning()
            self.cleaning += other.cleaning
        return self


@dataclass(frozen=True)
class NoiseSummary:
    """What a cube says in sum, under a rule.

    Args:
        tally: Of all locations.
        rule: By which labels are called suspicious, and replaced.
        origin: Of the cube: dataset, model, run.
        observations: Digest of the cube.
    """

    tally: Tally
    rule: Rule
    origin: Json
    observations: str
    totals: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "totals", _figures(self.tally.by_class.sum(1)))

    def classes(self) -> list[dict[str, Any]]:
        """A row a class of the noisy label."""
        rows = []
        for value, name in enumerate(self.tally.class_names):
            others = np.delete(self.tally.suggested[value], value)
            instead = np.delete(np.array(self.tally.class_names), value)
            most = str(instead[others.argmax()]) if others.any() else None
            share = float(others.max() / others.sum()) if others.any() else math.nan
            figures = _figures(self.tally.by_class[:, value])
            rows.append({"class": name, **figures, "suggested_instead": most, "share_of_other_suggestions": share})
        return rows

    def regions(self) -> list[dict[str, Any]]:
        """A row a region, from north-west to south-east as their names sort."""
        return [{"region": name, **_figures(sums)} for name, sums in sorted(self.tally.by_region.items())]

    def confusion(self) -> list[dict[str, Any]]:
        """A row a pair of label and suggestion that occurs, the most frequent first; `replaced` of them by the rule."""
        names, suggested = self.tally.class_names, self.tally.suggested
        pairs = sorted(np.argwhere(suggested).tolist(), key=lambda pair: -int(suggested[tuple(pair)]))
        return [
            {
                "label": names[row],
                "suggested": names[column],
                "pixels": int(suggested[row, column]),
                "replaced": int(self.tally.replaced[row, column]),
            }
            for row, column in pairs
        ]

    def worst(self) -> list[dict[str, Any]]:
        """The places with the largest share of suspicious labels, in their worst season; none without any."""
        return [vars(place) for place in self.tally.worst]

    def to_json(self) -> dict[str, Any]:
        """All of it; null for what there is not."""
        tally = self.tally
        detection = None if tally.detection is None else {n: s.to_json() for n, s in tally.detection.scores().items()}
        told: dict[str, Any] = without_nan(
            {
                "origin": self.origin,
                "observations": self.observations,
                "rule": self.rule.to_json(),
                "all": self.totals,
                "classes": {row.pop("class"): row for row in self.classes()},
                "regions": {row.pop("region"): row for row in self.regions()},
                "detection": detection,
                "relabelling": tally.cleaning and tally.cleaning.to_json(),
            }
        )
        return told

    def write(self, folder: Path) -> None:
        """Writes `summary.json` and the tables as CSV into an existing folder."""
        write_atomically(folder / SUMMARY, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        classes, regions = self.classes(), self.regions()
        for name, columns, rows in (
            (CLASSES, classes[0], classes),
            (REGIONS, regions[0], regions),
            (CONFUSION, ("label", "suggested", "pixels", "replaced"), self.confusion()),
            (WORST, ("suspicious", "key", "season"), self.worst()),
        ):
            with (folder / name).open("w", newline="") as file:
                table = csv.DictWriter(file, list(columns), lineterminator="\n")
                table.writeheader()
                table.writerows({column: _cell(value) for column, value in row.items()} for row in rows)


def summarise(
    observations: StoredArchive, rule: Rule, run: Runner = run_here, progress: Callable[[int], None] | None = None
) -> NoiseSummary:
    """Reads a cube through.

    Args:
        observations: From `observe`.
        rule: By which labels are called suspicious, and replaced.
        run: Who reads.
        progress: Called with the number of locations that were read.

    Raises:
        ShardError: a byte of the cube is missing or changed.
    """
    keys = observations.keys
    jobs = [keys[first : first + _LOCATIONS_A_JOB] for first in range(0, len(keys), _LOCATIONS_A_JOB)]
    tally = Tally(observations.spec.values[0].values)
    for part in run(_tally, (observations, rule), jobs):
        tally += part.tally
        if progress:
            progress(part.num_locations)
    return NoiseSummary(tally, rule, origin_of(observations), observations.digest)


def region_of(lon: float | None, lat: float | None) -> str:
    """The cell of 10 by 10 degrees around a place, named by its south-western corner: 'N40 E010'; 'unknown' without a place."""
    if lon is None or lat is None:
        return NO_REGION
    south, west = (math.floor(degrees / REGION_DEG) * REGION_DEG for degrees in (lat, lon))
    return f"{'S' if south < 0 else 'N'}{abs(south):02d} {'W' if west < 0 else 'E'}{abs(west):03d}"


@dataclass(frozen=True)
class _Part:
    tally: Tally
    num_locations: int


def _tally(shared: tuple[StoredArchive, Rule], keys: tuple[str, ...]) -> _Part:
    observations, rule = shared
    tally = Tally(observations.spec.values[0].values)
    for key in keys:
        tally.add(observations.read(key), rule)
    return _Part(tally, len(keys))


def _figures(sums: Counts) -> dict[str, Any]:
    """Shares and means of sums over pixels; NaN without pixels."""
    pixels, *totals = sums.tolist()
    of = {name: total / pixels if pixels else math.nan for name, total in zip(Tally.FIELDS[1:], totals, strict=True)}
    shares = {f"{name}_share": of[name] for name in Tally.COUNTED[1:]}
    means = {f"mean_{name}": of[name] / MEASURE_ONE for name in Tally.MEASURED}
    return {"pixels": pixels, **shares, **means}


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return "" if value is None else value

"""From scores to what may be said: paired differences, whether the test can rank methods at all, and the gates.

Figures are points: 100 times a score. Differences are between runs of equal setting, seed and labelled tiles, never between
means, since which tiles are drawn moves a score more than most variants do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from benchmarks.method.plan import RANDOM, Transfer

METHOD, BASELINE, CEILING = "cromss", "plain", "clean"
POWER_POINTS = 3.0  # what clean labels must be worth for a test to rank methods
NOT_INFERIOR_POINTS = -3.0  # what a method may lose and count as not worse
PRETRAINED_POINTS = {"s2": 5.0, "s1": 4.0}  # a frozen encoder over a random one
PRECISION_OVER_BASE = 0.25  # average precision over the share of wrong labels
WRONG_IN_SELECTED = 0.6  # share of wrong labels in the selected half, over that in all
GATED_DETECTOR = "refined_s2"  # the label confidence that selection uses, of the stronger modality

Scored = Mapping[Transfer, float]  # points


@dataclass(frozen=True)
class Difference:
    """Of one variant to another.

    Args:
        pairs: Points, one a pair of runs.
    """

    pairs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of all pairs."""
        return fmean(self.pairs)

    @property
    def std(self) -> float:
        """Between pairs; 0 for a single one."""
        return stdev(self.pairs) if len(self.pairs) > 1 else 0.0

    @property
    def positive(self) -> int:
        """Pairs above 0."""
        return sum(pair > 0 for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        pairs = [round(pair, 2) for pair in self.pairs]
        return {"mean": round(self.mean, 2), "std": round(self.std, 2), "positive": self.positive, "pairs": pairs}

    def __str__(self) -> str:
        return f"{self.mean:+.1f} +- {self.std:.1f} ({self.positive} of {len(self.pairs)})"


def difference(scored: Scored, variant: str, against: str, settings: Iterable[str]) -> Difference:
    """`variant` minus `against` over the settings of these names, pair by pair.

    Raises:
        KeyError: one of a pair has no score.
    """
    wanted = set(settings)
    ours = [run for run in scored if run.variant == variant and run.setting.name in wanted]
    other = {(run.setting, run.seed, run.subset): points for run, points in scored.items() if run.variant == against}
    return Difference(tuple(scored[run] - other[run.setting, run.seed, run.subset] for run in ours))


@dataclass(frozen=True)
class Gate:
    """What has to hold.

    Args:
        claim: In words.
        value: What was measured.
        limit: What it is held against.
        at_least: Whether the value must not be below the limit; else not above.
    """

    claim: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        """Whether it does; a figure that is not there (NaN) holds nothing."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"claim": self.claim, "value": round(self.value, 4), "limit": self.limit, "holds": self.holds}


def gates(scored: Scored, detections: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """All of them.

    Args:
        scored: Every transfer.
        detections: Of the method, one a pretraining seed: detector -> `DetectorScores.to_json()`.
    """
    found = []
    for setting in dict.fromkeys(run.setting for run in scored):
        if setting.mode == "frozen":
            value = difference(scored, METHOD, RANDOM, [setting.name]).mean
            limit = PRETRAINED_POINTS[setting.modality]
            found.append(Gate(f"{setting.name}: {METHOD} over {RANDOM}, points mIoU", value, limit))
    of_detector = [detection[GATED_DETECTOR] for detection in detections]
    gain = fmean(one["overall"]["average_precision"] - one["overall"]["base_rate"] for one in of_detector)
    found.append(Gate("average precision of 'this label is wrong' over its base rate", gain, PRECISION_OVER_BASE))
    ratio = fmean(one["wrong_in_selected"] / one["overall"]["base_rate"] for one in of_detector)
    found.append(Gate("wrong labels in the selected half over those in all", ratio, WRONG_IN_SELECTED, at_least=False))
    return found


def power(scored: Scored) -> dict[str, Difference]:
    """Clean labels minus noisy ones, by setting: below `POWER_POINTS` a setting cannot rank methods."""
    return {name: difference(scored, CEILING, BASELINE, [name]) for name in dict.fromkeys(run.setting.name for run in scored)}


def in_words(scored: Scored) -> list[str]:
    """What the transfer says of the method, and whether it can say anything."""
    by_setting = power(scored)
    able = [name for name, clean in by_setting.items() if clean.mean >= POWER_POINTS]
    worth = ", ".join(f"{name} {clean}" for name, clean in by_setting.items())
    lines = [f"Clean labels over {BASELINE} in transfer, points mIoU (pairs above 0): {worth}."]
    if able:
        lines.append(
            f"Settings in which clean labels are worth {POWER_POINTS:g} points, and methods can be ranked: {', '.join(able)}."
        )
    else:
        lines.append(f"**This test cannot rank methods**: in no setting are clean labels worth {POWER_POINTS:g} points.")
    variants = dict.fromkeys(run.variant for run in scored if run.variant not in (RANDOM, BASELINE, CEILING))
    for variant in variants:
        overall = difference(scored, variant, BASELINE, by_setting)
        where = f"; where methods can be ranked {difference(scored, variant, BASELINE, able)}" if able else ""
        verdict = "not worse" if overall.mean >= NOT_INFERIOR_POINTS else "worse"
        lines.append(
            f"{variant} over {BASELINE}: in all settings {overall}{where}: {verdict} by more than {-NOT_INFERIOR_POINTS:g} points."
        )
    return lines

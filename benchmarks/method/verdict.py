"""From scores to what may be said: paired differences, whether the test can rank methods at all, and the gates.

Differences are between runs of equal setting, seed and labelled tiles (`cromss_dist.transfer.compare`), never between means:
which tiles are drawn moves a score more than most variants do. They are shares; what is told of them are points, 100 times that.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

from benchmarks.method.plan import RANDOM, Setting
from cromss_dist.transfer.compare import Difference, compare
from cromss_dist.transfer.results import TransferResult
from cromss_dist.transfer.statistics import Resampling, Spread

METHOD, BASELINE, CEILING = "cromss", "plain", "clean"
POWER_POINTS = 3.0  # what clean labels must be worth, at least, for a setting to rank methods
POWER_ERRORS = 2.0  # and how many standard errors their worth must exceed: else it may be chance
MARGIN_POINTS = 3.0  # what a method may lose and count as not worse
PRETRAINED_POINTS = {"s2": 5.0, "s1": 4.0}  # a frozen encoder over a random one
PRECISION_OVER_BASE = 0.25  # average precision over the share of wrong labels
WRONG_IN_SELECTED = 0.6  # share of wrong labels in the selected half, over that in all
GATED_DETECTOR = "refined_s2"  # the label confidence that selection uses, of the stronger modality

Differences: TypeAlias = Mapping[Setting, Mapping[tuple[str, str], Difference]]
"""Of mean IoU over common classes: setting -> (variant, what it is held against) -> paired difference."""


def paired_differences(
    results: Mapping[Setting, Sequence[TransferResult]], common: Sequence[str], resampling: Resampling
) -> dict[Setting, dict[tuple[str, str], Difference]]:
    """What there is to tell of variants: each against no pretraining, against plain, and against the method, no pair twice.

    Args:
        results: Of each setting all runs.
        common: Names of the classes that count.
        resampling: Of the intervals over tiles.

    Raises:
        ResultError: results cannot be compared.
    """
    told: dict[Setting, dict[tuple[str, str], Difference]] = {}
    for setting, runs in results.items():
        told[setting], rest = {}, list(runs)
        for against in (RANDOM, BASELINE, METHOD):
            other, rest = [r for r in rest if r.name == against], [r for r in rest if r.name != against]
            for comparison in compare(rest, other, resampling, common):
                told[setting][comparison.first, comparison.second] = comparison.metrics["miou"]
    return told


def pairs_of(differences: Differences, variant: str, settings: Iterable[Setting]) -> tuple[float, ...]:
    """A variant minus plain pretraining: all pairs of some settings; shares."""
    return tuple(pair for setting in settings for pair in differences[setting][variant, BASELINE].pairs)


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


def gates(differences: Differences, detections: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """All of them.

    Args:
        differences: Of the transfer.
        detections: Of the method, one a pretraining seed: detector -> `DetectorScores.to_json()`.
    """
    found = [
        Gate(
            f"{setting.name}: {METHOD} over {RANDOM}, points mIoU",
            100 * of[METHOD, RANDOM].spread.mean,
            PRETRAINED_POINTS[setting.modality],
        )
        for setting, of in differences.items()
        if setting.mode == "frozen"
    ]
    of_detector = [detection[GATED_DETECTOR] for detection in detections]
    gain = fmean(one["overall"]["average_precision"] - one["overall"]["base_rate"] for one in of_detector)
    found.append(Gate("average precision of 'this label is wrong' over its base rate", gain, PRECISION_OVER_BASE))
    ratio = fmean(one["wrong_in_selected"] / one["overall"]["base_rate"] for one in of_detector)
    found.append(Gate("wrong labels in the selected half over those in all", ratio, WRONG_IN_SELECTED, at_least=False))
    return found


def able_settings(differences: Differences) -> list[Setting]:
    """The settings that can rank methods: clean labels are worth `POWER_POINTS` and more than `POWER_ERRORS` standard errors.

    A single pair has no standard error, and so ranks nothing.
    """
    return [setting for setting, of in differences.items() if _is_able(of[CEILING, BASELINE].spread)]


def _is_able(worth: Spread) -> bool:
    error = worth.std / math.sqrt(worth.runs) if worth.runs else math.nan
    return 100 * worth.mean >= POWER_POINTS and worth.mean > POWER_ERRORS * error


def in_words(differences: Differences) -> list[str]:
    """What the transfer says of the methods, and whether it can say anything."""
    able = able_settings(differences)
    needed = f"at least {POWER_POINTS:g} points on the mean of the pairs, and more than {POWER_ERRORS:g} standard errors of it"
    worth = ", ".join(f"{setting.name} {points(of[CEILING, BASELINE].pairs)}" for setting, of in differences.items())
    lines = [f"What there is to win, clean labels over {BASELINE}, points mIoU (pairs above 0): {worth}."]
    if able:
        names = ", ".join(setting.name for setting in able)
        lines.append(f"Settings that can rank methods, since clean labels are worth {needed}: {names}.")
    else:
        lines.append(f"**This test cannot rank methods**: in no setting are clean labels worth {needed}.")
    variants = dict.fromkeys(variant for of in differences.values() for variant, against in of if against == BASELINE)
    for variant in variants:
        if variant == CEILING:
            continue
        overall = pairs_of(differences, variant, differences)
        told = [f"all settings {points(overall)}"]
        if able:
            told.append(f"those that can rank {points(pairs_of(differences, variant, able))}")
        verdict = "not worse" if 100 * fmean(overall) >= -MARGIN_POINTS else "worse"
        lines.append(f"{variant} over {BASELINE}: {', '.join(told)}; {verdict} by more than {MARGIN_POINTS:g} points.")
    return lines


def points(pairs: Sequence[float]) -> str:
    """Mean, spread and signs of paired differences: '+1.0 +- 2.0 (2 of 3)'."""
    spread = Spread.of(pairs)
    between = "" if spread.runs < 2 else f" +- {100 * spread.std:.1f}"
    return f"{100 * spread.mean:+.1f}{between} ({sum(pair > 0 for pair in pairs)} of {len(pairs)})"

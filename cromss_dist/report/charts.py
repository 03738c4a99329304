"""Which figures of runs are drawn together, in which order and under which title.

Layer 4. A metric's name says what it is: `train/kept_s1/water` is `train/kept` of S1 for water. Lines of one chart differ in
run and modality, charts of one group in the metric or the class. Metrics that are not named here come last.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cromss_dist.report.run_record import RunRecord, Series

_METRIC = re.compile(r"(?P<base>.+?)(?:_(?P<modality>s1|s2))(?:/(?P<part>.+))?|(?P<plain>\w+/(?:iou|accuracy|f1))/(?P<of>.+)")
_GROUPS: dict[str, dict[str, str]] = {
    "Loss": {
        "train/loss/total": "Training loss",
        "val/loss/total": "Validation loss",
        "train/loss/segmentation": "Segmentation, training",
        "train/loss/consistency": "Consistency, training",
        "val/loss/segmentation": "Segmentation, validation",
        "val/loss/consistency": "Consistency, validation",
        "train/loss/ce": "Cross entropy, training",
        "train/loss/dice": "Dice, training",
        "train/loss/focal": "Focal, training",
    },
    "Scores of the held-out locations": {
        "val/miou": "mIoU against the labels",
        "val/reference_miou": "mIoU against the reference",
        "val/accuracy": "Overall accuracy against the labels",
        "val/reference_accuracy": "Overall accuracy against the reference",
    },
    "Agreement and selection": {
        "train/agreement": "Pixels where S1 and S2 predict the same",
        "train/kept": "Mean selection weight",
        "train/selected_share": "Share of pixels that is kept whole",
        "train/reliability": "Reliability",
    },
    "Rate and speed": {
        "train/lr": "Learning rate",
        "train/grad_norm": "Gradient norm before clipping",
        "perf/samples_per_s": "Samples per second",
        "perf/data_wait_s": "Wait for data, seconds a step",
        "perf/memory_gib": "Peak memory, GiB",
    },
}
_TITLES = {base: title for titles in _GROUPS.values() for base, title in titles.items()} | {
    "val/iou": "IoU against the labels",
    "val/reference_iou": "IoU against the reference",
}
_SHARE = re.compile(r".*/(?:reference_)?(?:miou|mf1|oa|aa|accuracy|iou|f1|agreement|kept|selected_share|reliability)")
_HIDDEN = ("train/epoch", "test/")  # a line with a slope of one; scores that are no lines
OTHERS = "Other figures"


@dataclass(frozen=True)
class Line:
    """A figure of one run and one modality."""

    run: int  # place among the runs
    modality: str  # 's1', 's2' or ''
    series: Series


@dataclass(frozen=True)
class Chart:
    """Lines over the samples seen.

    Args:
        key: Distinct among the charts of a page.
        title: What it shows.
        lines: At least one.
        share: Whether it is in [0, 1] and is read in percent.
        small: Whether it is one of many alike, such as one a class.
    """

    key: str
    title: str
    lines: tuple[Line, ...]
    share: bool = False
    small: bool = False


@dataclass(frozen=True)
class ChartGroup:
    """Charts that are shown under one heading."""

    title: str
    charts: tuple[Chart, ...]


def chart_groups(runs: Sequence[RunRecord]) -> tuple[ChartGroup, ...]:
    """All figures of the runs as charts; groups that have none are left out."""
    lines: dict[tuple[str, str], list[Line]] = {}
    for number, run in enumerate(runs):
        for name, series in run.series.items():
            base, modality, part = split_metric(name)
            if not base.startswith(_HIDDEN):
                lines.setdefault((base, part), []).append(Line(number, modality, series))
    groups = [ChartGroup(title, tuple(_charts(lines, titles))) for title, titles in _GROUPS.items()]
    groups += [_by_class(lines, base) for base in dict.fromkeys(base for base, part in lines if part)]
    rest = {base: base for base, part in lines if not part and base not in _TITLES}
    groups.append(ChartGroup(OTHERS, tuple(_charts(lines, rest))))
    return tuple(group for group in groups if group.charts)


def split_metric(name: str) -> tuple[str, str, str]:
    """Metric, modality and class of a name; '' where it has none."""
    match = _METRIC.fullmatch(name)
    if match is None:
        return name, "", ""
    return match["base"] or match["plain"], match["modality"] or "", match["part"] or match["of"] or ""


def _charts(lines: dict[tuple[str, str], list[Line]], titles: dict[str, str]) -> Iterator[Chart]:
    for base, title in titles.items():
        if (base, "") in lines:
            yield Chart(base, title, tuple(lines[base, ""]), _is_share(base))


def _is_share(base: str) -> bool:
    return _SHARE.fullmatch(base) is not None


def _by_class(lines: dict[tuple[str, str], list[Line]], base: str) -> ChartGroup:
    charts = (
        Chart(f"{base}/{part}", part.replace("_", " "), tuple(of_class), _is_share(base), small=True)
        for (metric, part), of_class in lines.items()
        if metric == base and part
    )
    return ChartGroup(f"{_TITLES.get(base, base)}, by class", tuple(charts))

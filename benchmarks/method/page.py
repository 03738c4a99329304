"""The findings as a page of Markdown tables and as a figure. Scores are percent, differences are points."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.method.findings import Findings
from benchmarks.method.plan import RANDOM, Setting, pretraining_of
from benchmarks.method.verdict import BASELINE, CEILING, METHOD, POWER_POINTS, in_words, points
from cromss_dist.noise.detection import STRATA
from cromss_dist.schema import CLASS_NAMES, NOISE_KINDS
from cromss_dist.train.figures.scores import Metric
from cromss_dist.transfer.statistics import Spread

_COLOURS = {RANDOM: "#8c8c8c", BASELINE: "#4c72b0", METHOD: "#c44e52", CEILING: "#55a868"}
_OTHER_COLOURS = ("#8172b3", "#ccb974", "#64b5cd")
_TRIVIAL = ("other_seasons", "near_border")


def page(found: Findings) -> list[str]:
    """All tables, as lines."""
    return [
        *_verdict(found),
        *_data(found),
        *_segmenters(found),
        *_detection(found),
        *_relabelling(found),
        *_transfer(found),
        *_differences(found),
    ]


def _verdict(found: Findings) -> list[str]:
    rows = []
    for gate in found.gates:
        limit = f"{'at least' if gate.at_least else 'at most'} {gate.limit:g}"
        rows.append((gate.claim, f"{gate.value:.2f}", limit, "yes" if gate.holds else "**no**"))
    lines = [f"- {line}" for line in in_words(found.differences)]
    return ["## In short", "", *_table(("gate", "measured", "limit", "holds"), rows), *lines, ""]


def _data(found: Findings) -> list[str]:
    reports = [found.data[name]["report"] for name in ("pretraining-default", "test-default")]
    rows = [
        (name, *(_percent(report[key][name]) for report in reports for key in ("class_shares", "noise_by_class")))
        for name in CLASS_NAMES
    ]
    rows.append(("all", *(text for report in reports for text in ("100.0", _percent(report["noise_rate"])))))
    kinds = ", ".join(f"{kind} {_percent(reports[0]['noise_by_kind'][kind])}" for kind in NOISE_KINDS[1:])
    header = ("class", "share to pretrain on", "wrong there", "share to test on", "wrong there")
    agree, wrong_there = (_percent(reports[0][key]) for key in ("seasons_agree", "noise_where_seasons_agree"))
    near = [(name, _percent(of["oa"]), _percent(of["miou"])) for name, of in found.separability.items()]
    return [
        "## Data",
        "",
        *_table(header, rows),
        f"Wrong labels to pretrain on by kind, percent of the pixels: {kinds}. All seasons agree on {agree} % of the pixels; of "
        f"these {wrong_there} % are wrong in a season or more. Common classes, for the headline: {', '.join(found.common)}.",
        "",
        "25 nearest neighbours of single pixels, clouds included; where these are high, every method reaches the same:",
        "",
        *_table(("modality", "accuracy", "mIoU"), near),
    ]


def _segmenters(found: Findings) -> list[str]:
    rows = []
    for variant in found.size.variants:
        of_seeds = [found.segmenters[pretraining_of(variant, seed).name] for seed in range(found.size.seeds)]
        miou = [_spread([scores[branch].mean_iou for scores in of_seeds]) for branch in ("s1", "s2", "mean")]
        accuracy = _spread([scores["mean"].overall_accuracy for scores in of_seeds])
        lost = _spread([scores["s2"].iou["shrub"] for scores in of_seeds]) if "shrub" in found.common else "-"
        rows.append((variant, *miou, accuracy, lost))
    header = ("variant", "S1 mIoU", "S2 mIoU", "mean of both, mIoU", "mean of both, accuracy", "S2 IoU of shrub")
    return [
        "## The pretrained segmenters themselves, against the truth of the test places",
        "",
        "Common classes; mean +- std over pretraining seeds. S1 sees little of shrub: what consistency costs shows there.",
        "",
        *_table(header, rows),
    ]


def _first_seeds(found: Findings) -> dict[str, str]:
    """What a table calls a pretraining -> its name; of each variant and control the first seed."""
    variants = {variant: pretraining_of(variant, 0).name for variant in found.size.variants}
    return variants | {f"{METHOD}, {noise} noise": f"{METHOD}-{noise}-0" for noise in found.size.controls}


def _detection(found: Findings) -> list[str]:
    rows = []
    for shown, name in _first_seeds(found).items():
        of_archive = shown == METHOD or "noise" in shown  # detectors without a model are the same for all variants
        for detector, told in found.detection[name].items():
            if detector not in _TRIVIAL:
                rows.append(_detector_row(shown, detector, told))
            elif of_archive:
                rows.append(_detector_row(f"none{shown.removeprefix(METHOD)}", detector, told))
    groups = [f"{group.replace('_', ' ')} (base)" for group in (*NOISE_KINDS[1:], *STRATA)]
    return [
        "## 'This label is wrong', on the labels of the test places",
        "",
        "Average precision (AP) of 1 - label confidence, beside the share of wrong labels (base), which a detector without merit "
        "reaches; first seed. By kind: wrong labels of that kind among those and the right ones. Last: wrong labels in the half "
        "of each class that is suspected least, and in the other. refined: as selection refines it; both: mean of S1's and S2's; "
        "other seasons, near border: what needs no model.",
        "",
        *_table(("pretraining", "detector", "AP", "base", *groups, "wrong in selected", "wrong in rest"), rows),
    ]


def _detector_row(shown: str, detector: str, told: dict[str, Any]) -> tuple[str, ...]:
    def cell(of: dict[str, Any] | None) -> str:
        known = of is not None and of["average_precision"] is not None
        return f"{_percent(of['average_precision'])} ({_percent(of['base_rate'])})" if of and known else "-"

    overall = told["overall"]
    groups = [*(told["by_kind"].get(kind) for kind in NOISE_KINDS[1:]), *(told["by_stratum"].get(name) for name in STRATA)]
    halves = (_percent(told["wrong_in_selected"]), _percent(told["wrong_in_rest"]))
    base = (_percent(overall["average_precision"]), _percent(overall["base_rate"]))
    return (shown, detector.replace("_", " "), *base, *(cell(group) for group in groups), *halves)


def _relabelling(found: Findings) -> list[str]:
    rows = []
    for shown, name in _first_seeds(found).items():
        for rule, told in found.relabelling[name].items():
            shares = (told[of] / told["pixels"] if told["pixels"] else None for of in ("dropped", "mended", "spoilt"))
            rates = (told["noise_before"], told["noise_after"])
            rows.append((shown, rule, *(_percent(share) for share in (*rates, *shares))))
    header = ("pretraining", "rule", "wrong before", "wrong after", "dropped", "mended", "spoilt")
    return [
        "## Relabelling, of the same labels",
        "",
        "As `cromss noise relabel` does it with its default thresholds, percent of the labels; wrong after: of those that are "
        "left. First seed.",
        "",
        *_table(header, rows),
    ]


def _transfer(found: Findings) -> list[str]:
    header = ("encoder", *(setting.name for setting in found.results))
    lines = ["## Transfer: a new decoder trained with few clean labels", ""]
    figures: tuple[tuple[str, Metric, Sequence[str] | None], ...] = (
        ("mIoU over common classes", "miou", found.common),
        ("mIoU over all classes", "miou", None),
        ("Overall accuracy", "oa", None),
    )
    for title, metric, among in figures:
        rows = [
            (variant, *(_spread([s.metric(metric) for s in found.scores(setting, variant, among)]) for setting in found.results))
            for variant in (RANDOM, *found.size.variants)
        ]
        lines += [f"{title}, mean +- std over seeds and choices of labelled tiles:", "", *_table(header, rows)]
    return lines


def _differences(found: Findings) -> list[str]:
    header = ("", *(setting.name for setting in found.results))
    pairs = dict.fromkeys(pair for of in found.differences.values() for pair in of)
    rows = [
        (f"{first} - {second}", *(points(found.differences[setting][first, second].pairs) for setting in found.results))
        for first, second in pairs
    ]
    return [
        "## Paired differences",
        "",
        "Points of mIoU over common classes between runs of equal seed and labelled tiles: mean +- std, and pairs above 0.",
        "",
        *_table(header, rows),
    ]


def draw(found: Findings) -> Figure:
    """Scores by setting, each run a dot; beside them the paired differences to plain pretraining."""
    variants = (RANDOM, *found.size.variants)
    spare = iter(_OTHER_COLOURS)
    colours = {variant: _COLOURS.get(variant) or next(spare) for variant in variants}
    settings = list(found.results)
    figure = Figure((13, 1.4 + 0.95 * len(settings)), layout="constrained")
    scores, differences = figure.subplots(1, 2, sharey=True)
    step = 0.8 / len(variants)
    for row, setting in enumerate(settings):
        for number, variant in enumerate(variants):
            at, colour = row + (number - (len(variants) - 1) / 2) * step, colours[variant]
            label = variant if row == 0 else ""
            _dots(scores, [100 * s.mean_iou for s in found.scores(setting, variant, found.common)], at, colour, label)
            if variant not in (RANDOM, BASELINE):
                pairs = found.differences[setting][variant, BASELINE].pairs
                _dots(differences, [100 * pair for pair in pairs], at, colour, "")
    scores.set_yticks(range(len(settings)), [_label(setting) for setting in settings])
    scores.invert_yaxis()
    scores.set_xlabel("mIoU over common classes, %")
    differences.axvline(0, color="#444444", lw=0.8)
    differences.axvline(POWER_POINTS, color=colours[CEILING], lw=0.8, ls=":")
    differences.set_xlabel(f"points over {BASELINE}, same seed and tiles (dotted: what clean labels must be worth)")
    for axes in (scores, differences):
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for row in range(1, len(settings)):
            axes.axhline(row - 0.5, color="#eeeeee", lw=0.8)
    figure.legend(loc="outside upper center", ncols=len(variants), frameon=False)
    return figure


def _dots(axes: Axes, values: Sequence[float], at: float, colour: str, label: str) -> None:
    axes.plot(values, np.full(len(values), at), "o", ms=3.5, color=colour, alpha=0.45, mec="none")
    axes.plot([np.mean(values)], [at], "|", ms=11, mew=2.5, color=colour, label=label or None)


def _label(setting: Setting) -> str:
    return f"{setting.modality.upper()} {setting.mode}\n{setting.labels} tiles, {setting.decoder}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _spread(shares: Sequence[float]) -> str:
    spread = Spread.of(shares)
    between = "" if math.isnan(spread.std) else f" +- {100 * spread.std:.1f}"
    return f"{100 * spread.mean:.1f}{between}"

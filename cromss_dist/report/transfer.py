"""The report's sections on transfer: scores with spread and interval, paired differences, the paper's figures, classes and tiles.

Layer 4. All scores are in percent. A spread is over repeated runs, an interval over test tiles; see transfer/statistics.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from cromss_dist.errors import ResultError
from cromss_dist.report.figures import Bar, draw_confusion, draw_histogram, draw_intervals
from cromss_dist.report.page import Drawing, Part, Section
from cromss_dist.report.tables import NONE, Table, duration, number, percent
from cromss_dist.train.figures.scores import Metric, metric_values
from cromss_dist.transfer.compare import Comparison, Line, Setting, compare, summarise
from cromss_dist.transfer.paper import PAPER, Published, published
from cromss_dist.transfer.results import Tiles, TransferResult, read_tiles

_METRIC_TITLES: dict[Metric, str] = {"miou": "mIoU", "oa": "OA", "aa": "AA", "mf1": "mF1"}
_NUM_CONFUSIONS = _NUM_WORST = 8  # rows of a table
_MOST_OPEN = 2  # confusion matrices that are not folded
_HOW = (
    "OA: share of the labelled pixels that are right. AA, mIoU and mF1: means over the classes that occur in the labels. "
    "± is the standard deviation over repeated runs; brackets are the 95 % interval of the mean over test tiles (bootstrap)."
)


def transfer_sections(results: Sequence[TransferResult]) -> Iterator[Section]:
    """How encoders did downstream; nothing where there is no result.

    Args:
        results: As read from their folders.

    Raises:
        ResultError: results of one encoder and setting do not belong together, or their tiles are damaged.
    """
    if not results:
        return
    lines = summarise(results)
    parts = [Part(text=_HOW, tables=(_scores(lines),), drawings=tuple(_intervals(lines)))]
    parts += [Part("Paired differences", *_differences(results)), *_beside_the_paper(lines)]
    parts.append(_every_run(results))
    yield Section("transfer", "Transfer", tuple(part for part in parts if part.text or part.tables))
    by_setting = [(str(setting), list(of_setting)) for setting, of_setting in groupby(lines, key=lambda line: line.setting)]
    yield Section("scores-by-class", "Transfer by class", tuple(_class_part(name, of) for name, of in by_setting))
    details = [_details(line, len(lines) > _MOST_OPEN) for line in lines]
    yield Section("confusion", "Confusion and tiles", tuple(details))


def _scores(lines: Sequence[Line]) -> Table:
    rows = []
    for line in lines:
        of, miou = line.setting, line.interval["miou"]
        scores = [_with_spread(line.spread[m].mean, line.spread[m].std) for m in _METRIC_TITLES]
        scores[0] += f" [{percent(miou.low)}, {percent(miou.high)}]"
        rows.append(
            (line.name, of.task, of.modality, of.mode, of.protocol, of.decoder or NONE, of.labels, str(len(line.runs)), *scores)
        )
    header = ("encoder", "task", "input", "mode", "protocol", "decoder", "labels", "runs", *_METRIC_TITLES.values())
    notes = (f"{line.name} ({line.setting}): {note}" for line in lines for note in line.notes)
    return Table("Scores on the test set in %", header, tuple(rows), " ".join(notes))


def _intervals(lines: Sequence[Line]) -> Iterator[Drawing]:
    for task, of_task in groupby(lines, key=lambda line: line.setting.task):
        alike = list(of_task)
        rows = [_bar(line, _different([line.setting for line in alike])) for line in alike]
        told = " ".join(map(_told, rows))
        note = "Dot: mean over runs; small dots: runs; bar: 95 % interval over test tiles."
        if any(row.published is not None for row in rows):
            note += " Diamond: the paper's CromSS with as many bands, the same encoder and decoder."
        title = f"mIoU on {task} in %"
        yield Drawing(f"miou-{task}", title, f"{title}. {told}", partial(_draw_intervals, rows, title), "wide", note)


def _told(row: Bar) -> str:
    interval = "no interval" if math.isnan(row.low) else f"interval {row.low:.1f} to {row.high:.1f}"
    return f"{row.label}: {row.value:.1f}, {interval}."


def _draw_intervals(rows: Sequence[Bar], title: str, alone: bool) -> Figure:
    return draw_intervals(rows, "mIoU, %", title if alone else "")


def _different(settings: Sequence[Setting]) -> list[str]:
    """The fields that are not the same in all."""
    return [field.name for field in fields(Setting) if len({getattr(setting, field.name) for setting in settings}) > 1]


def _tell(setting: Setting, different: Sequence[str]) -> str:
    return ", ".join(str(getattr(setting, name)) for name in different if getattr(setting, name))


def _bar(line: Line, different: Sequence[str]) -> Bar:
    miou = line.interval["miou"]
    label = ", ".join(filter(None, (line.name, _tell(line.setting, different))))
    runs = tuple(100 * run.scores.mean_iou for run in line.runs)
    theirs = next((one.value for one in _published(line) if one.method.startswith("CromSS") and _is_alike(line, one)), None)
    return Bar(label, 100 * miou.value, 100 * miou.low, 100 * miou.high, runs, theirs)


def _published(line: Line) -> tuple[Published, ...]:
    return published(line.setting.task, line.setting.modality, line.setting.mode)


def _is_alike(line: Line, one: Published) -> bool:
    """Whether a published figure is of the same bands and networks, and of all labels."""
    used, of = line.runs[0].encoders[one.modality], line.setting
    return (len(used.bands), used.encoder, of.decoder, of.labels) == (one.bands, one.encoder, one.decoder, "all")


def _differences(results: Sequence[TransferResult]) -> tuple[str, tuple[Table, ...]]:
    """What pairs of runs that differ in nothing but the encoder say; and in which settings there is none, and why."""
    found: list[Comparison] = []
    told: list[str] = []
    for setting, of_setting in groupby(sorted(results, key=Setting.of), Setting.of):
        alike = list(of_setting)
        if len({result.name for result in alike}) == 1:
            continue
        try:
            found += compare(alike, alike)
        except ResultError as error:
            told.append(f"None in {setting}: {error}")
    better = [
        c for c in found if c.metrics["miou"].spread.mean > 0 or (c.metrics["miou"].spread.mean == 0 and c.first < c.second)
    ]
    if not better:
        return " ".join(told), ()
    different = _different([one.setting for one in better])
    header = ("encoder", "against", "setting", "pairs", "mIoU", "better in", "worse in", "interval over tiles", "OA", "mF1")
    note = "Runs of a pair have the same labelled tiles, seeds, steps and test set. ± is over pairs."
    if alone := sum(one.alone for one in better):
        note += f" Runs without a partner of the same seeds are left out: {alone}."
    rows = tuple(_difference(one, different) for one in better)
    return " ".join(told), (Table("Differences in points, the better encoder first", header, rows, note),)


def _difference(found: Comparison, different: Sequence[str]) -> tuple[str, ...]:
    miou = found.metrics["miou"]
    return (
        found.first,
        found.second,
        _tell(found.setting, different) or str(found.setting),
        str(miou.spread.runs),
        _with_spread(miou.spread.mean, miou.spread.std, sign=True),
        str(miou.positive),
        str(miou.negative),
        f"[{_signed(miou.interval.low)}, {_signed(miou.interval.high)}]",
        *(_with_spread(found.metrics[m].spread.mean, found.metrics[m].spread.std, sign=True) for m in ("oa", "mf1")),
    )


def _beside_the_paper(lines: Sequence[Line]) -> Iterator[Part]:
    rows: list[tuple[str, ...]] = []
    for of, alike in groupby(lines, key=lambda line: line.setting):
        theirs = published(of.task, of.modality, of.mode)
        for line in alike if theirs else ():
            (used,) = line.runs[0].encoders.values()
            what = (line.name, str(len(used.bands)), used.encoder, of.decoder or NONE, of.labels, of.protocol)
            rows.append(
                (of.task, of.modality, of.mode, "here", *what, _with_spread(line.spread["miou"].mean, line.spread["miou"].std))
            )
        for one in theirs:
            value = f"{one.value:.2f}" if one.std is None else f"{one.value:.2f} ± {one.std:.2f}"
            what = (one.method, str(one.bands), one.encoder, one.decoder, "all", "paper")
            rows.append((one.task, one.modality, one.mode, "paper", *what, value))
    if rows:
        header = ("task", "input", "mode", "from", "encoder", "bands", "network", "decoder", "labels", "protocol", "mIoU")
        note = f"{PAPER}. Only figures of protocol 'paper', with all labels and the same networks, are measured as theirs."
        yield Part("Beside the paper", tables=(Table("mIoU in %", header, tuple(dict.fromkeys(rows)), note),))


def _every_run(results: Sequence[TransferResult]) -> Part:
    """What each run was, and on what."""
    header = ("run", "encoders", "bands", "version", "card", "seed", "labelled tiles", "label seed", "trained on", "tested on",
              "tiles", "steps", "time", "mIoU")  # fmt: skip
    rows = []
    for run in results:
        used = list(run.encoders.values())
        what = [run.run_dir.name, " + ".join(run.encoder_refs), " + ".join(" ".join(one.bands) for one in used)]
        what += [
            " + ".join(filter(None, of_each)) or NONE
            for of_each in ([e.version for e in used], [e.card_sha256[:12] for e in used])
        ]
        what += [str(run.seed), f"{run.labels.tiles:,}", str(run.labels.seed), run.train_digest[:12], run.test_digest[:12]]
        rows.append((*what, f"{run.tiles:,}", f"{run.steps:,}", duration(run.seconds), percent(run.scores.mean_iou)))
    return Part("Every run", tables=(Table("Runs; digests by their first 12 digits", header, tuple(rows)),), folded=True)


def _class_part(setting: str, lines: Sequence[Line]) -> Part:
    first = lines[0].runs[0]
    pixels = first.matrix.sum(1)
    rows = [
        (
            name.replace("_", " "),
            percent(float(count / max(pixels.sum(), 1))),
            *(_with_spread(line.iou[name].mean, line.iou[name].std) for line in lines),
        )
        for name, count in zip(first.class_names, pixels, strict=True)
    ]
    table = Table("IoU in %", ("class", "share of labelled pixels", *(line.name for line in lines)), tuple(rows))
    return Part(setting, tables=(table,))


def _details(line: Line, folded: bool) -> Part:
    """The confusion matrix and the tiles of one line, its runs together."""
    names = line.runs[0].class_names
    tiles = [read_tiles(run) for run in line.runs]
    per_tile: npt.NDArray[np.int64] = np.sum([one.confusion for one in tiles], 0, dtype=np.int64)
    total = per_tile.sum(0)
    accuracy = metric_values(per_tile)["oa"]
    title = f"{line.name}: {line.setting}"
    confusions = _confusions(total, names)
    worst = " ".join(f"{row[0]} taken for {row[1]}: {row[2]} %." for row in confusions.rows)
    of_all = float(metric_values(total)["oa"])
    drawings = (
        Drawing(
            f"confusion-{title}",
            "Predictions by label, % of the label's pixels",
            f"Confusion matrix of {title}. {worst}",
            partial(_draw_confusion, total, names, title),
            "large",
        ),
        Drawing(
            f"tiles-{title}",
            "Tiles by overall accuracy, %",
            f"Histogram of {len(accuracy)} tiles by overall accuracy; of all together {percent(of_all)} %.",
            partial(_draw_tiles, accuracy, of_all, title),
            note="Line: all tiles' pixels together.",
        ),
    )
    return Part(title, tables=(confusions, _worst_tiles(tiles[0], per_tile, names)), drawings=drawings, folded=folded)


def _draw_confusion(total: npt.NDArray[np.int64], names: Sequence[str], title: str, alone: bool) -> Figure:
    return draw_confusion(total, names, title if alone else "")


def _draw_tiles(accuracy: npt.NDArray[np.float64], of_all: float, title: str, alone: bool) -> Figure:
    return draw_histogram(accuracy, of_all, f"Overall accuracy of tiles, {title}" if alone else "")


def _confusions(total: npt.NDArray[np.int64], names: Sequence[str]) -> Table:
    shares = total / np.maximum(total.sum(1, keepdims=True), 1)
    pairs = [(share, *place) for place, share in np.ndenumerate(shares) if place[0] != place[1] and share > 0]
    rows = [
        (names[label].replace("_", " "), names[guess].replace("_", " "), percent(share), f"{total[label, guess]:,}")
        for share, label, guess in sorted(pairs, reverse=True)[:_NUM_CONFUSIONS]
    ]
    return Table("Most frequent confusions", ("label", "taken for", "% of the label's pixels", "pixels"), tuple(rows))


def _worst_tiles(tiles: Tiles, per_tile: npt.NDArray[np.int64], names: Sequence[str]) -> Table:
    """The tiles with the smallest shares of right pixels."""
    accuracy = metric_values(per_tile)["oa"]
    known = [int(i) for i in np.argsort(accuracy, kind="stable") if np.isfinite(accuracy[i])][:_NUM_WORST]
    rows = [
        (
            tiles.keys[i],
            percent(float(accuracy[i])),
            f"{per_tile[i].sum():,}",
            names[int(per_tile[i].sum(1).argmax())].replace("_", " "),
        )
        for i in known
    ]
    return Table("Worst tiles", ("tile", "OA in %", "pixels", "largest class"), tuple(rows))


def _with_spread(mean: float, std: float, sign: bool = False) -> str:
    """Shares as percent; the spread where there is one."""
    told = _signed(mean) if sign else percent(mean)
    return told if np.isnan(std) else f"{told} ± {number(100 * std, 1)}"


def _signed(share: float) -> str:
    return NONE if np.isnan(share) else f"{100 * share:+.1f}"

"""`cromss compare`: transfer runs beside each other and beside the paper, and encoders against each other in pairs.

Layer 4.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist.commands.printing import print_json, print_table, shown

if TYPE_CHECKING:
    from cromss_dist.transfer.compare import Comparison, Difference, Line, Setting
    from cromss_dist.transfer.statistics import Interval, Spread

_EXAMPLES = """figures are in percent. mean +- std: over repeated runs (seeds, labelled tiles). over tiles: how the mean of these
very networks would vary with other test tiles. A difference is within pairs of runs that share setting, labelled tiles and seeds.

examples:
  cromss compare runs/ --paper
  cromss compare runs/dw-cromss-* --against runs/dw-random-* --classes
  cromss compare runs/cromss --against runs/plain --among water,trees,grass,crops,shrub,built,bare --json"""


def add_compare(commands: Any) -> None:
    """Adds the command to `cromss`."""
    parser = commands.add_parser(
        "compare",
        help="transfer runs beside each other, in pairs, and beside the paper",
        description="Reads scores.json and tiles.npz of transfer runs and prints a line for each setting and encoder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_help = "run folder, or a folder with such in it"
    parser.add_argument("runs", metavar="RUN|FOLDER", nargs="+", type=Path, help=run_help)
    parser.add_argument(
        "--against", metavar="RUN|FOLDER", nargs="+", default=[], type=Path, help="encoders that the others are held against"
    )
    parser.add_argument("--paper", action="store_true", help="with the published figures of the same settings")
    parser.add_argument("--classes", action="store_true", help="with the IoU of each class")
    parser.add_argument("--among", metavar="CLASS,...", help="score these classes only")
    parser.add_argument("--level", type=float, default=0.95, help="coverage of intervals (default: %(default)s)")
    parser.add_argument("--replicates", type=int, default=2000, metavar="R", help="test sets drawn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts instead of tables; figures as shares")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> None:
    from cromss_dist.transfer.compare import compare, summarise
    from cromss_dist.transfer.results import find_results
    from cromss_dist.transfer.statistics import Resampling

    how = Resampling(options.level, options.replicates, options.seed)
    among = None if options.among is None else [name.strip() for name in options.among.split(",")]
    first, second = find_results(options.runs), find_results(options.against)
    known = {result.run_dir.resolve() for result in first}
    lines = summarise([*first, *(result for result in second if result.run_dir.resolve() not in known)], how, among)
    comparisons = compare(first, second, how, among) if second else []
    if options.json:
        print_json(_as_json(lines, comparisons, options.paper))
        return
    print_lines(lines, with_paper=options.paper, with_classes=options.classes)
    for comparison in comparisons:
        print_comparison(comparison, with_classes=options.classes)


def print_lines(lines: Sequence["Line"], with_paper: bool = False, with_classes: bool = False) -> None:
    """The table of transfer runs.

    Args:
        lines: As `summarise` gives them.
        with_paper: Put the published figures under each setting.
        with_classes: Print a table of each class's IoU for each setting, too.
    """
    from cromss_dist.transfer.paper import published

    rows: list[Sequence[str]] = []
    unpublished: list[Setting] = []
    for setting, of_setting in groupby(lines, lambda line: line.setting):
        for line in of_setting:
            figures = [_spread(line.spread[metric]) for metric in _ORDER]
            figures.insert(1, _ends(line.interval["miou"]))
            rows.append((*_of_setting(setting), line.name, str(len(line.runs)), *figures))
        found = published(setting.task, setting.modality, setting.mode) if with_paper else ()
        for one in found:
            figure = f"{one.value:.2f}" + ("" if one.std is None else f" +- {one.std:.2f}")
            encoder = f"paper: {one.method}, {one.bands} bands"
            rows.append((one.task, one.modality, one.mode, one.decoder, "all", encoder, "", figure, "", "", "", ""))
        if with_paper and not found:
            unpublished.append(setting)
    titles = [_TITLES[metric] for metric in _ORDER]
    titles.insert(1, "over tiles")
    print_table("Transfer, in percent", (*_SETTING, "encoder", "runs", *titles), rows)
    for line in lines:
        for note in line.notes:
            print(shown(f"{line.name} ({line.setting}): {note}"))
    for setting in unpublished:
        print(shown(f"No published figure is known here for {setting.task}, {setting.modality}, {setting.mode}."))
    if with_classes:
        for setting, of_setting in groupby(lines, lambda line: line.setting):
            _print_classes(setting, list(of_setting))


def _print_classes(setting: "Setting", lines: Sequence["Line"]) -> None:
    rows = [(label, *(_spread(line.iou[label]) for line in lines)) for label in lines[0].iou]
    print_table(f"IoU of each class, in percent ({setting})", ("class", *(line.name for line in lines)), rows)


def print_comparison(comparison: "Comparison", with_classes: bool = False) -> None:
    """The table of the differences of two encoders.

    Args:
        comparison: As `compare` gives it.
        with_classes: With each class's IoU.
    """
    rows = [(_TITLES[metric], *_of_difference(comparison.metrics[metric])) for metric in _ORDER]
    if with_classes:
        rows += [(f"IoU {label}", *_of_difference(difference)) for label, difference in comparison.iou.items()]
    title = f"{comparison.first} minus {comparison.second}, in points ({comparison.setting})"
    print_table(title, ("", "mean +- std over pairs", "over tiles", "better / worse", "pairs"), rows)
    if comparison.alone:
        print(f"Runs without a partner of the same seeds on the other side, left out of the differences: {comparison.alone}.")


_SETTING = ("task", "input", "mode", "decoder", "labels")
_TITLES = {"miou": "mIoU", "oa": "OA", "aa": "AA", "mf1": "mF1"}
_ORDER: tuple[Any, ...] = tuple(_TITLES)


def _of_setting(setting: "Setting") -> tuple[str, ...]:
    mode = setting.mode + (", paper's protocol" if setting.protocol == "paper" else "")
    return setting.task, setting.modality, mode, setting.decoder or "-", setting.labels


def _of_difference(difference: "Difference") -> tuple[str, ...]:
    pairs = " ".join(f"{100 * value:+.2f}" for value in difference.pairs)
    signs = f"{difference.positive} / {difference.negative} of {len(difference.pairs)}"
    return _spread(difference.spread, "+"), _ends(difference.interval, "+"), signs, pairs


def _spread(spread: "Spread", sign: str = "") -> str:
    if math.isnan(spread.mean):
        return "-"
    return f"{100 * spread.mean:{sign}.2f}" + ("" if math.isnan(spread.std) else f" +- {100 * spread.std:.2f}")


def _ends(interval: "Interval", sign: str = "") -> str:
    return "-" if math.isnan(interval.low) else f"[{100 * interval.low:{sign}.2f}, {100 * interval.high:{sign}.2f}]"


def _as_json(lines: Sequence["Line"], comparisons: Sequence["Comparison"], with_paper: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from cromss_dist.transfer.paper import published

    content: dict[str, Any] = {
        "lines": [{**asdict(line), "runs": [str(run.run_dir) for run in line.runs]} for line in lines],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    if with_paper:
        settings = {(line.setting.task, line.setting.modality, line.setting.mode) for line in lines}
        content["paper"] = [asdict(one) for setting in sorted(settings) for one in published(*setting)]
    return _nulls(content)  # type: ignore[no-any-return]


def _nulls(content: Any) -> Any:
    """With null for what is no number, which JSON cannot have."""
    if isinstance(content, dict):
        return {key: _nulls(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_nulls(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content

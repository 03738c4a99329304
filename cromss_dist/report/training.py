"""The report's sections on training: overview, curves, classes, panels, what ran.

Layer 4.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.figure import Figure

from cromss_dist.report.charts import OTHERS, Chart, ChartGroup, chart_groups
from cromss_dist.report.figures import draw_chart, legend_of, shorten
from cromss_dist.report.page import Drawing, Part, Photo, Section
from cromss_dist.report.run_record import Picture, RunRecord
from cromss_dist.report.style import SERIES
from cromss_dist.report.tables import class_tables, config, differences, facts, incidents, overview, percent

_STEP = re.compile(r"step_(?P<step>[0-9]+)")
_SIDE_BY_SIDE = 3  # runs whose facts fit
MAX_SHOWN = len(SERIES)  # runs whose lines can be told from each other


def training_sections(runs: Sequence[RunRecord], names: Sequence[str], kind: str) -> Iterator[Section]:
    """How runs of one kind went, side by side; nothing where there is none.

    Args:
        runs: In the order of the page.
        names: Of each, distinct.
        kind: A word, for the headings: 'Pretraining'.
    """
    if not runs:
        return
    anchor = kind.lower()
    yield Section(f"{anchor}-runs", f"{kind} runs", (Part(tables=(overview(runs, names), incidents(runs, names))),))
    if groups := chart_groups(runs[:MAX_SHOWN]):
        parts = (_curves(group, names[:MAX_SHOWN], anchor) for group in groups)
        yield Section(f"{anchor}-curves", f"{kind} curves", (*_left_out(runs), *parts))
    if tables := tuple(class_tables(runs, names)):
        yield Section(f"{anchor}-classes", f"{kind} by class", (Part(tables=tables),))


def _curves(group: ChartGroup, names: Sequence[str], kind: str) -> Part:
    lines = [line for chart in group.charts for line in chart.lines]
    drawings = tuple(
        Drawing(
            f"{kind}-{group.title}-{chart.key}",
            chart.title,
            describe(chart, names),
            partial(_draw, chart, tuple(names)),
            "small" if chart.small else "normal",
        )
        for chart in group.charts
    )
    return Part(group.title, drawings=drawings, legend=tuple(legend_of(lines, names)), folded=group.title == OTHERS)


def _draw(chart: Chart, names: Sequence[str], alone: bool) -> Figure:
    return draw_chart(chart, names, alone)


def describe(chart: Chart, names: Sequence[str]) -> str:
    """A chart in a sentence a line, for those who do not see it."""
    show = (lambda value: f"{percent(value)} %") if chart.share else shorten
    told = [
        f"{names[line.run]} {line.modality.upper()}".strip()
        + f": {show(float(line.series.values[0]))} at the start, {show(line.series.last)} at the end, "
        + f"{len(line.series.values)} points."
        for line in chart.lines
    ]
    return f"{chart.title}, over samples. {' '.join(told)}"


def panel_section(runs: Sequence[RunRecord], names: Sequence[str], most: int) -> Iterator[Section]:
    """The pictures that runs drew of predictions; nothing where there is none to show or to miss.

    Args:
        runs: In the order of the page.
        names: Of each, distinct.
        most: Of each run, evenly chosen, the first and the last among them.
    """
    drawn = [(run, name) for run, name in zip(runs, names, strict=True) if run.pictures or run.unreadable]
    if drawn:
        runs, names = zip(*drawn, strict=True)
        yield Section("panels", "Panels", (*_left_out(runs), *_panels(runs[:MAX_SHOWN], names[:MAX_SHOWN], most)))


def _panels(runs: Sequence[RunRecord], names: Sequence[str], most: int) -> Iterator[Part]:
    for run, name in zip(runs, names, strict=True):
        chosen = choose(run.pictures, most)
        photos = tuple(
            Photo(
                picture,
                _when(picture),
                f"Panel {picture.path.stem} of {name}: images, labels and predictions",
            )
            for picture in chosen
        )
        left = f"{len(chosen)} of {len(run.pictures)} panels; the others are in {run.folder / 'panels'}. "
        told = left if 0 < len(chosen) < len(run.pictures) else ""
        if run.unreadable:
            told += f"Not shown, since they are damaged or lie elsewhere: {', '.join(run.unreadable)}."
        yield Part(name if len(runs) > 1 else "", told, photos=photos)


def _left_out(runs: Sequence[RunRecord]) -> tuple[Part, ...]:
    """What is said where not all runs are shown."""
    return (Part(text=f"Of the first {MAX_SHOWN} of {len(runs)} runs."),) if len(runs) > MAX_SHOWN else ()


def choose(pictures: Sequence[Picture], most: int) -> list[Picture]:
    """At most so many, evenly, the last one always and the first one from two on."""
    if len(pictures) <= most:
        return list(pictures)
    last = len(pictures) - 1
    return [pictures[last - place * last // max(most - 1, 1)] for place in reversed(range(most))]


def _when(picture: Picture) -> str:
    match = _STEP.fullmatch(picture.path.stem)
    return f"After step {int(match['step']):,}" if match else picture.path.stem.replace("_", " ")


def configuration_section(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Section]:
    """What ran, where and when, side by side; what differs; all of each config. Nothing where no run has a spool.

    Args:
        runs: In the order of the page.
        names: Of each, distinct.
    """
    parts: list[Part] = []
    for start in range(0, len(runs), _SIDE_BY_SIDE):
        chosen = slice(start, start + _SIDE_BY_SIDE)
        parts.append(Part(tables=(facts(runs[chosen], names[chosen]),)))
    for of_transfer in (False, True):  # of two kinds all differs
        alike = [place for place, run in enumerate(runs) if run.is_transfer == of_transfer]
        parts.append(Part(tables=(differences([runs[place] for place in alike], [names[place] for place in alike]),)))
    parts += [Part(f"Whole config of {name}", tables=(config(run),), folded=True) for run, name in zip(runs, names, strict=True)]
    if runs:
        yield Section("configuration", "What ran", tuple(parts))

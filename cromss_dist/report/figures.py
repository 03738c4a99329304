"""Charts, heat maps and intervals as matplotlib figures, in the report's style.

Layer 4. On the page a figure has its title and legend beside it, in HTML; as a file it stands alone and has both in it.
C classes, N tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cromss_dist.report.charts import Chart, Line
from cromss_dist.report.run_record import Series
from cromss_dist.report.style import HEAT_ALPHA, INK, MUTED, SERIES, VARIABLES, make_plain, new_figure

MAX_POINTS = 300  # of a line: about what its width can show
_MODALITY_COLOURS = {"s1": SERIES[1], "s2": SERIES[0], "": SERIES[0]}
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LegendEntry:
    """What a line looks like, and what it is."""

    label: str
    colour: str
    dashed: bool

    @property
    def variable(self) -> str:
        """The colour as the page has it."""
        return VARIABLES[self.colour]


def legend_of(lines: Sequence[Line], names: Sequence[str]) -> list[LegendEntry]:
    """One run: a colour a modality. Several: a colour a run, S1 dashed."""
    modalities = sorted({line.modality for line in lines if line.modality})
    if len(names) == 1:
        return [LegendEntry(modality.upper(), *_look(modality, 0, 1)) for modality in modalities]
    runs = [LegendEntry(names[run], *_look("", run, len(names))) for run in sorted({line.run for line in lines})]
    return runs + [LegendEntry(modality.upper(), MUTED, modality == "s1") for modality in modalities]


def draw_chart(chart: Chart, names: Sequence[str], alone: bool = False) -> Figure:
    """Lines over samples. Of a long line averages of equal stretches are drawn, in the band of what was averaged.

    Args:
        chart: What to draw.
        names: Of the runs.
        alone: Whether title and legend are in it.
    """
    small = chart.small and not alone
    width, height, frame = (2.2, 1.3, (0.2, 0.17, 0.98, 0.96)) if small else (4.6, 2.5, (0.125, 0.16, 0.985, 0.98))
    figure = new_figure(width, height, None if alone else frame)
    axes = figure.add_subplot()
    for line in chart.lines:
        colour, dashed = _look(line.modality, line.run, len(names))
        places, means, lows, highs = thin_out(line.series, MAX_POINTS)
        if len(means) < len(line.series.values):
            axes.fill_between(places, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.plot(places, means, color=colour, linewidth=1.5, linestyle=(0, (4, 2)) if dashed else "-",
                  marker="o" if len(means) <= 12 else None, markersize=3.2)  # fmt: skip
    make_plain(axes)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(3 if small else 5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3 if small else 5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shorten(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %" if chart.share else shorten(value)))
    if small:
        axes.tick_params(labelsize=8)
    if chart.small and chart.share:  # to be compared with those beside it
        axes.set_ylim(-0.04, 1.04)
    if not small:
        axes.set_xlabel("samples", fontsize=8, color=MUTED, loc="right", labelpad=2)
    if alone:
        _stand_alone(figure, axes, chart, names)
    return figure


def _stand_alone(figure: Figure, axes: Axes, chart: Chart, names: Sequence[str]) -> None:
    axes.set_title(fit(chart.title, 60), fontsize=10, color=INK, loc="left")
    entries = legend_of(chart.lines, names)
    if entries:
        handles = [Line2D([], [], color=e.colour, linestyle="--" if e.dashed else "-", label=fit(e.label, 40)) for e in entries]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=7, frameon=False,
                      labelcolor=INK)  # fmt: skip


def _look(modality: str, run: int, num_runs: int) -> tuple[str, bool]:
    """Colour, and whether the line is dashed."""
    return (_MODALITY_COLOURS[modality], False) if num_runs == 1 else (SERIES[run % len(SERIES)], modality == "s1")


def thin_out(series: Series, most: int) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Samples, means, minima and maxima of at most so many stretches of equal numbers of points; NaN do not count.

    Returns:
        Four arrays (M,), M <= most; the series itself, three times, where it is short enough.
    """
    if len(series.values) <= most:
        return series.samples, series.values, series.values, series.values
    starts = np.linspace(0, len(series.values), most, endpoint=False).astype(int)
    known = np.isfinite(series.values)
    counts = np.add.reduceat(known.astype(float), starts)

    def of_known(reduce: np.ufunc, neutral: float) -> _Floats:
        reduced: _Floats = reduce.reduceat(np.where(known, series.values, neutral), starts)
        return np.where(counts > 0, reduced, np.nan)

    sizes = np.diff(np.append(starts, len(series.values)))
    places = np.add.reduceat(series.samples, starts) / sizes
    means = of_known(np.add, 0.0) / np.maximum(counts, 1)
    return places, means, of_known(np.minimum, np.inf), of_known(np.maximum, -np.inf)


def shorten(value: float) -> str:
    """A tick's label: 1500 is '1.5k', 2e-05 is '2e-5'; 'nan' and 'inf' are themselves."""
    if not isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e3:
        power = min(int(np.log10(abs(value)) // 3), 4)
        return f"{value / 1000**power:g}{'kMGT'[power - 1]}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def fit(text: str, most: int) -> str:
    """The text, or as much of its beginning and end as a figure has room for."""
    end = most // 2
    return text if len(text) <= most else f"{text[: most - end - 1]}…{text[-end:]}"


def draw_confusion(confusion: npt.NDArray[np.int64], names: Sequence[str], title: str = "") -> Figure:
    """Shares of each label's pixels by prediction, in percent; a class without a labelled pixel has an empty row.

    Args:
        confusion: Counts (C, C), rows the label.
        names: Of the classes.
        title: Line at the top; '' = none.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 0.52 * len(names)
    figure = new_figure(side + 1.4, side + 1.1)
    axes = figure.add_subplot()
    for (row, column), share in np.ndenumerate(shares):
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 0.96, 0.96, facecolor=SERIES[0], alpha=HEAT_ALPHA * share, linewidth=0)
        )
        if confusion[row, column]:
            text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=INK if share >= 0.05 else MUTED,
                      fontweight="bold" if row == column else "normal")  # fmt: skip
    labels = [fit(name.replace("_", " "), 24) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    make_plain(axes, grid=None)
    axes.tick_params(labelsize=7.5, colors=INK)
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    axes.set_xlabel("prediction", fontsize=8, color=MUTED)
    axes.set_ylabel("label", fontsize=8, color=MUTED)
    if title:
        axes.set_title(fit(title, 60), fontsize=10, color=INK, loc="left")
    return figure


def draw_histogram(values: npt.ArrayLike, of_all: float, title: str = "") -> Figure:
    """Tiles by a score in percent, with the score of all of them together.

    Args:
        values: N scores in [0, 1]; NaN do not count.
        of_all: The score of all tiles' pixels together.
        title: Line at the top; '' = none.
    """
    known = 100 * np.asarray(values, np.float64)
    figure = new_figure(4.6, 2.1)
    axes = figure.add_subplot()
    axes.hist(known[np.isfinite(known)], bins=np.linspace(0, 100, 21).tolist(), color=SERIES[0], alpha=0.75, rwidth=0.92)
    axes.axvline(100 * of_all, color=INK, linewidth=1)
    make_plain(axes)
    axes.set_xlim(0, 100)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("tiles", fontsize=8, color=MUTED)
    if title:
        axes.set_title(fit(title, 60), fontsize=10, color=INK, loc="left")
    return figure


@dataclass(frozen=True)
class Bar:
    """A row of `draw_intervals`; all in percent."""

    label: str
    value: float
    low: float
    high: float
    repetitions: tuple[float, ...]  # of the value, one a seed
    published: float | None = None


def draw_intervals(rows: Sequence[Bar], unit: str, title: str = "") -> Figure:
    """A dot and its interval a row, small dots for the repetitions, a diamond for what was published."""
    labels = [fit(row.label, 60) for row in rows]
    figure = new_figure(4.2 + 0.065 * max(map(len, labels)), 0.75 + 0.3 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        axes.plot([row.low, row.high], [place, place], color=SERIES[0], linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot(row.repetitions, [place] * len(row.repetitions), "o", color=SERIES[0], markersize=2.6, alpha=0.7)
        axes.plot(row.value, place, "o", color=SERIES[0], markersize=6)
        if row.published is not None:
            axes.plot(row.published, place, "D", color=SERIES[1], markersize=5, fillstyle="none", markeredgewidth=1.3)
    make_plain(axes, grid="x")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", colors=INK)
    axes.set_xlabel(unit, fontsize=8, color=MUTED)
    if title:
        axes.set_title(fit(title, 60), fontsize=10, color=INK, loc="left")
    return figure

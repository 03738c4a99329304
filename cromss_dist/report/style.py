"""The look of the report's figures: one palette for page, SVG and PNG, and a figure as either.

Layer 4. Figures are drawn once, in the colours of the light page. In an SVG these become the page's variables of the same name,
so that a figure follows the reader's colour scheme and prints in the light one.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# name -> light, dark. Text and lines have a contrast of 4.5 or more against `surface` in both (tests/report/test_style.py).
PALETTE: dict[str, tuple[str, str]] = {
    "surface": ("#ffffff", "#171a1e"),
    "page": ("#f6f7f9", "#0f1114"),
    "ink": ("#22262b", "#e6e9ed"),
    "muted": ("#5f6672", "#9aa3af"),
    "grid": ("#e3e6ea", "#2b3037"),
    "series-0": ("#2b6aa6", "#7ab3e8"),
    "series-1": ("#a8560f", "#eba55e"),
    "series-2": ("#2f7a4b", "#74c594"),
    "series-3": ("#8347a0", "#c99ae4"),
    "series-4": ("#b23a48", "#f08d97"),
    "series-5": ("#4d5966", "#b4bfcc"),
}
INK, MUTED, GRID = (PALETTE[name][0] for name in ("ink", "muted", "grid"))
SERIES = tuple(light for name, (light, _) in PALETTE.items() if name.startswith("series"))
HEAT_ALPHA = 0.5  # of the darkest cell of a heat map, so that ink stays readable on it
DPI = 150
VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}
_COLOUR = re.compile(r"(?P<what>fill|stroke): ?(?P<colour>#[0-9a-f]{6})")
# Of what matplotlib writes around the drawing, and ids that would occur once a figure.
_FRAME = re.compile(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>| id=\"[a-zA-Z0-9.]+_\d+\"", re.DOTALL)
_SIZE = re.compile(r"<svg [^>]*?viewBox=\"0 0 (?P<width>[0-9.]+) (?P<height>[0-9.]+)\"[^>]*>")
_SCALE = 1.35  # px of the page a point, where a figure has its own size: 9 points are as large as the text of tables


@contextmanager
def drawing_style(salt: str = "") -> Iterator[None]:
    """While figures are drawn and saved: no `$` of a name is taken for mathematics, no sign is missed in a font aloud.

    Args:
        salt: Makes the ids inside of an SVG differ from those of others on the page.
    """
    settings = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def new_figure(width_in: float, height_in: float, frame: tuple[float, float, float, float] | None = None) -> Figure:
    """A transparent figure without pyplot: no global backend or list of figures is touched.

    Args:
        width_in: Inches.
        height_in: Inches.
        frame: Left, bottom, right and top of the axes as shares of the figure; None: as its labels need, which takes three
            times as long as to draw.
    """
    figure = Figure(figsize=(width_in, height_in), layout="constrained" if frame is None else None)
    if frame is not None:
        left, bottom, right, top = frame
        figure.subplots_adjust(left=left, bottom=bottom, right=right, top=top)
    figure.patch.set_alpha(0)
    FigureCanvasAgg(figure)
    return figure


def make_plain(axes: Axes, grid: str | None = "y") -> None:
    """Axes with nothing but ticks' labels and faint lines."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.patch.set_alpha(0)
    axes.tick_params(labelsize=9, colors=MUTED, length=0)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]


def to_svg(figure: Figure) -> str:
    """An `<svg>` element for a page that has the palette as variables; its own text is escaped by matplotlib."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = _FRAME.sub("", text[text.index("<svg") :])
    text = _SIZE.sub(_head, text, count=1)
    return _COLOUR.sub(lambda match: f"{match['what']}: {VARIABLES.get(match['colour'], match['colour'])}", text)


def _head(match: re.Match[str]) -> str:
    width, height = match["width"], match["height"]
    return f'<svg viewBox="0 0 {width} {height}" width="{_SCALE * float(width):.0f}" aria-hidden="true">'


def to_png(figure: Figure) -> bytes:
    """The figure on white; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()

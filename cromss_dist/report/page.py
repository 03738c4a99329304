"""The page: sections of tables, figures and pictures, put into HTML that needs nothing but itself.

Layer 4. What runs wrote is text to the templates, which escape it; what is taken as it is are figures, in which matplotlib has
escaped names. The page's policy lets it load nothing and run no script but its own.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from cromss_dist import __version__
from cromss_dist.report.figures import LegendEntry
from cromss_dist.report.run_record import Picture
from cromss_dist.report.style import PALETTE, drawing_style, to_png, to_svg
from cromss_dist.report.tables import Table

_TEMPLATES = "templates"


@dataclass(frozen=True)
class Drawing:
    """A figure with its words, drawn when it is asked for.

    Args:
        key: Distinct among the drawings of a page; the name of its file.
        title: Above it.
        alt: What a reader who does not see it is told.
        draw: Makes it; given whether it stands alone and needs title and legend in it.
        size: 'small' is one of many alike, 'large' takes two places, 'wide' a line of its own.
        note: Below it.
    """

    key: str
    title: str
    alt: str
    draw: Callable[[bool], Figure]
    size: Literal["small", "normal", "large", "wide"] = "normal"
    note: str = ""

    @property
    def svg(self) -> Markup:
        """For the page. It is trusted: matplotlib wrote it."""
        with drawing_style(self.key):
            return Markup(to_svg(self.draw(False)))

    @property
    def png(self) -> bytes:
        """As a file that stands alone."""
        with drawing_style():
            return to_png(self.draw(True))


@dataclass(frozen=True)
class Photo:
    """A picture of a run's folder with its words."""

    picture: Picture
    title: str
    alt: str

    @property
    def uri(self) -> str:
        """The file itself."""
        return f"data:image/png;base64,{base64.b64encode(self.picture.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Part:
    """What one heading is above; in this order: text, tables, drawings, photos.

    Args:
        title: The heading; '' = none. What is folded has one.
        text: A paragraph; '' = none.
        tables: Empty ones are not shown.
        drawings: Side by side.
        photos: One below the other.
        legend: Of the drawings.
        folded: Whether a reader has to open it.
    """

    title: str = ""
    text: str = ""
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    photos: tuple[Photo, ...] = ()
    legend: tuple[LegendEntry, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A chapter of the page.

    Args:
        anchor: For links, a word.
        title: The heading.
        parts: Below it.
    """

    anchor: str
    title: str
    parts: tuple[Part, ...]


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML. Equal input gives equal text but for the date at its end."""
    environment = Environment(
        loader=PackageLoader("cromss_dist.report", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = files("cromss_dist.report").joinpath(_TEMPLATES, "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        palette=PALETTE,
        policy="; ".join(_policy(script)),
        script=Markup(script),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _policy(script: str) -> Iterator[str]:
    """What the page may load and run: pictures and styles that are in it, and this script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    yield "default-src 'none'"
    yield "img-src data:"
    yield "style-src 'unsafe-inline'"
    yield f"script-src 'sha256-{digest}'"
    yield "base-uri 'none'"
    yield "form-action 'none'"

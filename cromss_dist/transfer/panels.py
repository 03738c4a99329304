"""What a transfer run makes of some test tiles: images, label, prediction, and where they differ.

Layer 4. numpy in, a figure out. H rows, W columns, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cromss_dist.schema import CLASSES, IGNORE, Modality
from cromss_dist.tracking.panels import s1_colours, s2_colours

_TILE_IN, _LEFT_IN, _TOP_IN, _LEGEND_ROW_IN = 2.1, 1.6, 0.75, 0.24
_INK = "#22262b"
_IGNORED, _RIGHT, _WRONG = (233, 233, 233), (193, 214, 199), (178, 34, 52)
_NAMES_A_ROW = 7
# For classes that have no colour of their own: Okabe and Ito's eight without black, then darker ones of other hues.
_COLOURS = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (102, 60, 20), (120, 94, 240), (60, 110, 60), (140, 140, 140), (170, 220, 110), (90, 20, 90), (30, 30, 90),
)  # fmt: skip


@dataclass(frozen=True)
class TilePanel:
    """A test tile to look at.

    Args:
        key: Location key.
        images: By modality, what the network saw of it: float (bands, H, W) in [0, 1].
        label: uint8 (H, W), 255 = ignored.
        prediction: uint8 (H, W).
    """

    key: str
    images: Mapping[Modality, npt.NDArray[np.floating]]
    label: npt.NDArray[np.uint8]
    prediction: npt.NDArray[np.uint8]


def class_palette(class_names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """A colour for each value of a label map: uint8 (256, 3).

    Dynamic World's classes have their own; others are numbered through a fixed list, which begins again after 14.
    """
    own = {land_cover.name: land_cover.colour for land_cover in CLASSES}
    palette = np.full((IGNORE + 1, 3), _IGNORED, np.uint8)
    for value, name in enumerate(class_names):
        palette[value] = own.get(name, _COLOURS[value % len(_COLOURS)])
    return palette


def draw_tiles(
    tiles: Sequence[TilePanel], bands: Mapping[Modality, Sequence[str]], class_names: Sequence[str], title: str
) -> Figure:
    """One row a tile: what the network saw, label, prediction, errors; below, the colours of the classes.

    Args:
        tiles: At least one.
        bands: Of the images.
        class_names: C of them.
        title: Line at the top.
    """
    palette = class_palette(class_names)
    names: dict[Modality, str] = {"s2": "Sentinel-2", "s1": "Sentinel-1"}
    seen = {modality: name for modality, name in names.items() if modality in bands}
    columns = [*seen.values(), "label", "prediction", "errors"]
    legend_rows = -(-(len(class_names) + 3) // _NAMES_A_ROW)
    bottom = 0.15 + _LEGEND_ROW_IN * legend_rows
    width, height = _LEFT_IN + _TILE_IN * len(columns) + 0.1, _TOP_IN + _TILE_IN * len(tiles) + bottom
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(tiles), len(columns), left=_LEFT_IN / width, right=1 - 0.1 / width, top=1 - _TOP_IN / height,
        bottom=bottom / height, wspace=0.03, hspace=0.03,
    )  # fmt: skip
    for row, tile in enumerate(tiles):
        pictures: list[npt.NDArray[np.generic]] = [
            s2_colours(tile.images[m], bands[m]) if m == "s2" else s1_colours(tile.images[m]) for m in seen
        ]
        pictures += [palette[tile.label], palette[tile.prediction], _errors(tile)]
        for column, (name, picture) in enumerate(zip(columns, pictures, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            axes.set_xticks([])
            axes.set_yticks([])
            axes.imshow(picture, interpolation="nearest")
            for spine in axes.spines.values():
                spine.set_color("#d0d4da")
            if row == 0:
                axes.set_title(name, fontsize=9, color=_INK, pad=5)
            if column == 0:
                wrapped = "\n".join(tile.key[i : i + 22] for i in range(0, len(tile.key), 22))
                axes.text(-0.04, 0.5, wrapped, transform=axes.transAxes, ha="right", va="center", fontsize=7, color=_INK)
    entries = [(name.replace("_", " "), palette[value]) for value, name in enumerate(class_names)]
    entries += [(name, np.array(colour)) for name, colour in (("right", _RIGHT), ("wrong", _WRONG), ("ignored", _IGNORED))]
    figure.legend(
        handles=[Patch(facecolor=tuple(colour / 255), label=name) for name, colour in entries], loc="lower center",
        ncols=_NAMES_A_ROW, fontsize=8, frameon=False, labelcolor=_INK, handlelength=1.1, bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip
    figure.suptitle(title, x=0.1 / width, y=1 - 0.1 / height, ha="left", va="top", fontsize=11, color=_INK)
    return figure


def _errors(tile: TilePanel) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, 3): right, wrong and ignored pixels."""
    counts = (tile.label != IGNORE)[..., None]
    wrong = (tile.label != tile.prediction)[..., None]
    return np.where(counts, np.where(wrong, np.array(_WRONG), np.array(_RIGHT)), np.array(_IGNORED)).astype(np.uint8)

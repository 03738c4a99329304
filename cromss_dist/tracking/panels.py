"""Prediction panels: what the model sees, what it was told, what it says, and what it is made to believe.

numpy in, a figure out. Figures are made without pyplot, so no global backend or figure list is touched.
H rows, W columns.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cromss_dist.errors import BandError
from cromss_dist.schema import CLASSES, IGNORE, S2_RGB

_TILE_IN = 1.7  # inches a tile
_LEFT_IN, _TOP_IN, _BOTTOM_IN = 1.25, 0.42, 0.75
_PERCENTILES = (2.0, 98.0)
_INK, _MUTED = "#22262b", "#6b7280"
_IGNORED = (233, 233, 233)
_WEIGHT_MAP = "viridis"


@dataclass(frozen=True)
class PanelSample:
    """One row of a panel; every array is H x W px of the same place."""

    key: str  # location key
    season: int  # 0-3
    s1: npt.NDArray[np.floating]  # (bands of S1, H, W) in [0, 1]
    s2: npt.NDArray[np.floating]  # (bands of S2, H, W) in [0, 1]
    label: npt.NDArray[np.integer]  # (H, W): noisy label, 255 = ignore
    prediction_s1: npt.NDArray[np.integer]  # (H, W): class of the S1 branch
    prediction_s2: npt.NDArray[np.integer]  # (H, W): class of the S2 branch
    weights_s1: npt.NDArray[np.floating]  # (H, W) in [0, 1]: selection weights of the S1 branch
    weights_s2: npt.NDArray[np.floating]  # (H, W) in [0, 1]: selection weights of the S2 branch
    reference: npt.NDArray[np.integer] | None = None  # (H, W): reference label, 255 = ignore


def draw_panels(samples: Sequence[PanelSample], s1_bands: Sequence[str], s2_bands: Sequence[str], title: str = "") -> Figure:
    """One row a sample: images, labels, predictions, selection weights; below, the colours of the classes.

    Sentinel-2 is shown as B4 B3 B2, or as its first three bands if it lacks one of those; Sentinel-1 as VV, VH and
    VV - VH, or its one band in grey. Each colour is stretched between its 2nd and 98th percentile, a sample at a time.

    Args:
        samples: At least one. The reference label is drawn if any sample has one.
        s1_bands: Band names of `s1`, in order.
        s2_bands: Band names of `s2`, in order.
        title: Line at the top, e.g. the epoch.

    Raises:
        BandError: the images of a sample do not have these bands.
    """
    for sample in samples:
        if len(sample.s1) != len(s1_bands) or len(sample.s2) != len(s2_bands):
            raise BandError(
                f"Panel of {sample.key}: images with {len(sample.s1)} S1 and {len(sample.s2)} S2 bands do not fit "
                f"{list(s1_bands)} and {list(s2_bands)}; give the bands of the images."
            )
    with_reference = any(sample.reference is not None for sample in samples)
    columns = ["Sentinel-2", "Sentinel-1", "noisy label", *["reference"] * with_reference]
    columns += ["prediction S1", "prediction S2", "weights S1", "weights S2"]
    width = _LEFT_IN + _TILE_IN * len(columns) + 0.75
    height = _TOP_IN + _TILE_IN * len(samples) + _BOTTOM_IN + (0.3 if title else 0)
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    top = 1 - (_TOP_IN + (0.3 if title else 0)) / height
    grid = figure.add_gridspec(
        len(samples), len(columns), left=_LEFT_IN / width, right=1 - 0.75 / width, top=top, bottom=_BOTTOM_IN / height,
        wspace=0.04, hspace=0.04,
    )  # fmt: skip
    for row, sample in enumerate(samples):
        tiles: list[npt.NDArray[np.generic] | None] = [
            s2_colours(sample.s2, s2_bands),
            s1_colours(sample.s1),
            class_colours(sample.label),
        ]
        if with_reference:
            tiles.append(None if sample.reference is None else class_colours(sample.reference))
        tiles += [class_colours(sample.prediction_s1), class_colours(sample.prediction_s2), sample.weights_s1, sample.weights_s2]
        for column, (name, tile) in enumerate(zip(columns, tiles, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            _draw_tile(axes, tile)
            if row == 0:
                axes.set_title(name, fontsize=9, color=_INK, pad=5)
            if column == 0:
                name = f"{sample.key}\nseason {sample.season}"
                axes.text(-0.08, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=_INK)
    box = grid[len(samples) - 1, len(columns) - 1].get_position(figure)
    scale = figure.colorbar(
        ScalarMappable(cmap=_WEIGHT_MAP), cax=figure.add_axes((box.x1 + 0.1 / width, box.y0, 0.1 / width, box.height))
    )
    scale.ax.tick_params(labelsize=7, colors=_MUTED, length=2)
    scale.outline.set_visible(False)
    handles = [Patch(facecolor=_hex(c.colour), edgecolor="none", label=c.name.replace("_", " ")) for c in CLASSES]
    handles.append(Patch(facecolor=_hex(_IGNORED), edgecolor="none", label="ignored"))
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False, labelcolor=_INK, handlelength=1.1,
        columnspacing=1.2, bbox_to_anchor=(0.5, 0.1 / height),
    )  # fmt: skip
    if title:
        figure.suptitle(title, x=_LEFT_IN / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=11, color=_INK)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def class_colours(label: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """uint8 RGB (H, W, 3) of a class map (H, W) in the classes' display colours; ignored pixels are light grey."""
    table = np.full((IGNORE + 1, 3), _IGNORED, np.uint8)
    for land_cover in CLASSES:
        table[land_cover.value] = land_cover.colour
    colours: npt.NDArray[np.uint8] = table[label]
    return colours


def _draw_tile(axes: Axes, tile: npt.NDArray[np.generic] | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if tile is None:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", fontsize=8, color=_MUTED)
    else:  # matplotlib takes arrays with three channels as RGB, whatever the colour map
        axes.imshow(tile, cmap=_WEIGHT_MAP, vmin=0, vmax=1, interpolation="nearest")


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def s2_colours(s2: npt.NDArray[np.floating], bands: Sequence[str]) -> npt.NDArray[np.floating]:
    """RGB (H, W, 3) in [0, 1] of Sentinel-2 (bands, H, W) as `draw_panels` shows it."""
    index = [bands.index(band) for band in S2_RGB] if set(S2_RGB) <= set(bands) else [min(k, len(bands) - 1) for k in range(3)]
    return _stretch(s2[index])


def s1_colours(s1: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """RGB (H, W, 3) in [0, 1] of Sentinel-1 (1 or 2 bands, H, W) as `draw_panels` shows it."""
    return _stretch(np.stack([s1[0], s1[1], s1[0] - s1[1]]) if len(s1) == 2 else np.repeat(s1[:1], 3, axis=0))


def _stretch(bands: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """(3, H, W) to (H, W, 3) in [0, 1], each colour between its percentiles; a constant one becomes 0."""
    low, high = np.percentile(bands, _PERCENTILES, axis=(1, 2), keepdims=True)
    stretched: npt.NDArray[np.floating] = np.clip((bands - low) / np.maximum(high - low, 1e-6), 0, 1).transpose(1, 2, 0)
    return stretched

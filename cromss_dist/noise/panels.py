"""The places whose labels the model doubts most, as pictures: what is there, what the label says, what the model says.

Layer 4. H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.sample import Uint8Array, from_measure
from cromss_dist.noise.observatory import LABEL_CONFIDENCE, SUGGESTED, SUGGESTED_CONFIDENCE
from cromss_dist.noise.rule import Rule
from cromss_dist.noise.segmenter import images_of
from cromss_dist.noise.summary import Place
from cromss_dist.schema import IGNORE, LABEL_ARRAY, MODALITIES, REFERENCE_ARRAY, Modality
from cromss_dist.tracking.panels import s1_colours, s2_colours
from cromss_dist.transfer.panels import class_palette

_TILE_IN, _LEFT_IN, _RIGHT_IN, _TOP_IN, _BOTTOM_IN = 1.9, 1.55, 0.6, 0.75, 0.6
_NAMES_A_ROW = 10
_INK, _MUTED, _MAP = "#22262b", "#6b7280", "viridis"
_SENSORS: dict[Modality, str] = {"s2": "Sentinel-2", "s1": "Sentinel-1"}
_NONE = (233, 233, 233)


@dataclass(frozen=True)
class LabelPanel:
    """One place in one season.

    Args:
        place: Which one, and how bad.
        images: Name of the sensor and what it saw: float (H, W, 3) in [0, 1].
        label: uint8 (H, W), 255 = ignored.
        suggested: uint8 (H, W).
        cleaned: uint8 (H, W), by the rule.
        confidence: float32 (H, W) in [0, 1], of the label; NaN where it is ignored.
        reference: uint8 (H, W), where it is known.
    """

    place: Place
    images: dict[str, npt.NDArray[np.floating]]
    label: Uint8Array
    suggested: Uint8Array
    cleaned: Uint8Array
    confidence: npt.NDArray[np.float32]
    reference: Uint8Array | None


def read_panels(
    archive: StoredArchive, observations: StoredArchive, rule: Rule, places: Sequence[Place]
) -> tuple[LabelPanel, ...]:
    """Reads what is to be drawn of some places.

    Raises:
        ShardError: bytes of the dataset or of the cube are missing or changed.
    """
    return tuple(_read(archive, observations, rule, place) for place in places)


def _read(archive: StoredArchive, observations: StoredArchive, rule: Rule, place: Place) -> LabelPanel:
    spec, seen, said = archive.spec, archive.read(place.key).arrays, observations.read(place.key).arrays
    bands = {m: tuple(band for image in spec.images if image.modality == m for band in image.bands) for m in MODALITIES}
    images = images_of(spec, seen, bands)
    pictures = {}
    for modality, name in _SENSORS.items():
        if modality in images:
            values = images[modality][place.season].numpy()
            pictures[name] = s2_colours(values, bands[modality]) if modality == "s2" else s1_colours(values)
    verdict = rule.judge(said[LABEL_ARRAY], said[SUGGESTED], said[LABEL_CONFIDENCE], said[SUGGESTED_CONFIDENCE])
    reference = seen.get(REFERENCE_ARRAY)
    return LabelPanel(
        place,
        pictures,
        said[LABEL_ARRAY][place.season],
        said[SUGGESTED][place.season],
        verdict.cleaned[place.season],
        from_measure(said[LABEL_CONFIDENCE][place.season]),
        None if reference is None else reference[place.season],
    )


def draw_worst(panels: Sequence[LabelPanel], class_names: Sequence[str], title: str) -> Figure:
    """One row a place: images, label, its confidence, suggestion, cleaned label and truth; below, the colours of the classes.

    Args:
        panels: At least one, of one dataset.
        class_names: What label values mean.
        title: Line at the top.
    """
    palette = class_palette(class_names)
    columns = [*panels[0].images, "noisy label", "confidence in it", "suggestion", "cleaned label"]
    columns += ["reference"] if panels[0].reference is not None else []
    rows_of_names = -(-(len(class_names) + 1) // _NAMES_A_ROW)
    bottom = _BOTTOM_IN + 0.22 * (rows_of_names - 1)
    width = _LEFT_IN + _TILE_IN * len(columns) + _RIGHT_IN
    height = _TOP_IN + _TILE_IN * len(panels) + bottom
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(panels), len(columns), left=_LEFT_IN / width, right=1 - _RIGHT_IN / width, top=1 - _TOP_IN / height,
        bottom=bottom / height, wspace=0.04, hspace=0.04,
    )  # fmt: skip
    for row, panel in enumerate(panels):
        tiles: list[npt.NDArray[np.generic]] = [*panel.images.values(), palette[panel.label], panel.confidence]
        tiles += [palette[panel.suggested], palette[panel.cleaned]]
        tiles += [palette[panel.reference]] if panel.reference is not None else []
        for column, (name, tile) in enumerate(zip(columns, tiles, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            _draw(axes, tile)
            if row == 0:
                axes.set_title(name, fontsize=9, color=_INK, pad=5)
            if column == 0:
                text = (
                    f"{_wrapped(panel.place.key)}\nseason {panel.place.season}\n{100 * panel.place.suspicious:.0f} % suspicious"
                )
                axes.text(-0.06, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=_INK)
    box = grid[len(panels) - 1, len(columns) - 1].get_position(figure)
    scale = figure.colorbar(
        ScalarMappable(cmap=_MAP), cax=figure.add_axes((box.x1 + 0.1 / width, box.y0, 0.1 / width, box.height))
    )
    scale.ax.tick_params(labelsize=7, colors=_MUTED, length=2)
    scale.outline.set_visible(False)
    entries = [*enumerate(class_names), (IGNORE, "ignored")]
    figure.legend(
        handles=[Patch(facecolor=tuple(palette[value] / 255), label=name.replace("_", " ")) for value, name in entries],
        loc="lower center", ncols=min(_NAMES_A_ROW, len(entries)), fontsize=8, frameon=False, labelcolor=_INK, handlelength=1.1,
        columnspacing=1.2, bbox_to_anchor=(0.5, 0.02 / height),
    )  # fmt: skip
    figure.suptitle(title, x=0.15 / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=11, color=_INK)
    return figure


def _draw(axes: Axes, tile: npt.NDArray[np.generic]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor(tuple(np.array(_NONE) / 255))  # shows where there is no confidence
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.imshow(tile, cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")


def _wrapped(key: str, width: int = 18) -> str:
    return "\n".join(key[start : start + width] for start in range(0, len(key), width))

"""Pictures of a dataset: contact sheet, map of the locations, class shares by season, quality. Pixels in, figures out.

Figures are made without pyplot, so no global backend or figure list is touched. H rows, W columns.
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import wrap

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cromss_dist.data.reporting.land import LAND
from cromss_dist.data.reporting.quality import SHIFT_CONFIDENCE, SHIFT_LIMIT_PX, Quality, bands_at_10m
from cromss_dist.data.store.index import ShardIndex
from cromss_dist.schema import CLASSES, IGNORE, LABEL_ARRAY, MODALITIES, S2_RGB

_INK, _MUTED, _GRID = "#22262b", "#6b7280", "#e3e6ea"
_SEA, _LAND = "#f4f7fa", "#d5d9dd"
_BLUE, _ORANGE = "#2f6da8", "#d9822b"
_IGNORED = (233, 233, 233)
_PERCENTILES = (1.0, 98.0)
_TILE_IN = 1.05
_MARGIN_CHARS = 17  # of a location's name that fit in a line of the margin

Colours = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


def class_palette(names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """A colour (RGB, 0-255) for each class: Dynamic World's own for its classes, else distinct ones, in order."""
    known = {c.name: c.colour for c in CLASSES}
    spare = [tuple(round(255 * part) for part in colour[:3]) for colour in colormaps["tab20"](range(20))]
    return {name: known.get(name, spare[i % len(spare)]) for i, name in enumerate(names)}


def choose_locations(num_locations: int, count: int, seed: int) -> list[int]:
    """`count` of the sample ids 0 to `num_locations` - 1 at most, drawn by seed, in ascending order."""
    chosen = np.random.default_rng(seed).permutation(num_locations)[:count]
    return sorted(int(i) for i in chosen)


def draw_contact_sheet(index: ShardIndex, rows: Sequence[Sequence[Quality]]) -> Figure:
    """A row a location: for each season Sentinel-2, Sentinel-1 and the label.

    Sentinel-2 is shown as B4 B3 B2, or as its first bands if it lacks one of those; Sentinel-1 as VV, VH and VV - VH.
    Colours are stretched between percentiles of a location's seasons together, so that seasons can be compared.

    Args:
        index: The open dataset.
        rows: What `measure_location` said of each location to show; at least one.
    """
    sample_ids = {key: i for i, key in enumerate(index.locations)}
    num_seasons = len(rows[0])
    drawn = [_tiles(index, sample_ids[seasons[0].key], num_seasons) for seasons in rows]
    names = list(drawn[0])
    tile = 2.2 * _TILE_IN if num_seasons == 1 else _TILE_IN
    left, right, top, gap, between = 1.35, 0.15, 0.5, 0.14, 0.32
    group = len(names) * tile
    width = left + num_seasons * group + (num_seasons - 1) * gap + right
    num_lines = _legend_lines(index.class_names, width)
    height = top + len(rows) * (tile + between) + 0.35 + 0.2 * num_lines
    figure = _figure(width, height)
    for row, (seasons, tiles) in enumerate(zip(rows, drawn, strict=True)):
        lower = height - top - (row + 1) * tile - row * between
        figure.text((left - 0.12) / width, (lower + tile / 2) / height, _place(seasons[0]), ha="right", va="center",
                    fontsize=8, color=_INK, linespacing=1.5)  # fmt: skip
        for season, quality in enumerate(seasons):
            start = left + season * (group + gap)
            for column, name in enumerate(names):
                box = (start + column * tile, lower, tile - 0.03, tile)
                axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
                axes.imshow(tiles[name][season], interpolation="nearest", aspect="auto")
                _bare(axes)
                if row == 0:
                    axes.set_title(name, fontsize=8, color=_MUTED, pad=3)
            figure.text(
                start / width, (lower - 0.05) / height, _caption(quality), ha="left", va="top", fontsize=6.5, color=_MUTED
            )
            if row == 0:
                figure.text((start + group / 2) / width, 1 - 0.07 / height, f"season {season}", ha="center", va="top",
                            fontsize=10, color=_INK)  # fmt: skip
    _class_legend(figure, index.class_names, 0.12 / height)
    return figure


def draw_map(lon: npt.ArrayLike, lat: npt.ArrayLike, title: str = "") -> Figure:
    """Where the locations are, on coarse outlines of the land; where they crowd, a darker cell says how many there are.

    Args:
        lon: Degrees east, of N locations.
        lat: Degrees north.
        title: Line at the top.
    """
    lons, lats = np.asarray(lon, float), np.asarray(lat, float)
    figure = _figure(11, 5.9)
    crowded = len(lons) > 2000
    axes = figure.add_axes((0.045, 0.06, 0.89 if crowded else 0.94, 0.86))
    axes.set_facecolor(_SEA)
    axes.add_collection(PolyCollection(LAND, facecolor=_LAND, edgecolor="none"))
    if crowded:
        cells = axes.hexbin(lons, lats, gridsize=(150, 62), extent=(-180, 180, -90, 90), mincnt=1, bins="log", cmap="viridis_r",
                            linewidths=0)  # fmt: skip
        scale = figure.colorbar(cells, cax=figure.add_axes((0.945, 0.2, 0.012, 0.58)), format="{x:,.0f}")
        scale.set_label("locations a cell of 2.4 degrees", fontsize=8, color=_MUTED)
        scale.ax.tick_params(labelsize=7, colors=_MUTED)
        scale.outline.set_visible(False)
    else:
        axes.scatter(lons, lats, s=42 if len(lons) < 50 else 14, color=_ORANGE, edgecolors="white", linewidths=0.7, zorder=3)
    axes.set(xlim=(-180, 180), ylim=(-90, 90), aspect="equal")
    axes.set_xticks(range(-150, 151, 30), [_degrees(v, "W", "E") for v in range(-150, 151, 30)])
    axes.set_yticks(range(-60, 61, 30), [_degrees(v, "S", "N") for v in range(-60, 61, 30)])
    axes.grid(color="white", linewidth=0.8)
    _plain(axes)
    axes.set_title(title or f"{len(lons):,} locations", fontsize=11, color=_INK, loc="left")
    return figure


def draw_class_shares(counts: Sequence[dict[str, int]], title: str = "label, share of pixels") -> Figure:
    """A bar a season, divided by the label's classes.

    Args:
        counts: For each season pixels of each class by name, 'ignored' among them: the manifest's `class_counts`.
        title: Line at the top.
    """
    names = [name for name in counts[0] if name != "ignored"]
    palette = {**class_palette(names), "ignored": _IGNORED}
    below = 0.55 + 0.2 * _legend_lines(names, 10)
    figure = _figure(10, 0.75 + below + 0.48 * len(counts))
    height = figure.get_figheight()
    axes = figure.add_axes((0.08, below / height, 0.9, 1 - (below + 0.4) / height))
    for season, by_class in enumerate(counts):
        total, start = max(sum(by_class.values()), 1), 0.0
        for name, count in by_class.items():
            share = 100 * count / total
            axes.barh(season, share, left=start, height=0.74, color=_hex(palette[name]), edgecolor="white", linewidth=0.5)
            if share >= 3.5:
                axes.text(start + share / 2, season, f"{share:.0f} %", ha="center", va="center", fontsize=7.5,
                          color=_readable(palette[name]))  # fmt: skip
            start += share
    axes.set(xlim=(0, 100), ylim=(len(counts) - 0.5, -0.5))
    axes.set_yticks(range(len(counts)), [f"season {i}" for i in range(len(counts))])
    axes.set_xticks([])
    _plain(axes)
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    _class_legend(figure, names, 0.1 / height)
    return figure


def draw_quality(rows: Sequence[Quality], title: str = "") -> Figure:
    """Histograms of the quality of all seasons, and the S1-S2 shifts that mean something."""
    figure = _figure(11, 6.4)
    panels = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.86, bottom=0.06, hspace=0.34, wspace=0.2)
    _histogram(panels[0, 0], "cloud, share of the patch", {"": [r.cloud_share for r in rows]}, (0, 1))
    nodata = {"S1": [r.s1_nodata_share for r in rows], "S2": [r.s2_nodata_share for r in rows]}
    _histogram(panels[0, 1], "nodata, share of the patch", nodata, (0, 1))
    _histogram(panels[0, 2], "share of the label's largest class", {"": [r.dominant_share for r in rows]}, (0, 1))
    confidence: list[float | None] = [r.shift_confidence for r in rows]
    highest = max([30.0, *(c for c in confidence if c is not None)])
    _histogram(panels[1, 0], "confidence of the S1-S2 shift", {"": confidence}, (0, highest))
    panels[1, 0].axvline(SHIFT_CONFIDENCE, color=_ORANGE, linewidth=1.5)
    panels[1, 0].text(SHIFT_CONFIDENCE, 0.98, f"  above {SHIFT_CONFIDENCE:g} it counts", color=_ORANGE, fontsize=8, va="top",
                      transform=panels[1, 0].get_xaxis_transform())  # fmt: skip
    known = [r for r in rows if r.shift_px is not None]
    _histogram(panels[1, 1], "S1-S2 shift, px of 10 m", {"": [r.shift_px for r in known]}, (0, SHIFT_LIMIT_PX))
    axes = panels[1, 2]
    dots = {"s": 9, "color": _BLUE, "alpha": 0.55 if len(known) < 2000 else 0.1, "linewidths": 0}
    axes.scatter([r.shift_cols_px for r in known], [r.shift_rows_px for r in known], **dots)
    axes.axhline(0, color=_GRID, zorder=0)
    axes.axvline(0, color=_GRID, zorder=0)
    largest = max([2.0, *(max(abs(r.shift_cols_px or 0), abs(r.shift_rows_px or 0)) for r in known)])
    limits = (-1.15 * largest, 1.15 * largest)
    axes.set(xlim=limits, ylim=limits[::-1], aspect="equal", anchor="W")
    _plain(axes)
    axes.set_title("S1 against S2, px right and down", fontsize=9, color=_INK, loc="left")
    figure.suptitle(
        title or f"Quality of {len(rows):,} seasons of locations (counts, logarithmic)",
        x=0.06,
        y=0.965,
        ha="left",
        fontsize=11,
        color=_INK,
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; equal figures give equal bytes."""
    figure.savefig(path, format="png", metadata={"Software": None})


def _tiles(index: ShardIndex, sample_id: int, num_seasons: int) -> dict[str, list[Colours]]:
    """Name of a tile -> its picture in each season, uint8 (H, W, 3)."""
    seasons = [index.read(sample_id, season, index.arrays) for season in range(num_seasons)]
    tiles: dict[str, list[Colours]] = {}
    for modality in reversed(MODALITIES):
        bands = [bands_at_10m(index, arrays, modality) for arrays in seasons]
        if bands[0]:
            stack = np.stack([_three_bands(of_season) for of_season in bands])
            low, high = np.percentile(stack, _PERCENTILES, axis=(2, 3), keepdims=True)
            low, high = low.min(axis=0), np.median(high, axis=0)  # a cloudy season must not darken the others
            stretched = np.clip((stack - low) / np.maximum(high - low, 1e-6), 0, 1) ** 0.85
            tiles[f"Sentinel-{modality[1]}"] = list((255 * stretched).astype(np.uint8).transpose(0, 2, 3, 1))
    values = index.class_names
    table = np.full((IGNORE + 1, 3), _IGNORED, np.uint8)
    table[: len(values)] = list(class_palette(values).values())
    tiles["label"] = [table[arrays[LABEL_ARRAY][season]] for season, arrays in enumerate(seasons)]
    return tiles


def _three_bands(bands: dict[str, Colours]) -> FloatArray:
    if {"VV", "VH"} <= bands.keys():
        vv, vh = bands["VV"].astype(np.float32), bands["VH"].astype(np.float32)
        return np.stack([vv, vh, vv - vh])
    shown = S2_RGB if set(S2_RGB) <= bands.keys() else (list(bands) * 3)[:3] if len(bands) < 3 else list(bands)[:3]
    return np.stack([bands[band].astype(np.float32) for band in shown])


def _place(quality: Quality) -> str:
    key = "\n".join(wrap(quality.key, _MARGIN_CHARS)[:4])
    if quality.lon is None or quality.lat is None:
        return key
    return f"{key}\n{_degrees(round(quality.lat, 2), 'S', 'N')}\n{_degrees(round(quality.lon, 2), 'W', 'E')}"


def _caption(quality: Quality) -> str:
    told = []
    if quality.s2_time:
        told.append(f"S2 {_date(quality.s2_time)}")
    if quality.s1_time:
        told.append(f"S1 {_date(quality.s1_time)}")
    if quality.cloud_share is not None:
        told.append(f"cloud {100 * quality.cloud_share:.0f} %")
    if quality.shift_px is not None:
        told.append(f"shift {quality.shift_px:.1f} px")
    return "   ".join(told)


def _date(time: str) -> str:
    return f"{time[:4]}-{time[4:6]}-{time[6:8]}"


def _degrees(value: float, negative: str, positive: str) -> str:
    return f"{abs(value):g}° {negative if value < 0 else positive if value > 0 else ''}".rstrip()


def _figure(width_in: float, height_in: float) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _histogram(axes: Axes, title: str, values: dict[str, list[float | None]], limits: tuple[float, float]) -> None:
    edges = np.linspace(*limits, 26).tolist()
    known = {name: [v for v in series if v is not None] for name, series in values.items()}
    if not any(known.values()):
        axes.text(0.5, 0.5, "cannot be told from this dataset", transform=axes.transAxes, ha="center", fontsize=8, color=_MUTED)
    else:
        colours = (_BLUE, _ORANGE)[: len(known)]
        axes.hist(list(known.values()), bins=edges, color=colours, label=list(known))
        most = axes.get_ylim()[1]
        axes.set_yscale("symlog", linthresh=1, linscale=0.4)  # the few bad ones are what one looks for
        ticks = [0, *(10**power for power in range(8) if 10**power <= most)]
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(0, 2 * most)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        if len(known) > 1:
            axes.legend(fontsize=8, frameon=False, labelcolor=_INK)
    axes.set_xlim(limits)
    _plain(axes)
    axes.set_title(title, fontsize=9, color=_INK, loc="left")


def _class_legend(figure: Figure, names: Sequence[str], bottom: float) -> None:
    colours = {**class_palette(names), "ignored": _IGNORED}
    handles = [Patch(facecolor=_hex(colour), label=name.replace("_", " ")) for name, colour in colours.items()]
    columns = -(-len(handles) // _legend_lines(names, figure.get_figwidth()))
    figure.legend(handles=handles, loc="lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=_INK,
                  handlelength=1.1, columnspacing=1.2, bbox_to_anchor=(0.5, bottom))  # fmt: skip


def _legend_lines(names: Sequence[str], width_in: float) -> int:
    """How many lines the classes need, by the length of their names."""
    return max(1, ceil(sum(0.42 + 0.062 * len(name) for name in (*names, "ignored")) / width_in))


def _plain(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(labelsize=7.5, colors=_MUTED, length=0)
    axes.set_axisbelow(True)


def _bare(axes: Axes) -> None:
    axes.set_axis_off()


def _hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _readable(colour: Sequence[int]) -> str:
    red, green, blue = colour
    return _INK if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "white"

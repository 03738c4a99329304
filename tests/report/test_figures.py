"""What is drawn together, and that drawings say what they were given in colours that can be read."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cromss_dist.report.charts import Chart, Line, chart_groups, split_metric
from cromss_dist.report.figures import (
    Bar,
    draw_chart,
    draw_confusion,
    draw_histogram,
    draw_intervals,
    legend_of,
    shorten,
    thin_out,
)
from cromss_dist.report.run_record import RunRecord, Series, read_run
from cromss_dist.report.style import HEAT_ALPHA, PALETTE, drawing_style, to_png, to_svg


def series(*values: float) -> Series:
    return Series(np.arange(1.0, len(values) + 1), np.array(values, np.float64))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train/loss/total", ("train/loss/total", "", "")),
        ("train/loss/ce_s1", ("train/loss/ce", "s1", "")),
        ("train/kept_s2/flooded_vegetation", ("train/kept", "s2", "flooded_vegetation")),
        ("val/reference_iou_s1/bare", ("val/reference_iou", "s1", "bare")),
        ("val/iou/water", ("val/iou", "", "water")),
        ("perf/samples_per_s", ("perf/samples_per_s", "", "")),
    ],
)
def test_a_metrics_name_has_a_base_a_modality_and_a_class(name: str, parts: tuple[str, str, str]) -> None:
    assert split_metric(name) == parts


def test_modalities_and_runs_share_a_chart_and_every_metric_is_on_one(pretrainings: Path) -> None:
    runs = [read_run(pretrainings / f"run-{seed}") for seed in (0, 1)]
    charts = [chart for group in chart_groups(runs) for chart in group.charts]
    drawn = [(line.run, line.series) for chart in charts for line in chart.lines]
    expected = {id(s) for run in runs for name, s in run.series.items() if name != "train/epoch"}
    assert {id(s) for _, s in drawn} == expected
    assert len(drawn) == len(expected)
    (miou,) = (chart for chart in charts if chart.key == "val/miou")
    assert [(line.run, line.modality) for line in miou.lines] == [(0, "s1"), (0, "s2"), (1, "s1"), (1, "s2")]
    assert miou.share
    titles = [group.title for group in chart_groups(runs)]
    assert titles[:3] == ["Loss", "Scores of the held-out locations", "Agreement and selection"]
    assert "Mean selection weight, by class" in titles


def test_a_metric_that_nobody_knows_is_drawn_last() -> None:
    run = RunRecord(Path("here"), "run", series={"mine/odd": series(1, 2), "train/lr": series(1, 2)})
    assert [[chart.title for chart in group.charts] for group in chart_groups([run])] == [["Learning rate"], ["mine/odd"]]


def test_stretches_of_a_long_line_have_its_means_and_extremes() -> None:
    values = np.arange(1000.0)
    values[3] = np.nan
    places, means, lows, highs = thin_out(Series(np.arange(1000.0), values), 100)
    np.testing.assert_allclose(places, np.arange(100) * 10 + 4.5)
    np.testing.assert_allclose(means[1:], places[1:])
    assert means[0] == pytest.approx((45 - 3) / 9)
    np.testing.assert_array_equal(lows, np.arange(100) * 10)
    np.testing.assert_array_equal(highs, np.arange(100) * 10 + 9)
    nothing = thin_out(Series(np.arange(4.0), np.full(4, np.nan)), 2)
    assert all(np.isnan(part).all() for part in nothing[1:])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (2e7, "20M"), (2e-5, "2e-5"), (4.95e-4, "4.95e-4"), (-4000, "-4k")],
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert shorten(value) == text


def test_one_run_has_a_colour_a_modality_and_several_a_colour_each() -> None:
    lines = [Line(run, modality, series(1)) for run in (0, 1) for modality in ("s1", "s2")]
    assert [(e.label, e.dashed) for e in legend_of(lines[:2], ["a"])] == [("S1", False), ("S2", False)]
    several = legend_of(lines, ["a", "b"])
    assert [(e.label, e.dashed) for e in several] == [("a", False), ("b", False), ("S1", True), ("S2", False)]
    assert several[0].variable != several[1].variable
    assert legend_of([Line(0, "", series(1))], ["a"]) == []


def test_a_drawing_is_an_svg_in_the_pages_colours_with_its_texts_as_text() -> None:
    chart = Chart("key", "title", (Line(0, "s1", series(1, 2, 3)),))
    with drawing_style("one"):
        one = to_svg(draw_chart(chart, ["run"]))
        again = to_svg(draw_chart(chart, ["run"]))
    with drawing_style("other"):
        other = to_svg(draw_chart(chart, ["run"]))
    assert one == again
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert not ids[0] & ids[1]
    assert not re.search(r"(fill|stroke): ?#", one)
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", one)) <= set(PALETTE)
    assert "samples</text>" in one
    assert not re.search(r"<metadata|<style|<\?xml|<!DOCTYPE", one)


def test_a_drawing_alone_is_a_white_png_with_title_and_legend() -> None:
    chart = Chart("key", "A title", (Line(0, "s1", series(1, 2)), Line(1, "s2", series(2, 1))))
    with drawing_style():
        figure = draw_chart(chart, ["$x^{$", "b" * 200], alone=True)
        image = Image.open(io.BytesIO(to_png(figure)))
    assert figure.axes[0].get_title(loc="left") == "A title"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "$x^{$"
    assert len(labels[1]) == 40
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_heat_map_has_the_share_of_each_label_and_stays_empty_where_there_is_none() -> None:
    confusion = np.array([[3, 1, 0], [0, 0, 0], [0, 1, 999]])
    texts = {t.get_position(): t.get_text() for t in draw_confusion(confusion, ["a_b", "c", "d"]).axes[0].texts}
    assert texts == {(0, 0): "75", (1, 0): "25", (1, 2): "<1", (2, 2): "100"}
    cells = draw_confusion(confusion, ["a_b", "c", "d"]).axes[0].patches
    assert [round(cell.get_alpha() or 0, 3) for cell in cells[:3]] == [0.375, 0.125, 0]


def test_intervals_and_tiles_are_drawn_where_they_are() -> None:
    axes = draw_intervals([Bar("a", 50, 48, 53, (49.0, 51.0)), Bar("b", 40, 39, 41, (), 45.0)], "%").axes[0]
    drawn = [[float(x) for x in np.atleast_1d(line.get_xdata())] for line in axes.lines]
    assert drawn == [[48, 53], [49, 51], [50], [39, 41], [], [40], [45]]
    bars = draw_histogram([0.01, 0.52, 0.53, np.nan], 0.5).axes[0]
    assert sum(patch.get_height() for patch in bars.patches) == 3  # type: ignore[attr-defined]


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_can_be_read_in_both_schemes(scheme: int) -> None:
    colours = {name: pair[scheme] for name, pair in PALETTE.items()}
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name in colours.keys() - {"surface", "page", "grid"}:
        assert contrast(colours[name], colours["surface"]) >= 4.5, name
    for name in ("ink", "muted", "series-0"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    mixed = [
        round(HEAT_ALPHA * int(colours["series-0"][i : i + 2], 16) + (1 - HEAT_ALPHA) * int(colours["surface"][i : i + 2], 16))
        for i in (1, 3, 5)
    ]
    assert contrast("#{:02x}{:02x}{:02x}".format(*mixed), colours["ink"]) >= 4.5

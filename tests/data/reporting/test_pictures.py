import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.reporting.land import LAND
from cromss_dist.data.reporting.pictures import (
    choose_locations,
    class_palette,
    draw_class_shares,
    draw_contact_sheet,
    draw_map,
    draw_quality,
    save,
)
from cromss_dist.data.reporting.quality import Quality, measure_location
from cromss_dist.data.sample import ValueSpec
from cromss_dist.data.store.index import open_shards
from cromss_dist.schema import CLASSES
from tests.data.fake_source import FakeSource, spec_of

ROW = Quality("a", 0, 10.0, 50.0, "20200329T010800", "20200323T054639", 0.1, 0.0, 0.0, 1.0, -2.0, 9.0, "water", 0.6, 0.0)


def rendered(figure: Figure) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """The figure's pixels, RGB."""
    canvas = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(match=lambda o: hasattr(o, "get_text")) if text.get_text()]  # type: ignore[attr-defined]


def count(figure: Figure, colour: tuple[int, int, int]) -> int:
    return int((rendered(figure) == colour).all(axis=-1).sum())


def test_locations_are_drawn_by_seed_each_once() -> None:
    assert choose_locations(100, 7, 1) == choose_locations(100, 7, 1)
    assert choose_locations(100, 7, 1) != choose_locations(100, 7, 2)
    assert choose_locations(5, 50, 0) == [0, 1, 2, 3, 4]


def test_classes_of_dynamic_world_have_their_colours_and_others_differ() -> None:
    palette = class_palette(["water", "marsh", "dune", "trees"])
    assert palette["water"] == CLASSES[0].colour
    assert palette["trees"] == CLASSES[1].colour
    assert len(set(palette.values())) == 4


def test_long_names_of_places_and_classes_fit_on_a_sheet_of_one_season(tmp_path: Path) -> None:
    names = tuple(f"a_rather_long_name_of_class_{i}" for i in range(7))
    spec = spec_of(num_seasons=1, values=[ValueSpec("label", names)])
    convert(FakeSource(spec=spec, keys=["103p7755863905_17p9450063992-20200223"]), tmp_path / "out")
    index = open_shards(tmp_path / "out")
    for figure in (draw_contact_sheet(index, [measure_location(index, 0)]), draw_class_shares(index.manifest["class_counts"])):
        rendered(figure)
        boxes = [text.get_window_extent() for text in figure.texts] + [legend.get_window_extent() for legend in figure.legends]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_contact_sheet_shows_each_season_of_each_location(synthetic_shards: Path) -> None:
    index = open_shards(synthetic_shards)
    figure = draw_contact_sheet(index, [measure_location(index, i) for i in (0, 3)])
    assert len([axes for axes in figure.axes if axes.images]) == 2 * 4 * 3
    shown = texts(figure)
    assert [f"season {i}" in shown for i in range(4)] == [True] * 4
    assert any(index.locations[3] in text for text in shown)
    assert "flooded vegetation" in shown
    label = index.read(3, 1, ["label"])["label"][1]
    tile = figure.axes[12 + 5].images[0].get_array()
    assert tile is not None
    np.testing.assert_array_equal(np.asarray(tile), np.array([c.colour for c in CLASSES], np.uint8)[label])


def test_a_location_lies_where_its_coordinates_say(tmp_path: Path) -> None:
    figure = draw_map([10.0, -60.0], [50.0, -10.0])
    (dots,) = [collection for collection in figure.axes[0].collections if np.shape(collection.get_offsets()) == (2, 2)]
    np.testing.assert_array_equal(np.asarray(dots.get_offsets()), [[10, 50], [-60, -10]])
    assert "2 locations" in figure.axes[0].get_title(loc="left")
    save(figure, tmp_path / "map.png")
    first = (tmp_path / "map.png").read_bytes()
    save(draw_map([10.0, -60.0], [50.0, -10.0]), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes() == first


def test_many_locations_become_cells() -> None:
    rng = np.random.default_rng(0)
    figure = draw_map(rng.uniform(-180, 180, 3000), rng.uniform(-60, 80, 3000))
    assert len(figure.axes) == 2
    assert "locations a cell" in figure.axes[1].get_ylabel()


def test_no_location_is_a_map_without_dots() -> None:
    assert "0 locations" in draw_map([], []).axes[0].get_title(loc="left")


def inside(lon: float, lat: float) -> bool:
    """Ray casting over all outlines."""
    hit = False
    for outline in LAND:
        for (x0, y0), (x1, y1) in zip(outline, (*outline[1:], outline[0]), strict=True):
            if (y0 > lat) != (y1 > lat) and lon < x0 + (x1 - x0) * (lat - y0) / (y1 - y0):
                hit = not hit
    return hit


@pytest.mark.parametrize(
    ("lon", "lat", "is_land"),
    [
        (-100, 40, True), (-60, -10, True), (20, 0, True), (100, 60, True), (134, -25, True), (-42, 72, True), (0, -85, True),
        (2.3, 48.9, True), (77, 23, True), (47, -20, True), (-3.7, 40.4, True),
        (-30, 30, False), (-140, 0, False), (80, -30, False), (-20, -30, False), (170, 30, False), (-90, 25, False),
        (5, 39, False), (-85, 60, False), (65, 15, False), (0, 75, False), (-160, -60, False),
    ],
)  # fmt: skip
def test_the_outlines_tell_land_from_sea(lon: float, lat: float, is_land: bool) -> None:
    assert inside(lon, lat) == is_land


def test_class_shares_are_as_wide_as_the_counts_say() -> None:
    figure = draw_class_shares([{"water": 75, "trees": 25, "ignored": 0}, {"water": 0, "trees": 50, "ignored": 50}])
    widths = [patch.get_width() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert widths == [75, 25, 0, 0, 50, 50]
    assert "75 %" in texts(figure)
    assert count(figure, CLASSES[0].colour) > 1.4 * count(figure, (233, 233, 233))


def test_only_confident_shifts_are_drawn() -> None:
    rows = [ROW, dataclasses.replace(ROW, shift_confidence=1.0), dataclasses.replace(ROW, shift_rows_px=4.0)]
    axes = draw_quality(rows).axes[-1]
    np.testing.assert_array_equal(np.asarray(axes.collections[0].get_offsets()), [[-2, 1], [-2, 4]])


def test_quality_that_cannot_be_told_is_said_to_be_unknown() -> None:
    unknown = dict.fromkeys(("cloud_share", "s1_nodata_share", "shift_rows_px", "shift_cols_px", "shift_confidence"), None)
    figure = draw_quality([dataclasses.replace(ROW, **unknown)])  # type: ignore[arg-type]
    assert texts(figure).count("cannot be told from this dataset") >= 2
    rendered(figure)

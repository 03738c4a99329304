import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cromss_dist.data.reporting.quality import (
    SHIFT_CONFIDENCE,
    Quality,
    cloud_mask,
    estimate_shift,
    measure_location,
    nodata_mask,
    write_csv,
)
from cromss_dist.data.store.index import ShardIndex, open_shards
from cromss_dist.data.synthetic import SyntheticConfig
from cromss_dist.data.synthetic.location import synthesise
from cromss_dist.schema import CLASS_NAMES, NORMALISATION, S2_BANDS, Modality

Arrays = dict[str, npt.NDArray[np.uint8]]


class PlantedIndex(ShardIndex):
    """A dataset whose pixels are changed on their way out."""

    plant: Callable[[Arrays], None]

    def read(self, sample_id: int, season: int, arrays: object) -> Arrays:
        found = {name: array.copy() for name, array in super().read(sample_id, season, self.arrays).items()}
        type(self).plant(found)
        return found


def planted(shards: Path, plant: Callable[[Arrays], None]) -> ShardIndex:
    index = open_shards(shards)
    kind = type("Planted", (PlantedIndex,), {"plant": staticmethod(plant)})
    return kind(*(getattr(index, field.name) for field in dataclasses.fields(index)))  # type: ignore[no-any-return]


def stored(modality: Modality, band: str, value: float) -> int:
    """What a physical value is stored as."""
    return int(NORMALISATION[modality].to_uint8(np.full((1, 1, 1), value, np.float32), [band]).item())


def measure(index: ShardIndex, *sample_ids: int) -> list[Quality]:
    return [row for i in sample_ids or range(len(index)) for row in measure_location(index, i)]


@pytest.fixture(scope="module")
def measured(synthetic_shards: Path) -> list[Quality]:
    return measure(open_shards(synthetic_shards))


def test_every_season_of_every_location_is_measured_and_named(measured: list[Quality], synthetic_shards: Path) -> None:
    locations = open_shards(synthetic_shards).locations
    assert [(row.key, row.season) for row in measured] == [(key, season) for key in locations for season in range(4)]
    assert all(row.lon is not None and row.lat is not None and -180 <= row.lon <= 180 for row in measured)
    assert all(row.s2_time is not None and len(row.s2_time) == len("20200323T054639") for row in measured)


def test_clouds_of_synthetic_scenes_are_found_and_clear_ones_stay_clear(measured: list[Quality]) -> None:
    config = SyntheticConfig(num_locations=12, seed=1, size_px=96)
    for i in range(12):
        truth = (synthesise(config, i).cloud > 0.35).mean(axis=(1, 2))
        for season in range(4):
            found = measured[4 * i + season].cloud_share
            assert found is not None
            assert abs(found - truth[season]) < 0.1, (i, season, found, truth[season])


def test_a_planted_cloud_raises_the_share_by_its_area(synthetic_shards: Path, measured: list[Quality]) -> None:
    def plant(arrays: Arrays) -> None:
        arrays["s2_10m"][:3, :48, :48] = 255  # a quarter, brighter than the contract can store
        arrays["s2_20m"][4, :24, :24] = stored("s2", "B11", 3500)

    for row, clear in zip(measure(planted(synthetic_shards, plant), 0, 1), measured, strict=False):
        assert row.cloud_share is not None
        assert clear.cloud_share is not None
        assert row.cloud_share == pytest.approx(clear.cloud_share, abs=0.01) or row.cloud_share >= 0.25
        assert row.cloud_share >= 0.25


@pytest.mark.parametrize(
    ("name", "bands", "is_cloud"),
    [
        ("cloud", {"B2": 0.45, "B4": 0.47, "B11": 0.35}, True),
        ("cloud without B11", {"B2": 0.45, "B4": 0.47}, True),
        ("snow", {"B2": 0.80, "B4": 0.82, "B11": 0.08}, False),
        ("desert", {"B2": 0.25, "B4": 0.45, "B11": 0.60}, False),
        ("forest", {"B2": 0.10, "B4": 0.06, "B11": 0.18}, False),
    ],
)
def test_a_surface_is_cloud_or_not(name: str, bands: dict[str, float], is_cloud: bool) -> None:
    mask = cloud_mask({band: np.full((20, 20), value, np.float32) for band, value in bands.items()})
    assert mask is not None
    assert mask.all() == is_cloud
    assert mask.any() == is_cloud


def test_a_bright_roof_is_no_cloud_and_without_blue_nothing_is_said() -> None:
    image = np.full((20, 20), 0.1, np.float32)
    image[4:8, 4:8] = 0.6
    mask = cloud_mask({"B2": image, "B4": image})
    assert mask is not None
    assert not mask.any()
    assert cloud_mask({"B4": image, "B8": image}) is None


@pytest.mark.parametrize("fill", [0, None], ids=["stored as 0", "stored as what 0 becomes"])
def test_planted_nodata_is_counted_exactly(synthetic_shards: Path, measured: list[Quality], fill: int | None) -> None:
    def plant(arrays: Arrays) -> None:
        for name, modality, scale, bands in (
            ("s1", "s1", 1, ("VV", "VH")),
            ("s2_10m", "s2", 1, ("B2", "B3", "B4", "B8")),
            ("s2_20m", "s2", 2, ("B5", "B6", "B7", "B8A", "B11", "B12")),
            ("s2_60m", "s2", 6, ("B1", "B9", "B10")),
        ):
            for i, band in enumerate(bands):
                value = stored("s1" if modality == "s1" else "s2", band, 0) if fill is None else fill
                arrays[name][i, : 24 // scale] = value  # the upper quarter of 96 px

    for row, plain in zip(measure(planted(synthetic_shards, plant), 1, 2), measured[4:12], strict=True):
        assert plain.s1_nodata_share == 0
        assert plain.s2_nodata_share == 0
        assert row.s1_nodata_share == pytest.approx(0.25)
        assert row.s2_nodata_share == pytest.approx(0.25)


def test_single_dark_pixels_are_no_nodata() -> None:
    image = np.full((2, 12, 12), 90, np.uint8)
    image[:, 3, 3] = image[:, 8, 2:4] = 0
    assert not nodata_mask(image, np.zeros((1, 2), np.uint8)).any()
    image[:, 5:9, 5:9] = 0
    assert nodata_mask(image, np.zeros((1, 2), np.uint8)).sum() == 16


@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (3, -2), (-7, 5)])
def test_a_planted_shift_of_radar_is_found_to_half_a_pixel(rows: int, cols: int) -> None:
    config = SyntheticConfig(num_locations=12, seed=1, size_px=264)
    for i in (1, 3, 5):  # forest, arid, water: clear in some season
        location = synthesise(config, i)
        season = int(location.cloud.mean(axis=(1, 2)).argmin())
        radar = np.roll(location.s1[season].mean(axis=0), (rows, cols), (0, 1))
        optical = np.mean([location.s2[band][season] for band in ("B2", "B3", "B4", "B8")], axis=0)
        shift = estimate_shift(radar, optical.astype(np.float32))
        assert shift.confidence > SHIFT_CONFIDENCE
        assert (shift.rows_px, shift.cols_px) == pytest.approx((rows, cols), abs=1.0), i


def test_images_of_different_places_give_no_confident_shift() -> None:
    rng = np.random.default_rng(0)
    confidences = [
        estimate_shift(rng.normal(size=(96, 96)).astype(np.float32), rng.normal(size=(96, 96)).astype(np.float32)).confidence
        for _ in range(20)
    ]
    assert max(confidences) < SHIFT_CONFIDENCE
    flat = np.zeros((96, 96), np.float32)
    assert estimate_shift(flat, flat).confidence == 0


def test_a_shift_without_confidence_has_no_length(measured: list[Quality]) -> None:
    row = dataclasses.replace(measured[0], shift_rows_px=3.0, shift_cols_px=4.0, shift_confidence=SHIFT_CONFIDENCE + 1)
    assert row.shift_px == pytest.approx(5)
    assert dataclasses.replace(row, shift_confidence=SHIFT_CONFIDENCE - 1).shift_px is None
    assert dataclasses.replace(row, shift_rows_px=None, shift_cols_px=None, shift_confidence=None).shift_px is None


def test_the_dominant_class_is_that_of_the_label(synthetic_shards: Path) -> None:
    def plant(arrays: Arrays) -> None:
        arrays["label"][:] = 255
        arrays["label"][:, :48] = 4
        arrays["label"][:, :12] = 7

    (row, *_) = measure(planted(synthetic_shards, plant), 0)
    assert (row.dominant_class, row.dominant_share, row.ignored_share) == (CLASS_NAMES[4], 0.75, 0.5)


def test_a_label_that_is_all_ignored_has_no_class(synthetic_shards: Path) -> None:
    (row, *_) = measure(planted(synthetic_shards, lambda arrays: arrays["label"].fill(255)), 0)
    assert (row.dominant_class, row.dominant_share, row.ignored_share) == ("", 0, 1)


def test_the_table_has_a_line_a_season_and_nothing_where_nothing_is_known(measured: list[Quality], tmp_path: Path) -> None:
    write_csv(tmp_path / "quality.csv", [measured[0], dataclasses.replace(measured[1], cloud_share=None)])
    with (tmp_path / "quality.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["season"] for line in lines] == ["0", "1"]
    assert lines[1]["cloud_share"] == ""
    assert float(lines[0]["dominant_share"]) == pytest.approx(measured[0].dominant_share, abs=1e-4)


def test_all_thirteen_bands_are_looked_at(synthetic_shards: Path) -> None:
    """Nodata in all bands but one is no nodata."""

    def plant(arrays: Arrays) -> None:
        for name in ("s2_10m", "s2_20m", "s2_60m"):
            arrays[name][:] = 0
        arrays["s2_60m"][2] = 9

    assert S2_BANDS[10] == "B10"
    (row, *_) = measure(planted(synthetic_shards, plant), 0)
    assert row.s2_nodata_share == 0

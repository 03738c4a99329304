import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cromss_dist.data.loading.draws import Draws, split
from cromss_dist.data.loading.selection import Region, Selection, draw_seasons, select
from cromss_dist.data.reporting.quality import Quality, write_csv
from cromss_dist.data.reporting.report import measure
from cromss_dist.data.store.dataset import Places
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import ConfigError
from tests.data.fake_dataset import FakeDataset

DATASET = FakeDataset((5, 0, 7, 3), seed=2)


def measured(dataset: FakeDataset = DATASET, seed: int = 0) -> list[Quality]:
    """An invented measurement of every season, a good part of it unknown."""
    rng = np.random.default_rng(seed)

    def perhaps(value: float) -> float | None:
        return None if rng.random() < 0.2 else float(value)

    return [
        Quality(
            key, season, None, None, None, None,
            cloud_share=perhaps(rng.random()),
            s1_nodata_share=perhaps(rng.random() / 2), s2_nodata_share=perhaps(rng.random() / 2),
            shift_rows_px=perhaps(rng.normal(0, 3)), shift_cols_px=rng.normal(0, 3), shift_confidence=rng.uniform(4, 12),
            dominant_class="trees", dominant_share=1.0, ignored_share=0.0,
        )
        for key in dataset.locations
        for season in range(dataset.num_seasons)
    ]  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Callable[[Sequence[Quality]], Path]:
    def write(rows: Sequence[Quality]) -> Path:
        write_csv(tmp_path / "quality.csv", rows)
        return tmp_path / "quality.csv"

    return write


def allowed(selection: Selection) -> set[tuple[int, int]]:
    """Every (sample id, season) of a selection."""
    return {(int(selection.ids[row]), int(season)) for row, season in np.argwhere(selection.seasons)}


def passing(rows: Sequence[Quality], test: Callable[[Quality], bool]) -> set[tuple[int, int]]:
    return {(DATASET.locations.index(row.key), row.season) for row in rows if test(row)}


def test_without_filters_everything_is_selected() -> None:
    selection = select(DATASET)
    assert selection.ids.tolist() == list(range(15))
    assert selection.seasons.shape == (15, 4)
    assert selection.seasons.all()


def test_seasons_that_are_not_named_are_not_allowed() -> None:
    assert allowed(select(DATASET, seasons=(3, 1))) == {(i, season) for i in range(15) for season in (1, 3)}


def at(lon: Sequence[float], lat: Sequence[float]) -> FakeDataset:
    """A dataset of locations at these places."""
    dataset = FakeDataset((len(lon),))
    none = np.zeros((len(lon), 4), np.int64)
    dataset.places = Places(np.array(lon, float), np.array(lat, float), none, none)
    return dataset


@pytest.mark.parametrize(
    ("region", "inside"),
    [
        ((5, 45, 15, 55), [0, 1]),
        ((10, -90, 10, 90), [0]),
        ((5, 45, 15, 50), [0, 1]),  # borders belong to it
        ((170, -90, -170, 90), [2, 3, 4]),  # across 180 degrees
        ((-180, -90, 180, 90), [0, 1, 2, 3, 4]),
        ((-180, -90, -170, 90), [2, 4]),  # 180 degrees west are 180 degrees east
        ((16, -90, 4, 90), [2, 3, 4]),
    ],
)
def test_a_region_has_what_lies_inside_and_no_unknown_place(region: Region, inside: list[int]) -> None:
    dataset = at([10, 15, 180, 175, -175, np.nan], [50, 45, -20, 0, 0, np.nan])
    assert select(dataset, region=region).ids.tolist() == inside


def test_limits_keep_the_seasons_whose_measures_are_told_and_low(table: Callable[[Sequence[Quality]], Path]) -> None:
    rows = measured()
    quality = table(rows)
    cloud = passing(rows, lambda row: row.cloud_share is not None and row.cloud_share <= 0.5)
    assert allowed(select(DATASET, max_cloud_share=0.5, quality=quality)) == cloud
    highest = max(row.cloud_share for row in rows if row.cloud_share is not None)
    told = passing(rows, lambda row: row.cloud_share is not None)
    assert allowed(select(DATASET, max_cloud_share=round(highest, 4), quality=quality)) == told  # a limit is not over itself

    def little_nodata(row: Quality) -> bool:
        told = [share for share in (row.s1_nodata_share, row.s2_nodata_share) if share is not None]
        return bool(told) and max(told) <= 0.25

    nodata = passing(rows, little_nodata)
    assert allowed(select(DATASET, max_nodata_share=0.25, quality=quality)) == nodata
    # A shift that cannot be told passes.
    shift = passing(rows, lambda row: row.shift_px is None or row.shift_px <= 2.5)
    assert any(row.shift_px is None for row in rows)
    assert allowed(select(DATASET, max_shift_px=2.5, quality=quality)) == shift
    together = select(DATASET, max_cloud_share=0.5, max_nodata_share=0.25, max_shift_px=2.5, seasons=(0, 1), quality=quality)
    assert allowed(together) == {(i, season) for i, season in cloud & nodata & shift if season < 2}
    assert together.seasons.any(axis=1).all()


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"seasons": ()}, r"seasons=\[\].*0 to 3"),
        ({"seasons": (1, 1)}, r"seasons=\[1, 1\]"),
        ({"seasons": (4,)}, r"seasons=\[4\]"),
        ({"region": (0, 10, 5, 5)}, "south <= north"),
        ({"region": (0, 0, 200, 5)}, "-180 to 180"),
        ({"region": (np.nan, 0, 20, 5)}, "region"),
        ({"max_cloud_share": 1.5, "quality": Path("q")}, r"max_cloud_share=1\.5: give a number from 0 to 1"),
        ({"max_shift_px": -1, "quality": Path("q")}, "max_shift_px=-1: give a number from 0 up"),
        ({"max_nodata_share": np.nan, "quality": Path("q")}, "max_nodata_share=nan"),
        ({"max_nodata_share": 0.1}, r"max_nodata_share=0\.1 needs .*quality\.csv"),
        ({"max_nodata_share": 0.1, "quality": Path("absent.csv")}, r"absent\.csv cannot be read .*tools/report\.py"),
    ],
)
def test_a_filter_out_of_range_is_refused(filters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(DATASET, **filters)  # type: ignore[arg-type]


def test_filters_that_leave_nothing_say_what_each_took(table: Callable[[Sequence[Quality]], Path]) -> None:
    rows = measured()
    few = sum(row.season == 1 and row.cloud_share is not None and row.cloud_share <= 0.3 for row in rows)
    told = "nothing of 15 locations: of 60 seasons seasons took 45, region took 15, max_cloud_share took 0"
    with pytest.raises(ConfigError, match=told):
        select(DATASET, seasons=(1,), region=(0, 89, 1, 90), max_cloud_share=0.3, quality=table(rows))
    with pytest.raises(ConfigError, match=f"max_cloud_share took {15 - few}, max_nodata_share took {few}"):
        select(DATASET, seasons=(1,), max_cloud_share=0.3, max_nodata_share=0, quality=table(rows))


def test_a_season_that_the_table_does_not_list_is_an_error_if_it_is_wanted(table: Callable[[Sequence[Quality]], Path]) -> None:
    rows = measured()
    quality = table([row for row in rows if (row.key, row.season) != (DATASET.locations[6], 2)])
    with pytest.raises(ConfigError, match=r"1 seasons of the dataset are not listed \(2-0000006 season 2\).*without --sample"):
        select(DATASET, max_cloud_share=1, quality=quality)
    assert len(select(DATASET, max_cloud_share=1, seasons=(0, 1, 3), quality=quality).ids)


def test_a_table_of_another_dataset_is_refused(table: Callable[[Sequence[Quality]], Path]) -> None:
    with pytest.raises(ConfigError, match="line 2: 3-0000000 season 0 is not in the dataset of 15 locations and 4 seasons"):
        select(DATASET, max_cloud_share=1, quality=table(measured(FakeDataset((15,), seed=3))))
    with pytest.raises(ConfigError, match="season 4 is not in the dataset"):
        select(DATASET, max_cloud_share=1, quality=table(measured(FakeDataset((15,), seed=2, num_seasons=5))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines, lines[3]], r"1 seasons of the dataset are listed more than once"),
        (lambda lines: [lines[0].replace("cloud_share", "clouds"), *lines[1:]], "has no column cloud_share"),
        (lambda lines: [], "has no column key, season"),
        (lambda lines: [*lines[:5], "2-0000001"], "line 6, is malformed"),
        (lambda lines: [*lines[:5], lines[5].replace(",trees", "x,trees")], "line 6, is malformed"),
        (lambda lines: [*lines, '"' + "x" * 200_000], "no table of comma-separated values"),
        (lambda lines: [*lines, "\udcff"], "no table of comma-separated values"),
    ],
)
def test_a_damaged_table_is_refused(
    damage: Callable[[list[str]], list[str]], message: str, table: Callable[[Sequence[Quality]], Path]
) -> None:
    quality = table(measured())
    lines = damage(quality.read_text().splitlines())
    quality.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        select(DATASET, max_cloud_share=1, quality=quality)


def test_the_table_that_the_report_writes_of_a_dataset_is_read(synthetic_shards: Path, tmp_path: Path) -> None:
    locations = measure(synthetic_shards, sample=None, seed=0, workers=1)
    write_csv(tmp_path / "quality.csv", [row for rows in locations for row in rows])
    selection = select(open_dataset(synthetic_shards), max_cloud_share=0.05, quality=tmp_path / "quality.csv")
    clear = {(i, row.season) for i, rows in enumerate(locations) for row in rows if (row.cloud_share or 0) <= 0.05}
    assert allowed(selection) == clear
    assert 0 < len(clear) < 48


def test_the_table_is_read_by_its_column_names(table: Callable[[Sequence[Quality]], Path], tmp_path: Path) -> None:
    quality = table(measured())
    with quality.open(newline="") as file:
        rows = [row[::-1] for row in csv.reader(file)]
    with (tmp_path / "turned.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *rows[:0:-1]])
    one, other = (select(DATASET, max_cloud_share=0.4, quality=path) for path in (quality, tmp_path / "turned.csv"))
    assert one.digest == other.digest


def test_the_digest_names_the_outcome() -> None:
    full = select(DATASET)
    assert select(DATASET, seasons=range(4), region=(-180, -90, 180, 90)).digest == full.digest
    parts = [full.take(np.arange(14)), full.take(np.arange(1, 15))]
    others = [select(DATASET, seasons=(0, 1)), select(DATASET, seasons=(1, 0)), *parts]
    assert others[0].digest == others[1].digest
    assert len({full.digest, *(other.digest for other in others)}) == 4


def test_the_digest_has_its_golden_value() -> None:
    # It is part of the state of a run: another one refuses to go on.
    assert select(DATASET, seasons=(0, 2)).take(np.array([1, 4])).digest[:16] == "7010e4144f878344"


def test_a_split_of_a_selection_keeps_its_seasons_and_counts_its_shards(table: Callable[[Sequence[Quality]], Path]) -> None:
    selection = select(DATASET, max_cloud_share=0.3, quality=table(measured()))
    keys = [DATASET.locations[i] for i in selection.ids]
    parts = [selection.take(places) for places in split(keys, 0.3, seed=1)]
    assert allowed(parts[0]) | allowed(parts[1]) == allowed(selection)
    assert not allowed(parts[0]) & allowed(parts[1])
    for part in (*parts, selection):
        shard_of = np.repeat(np.arange(4), DATASET.sizes)[part.ids]
        assert part.sizes(DATASET.shard_sizes).tolist() == np.bincount(shard_of, minlength=4).tolist()


def test_seasons_are_drawn_uniformly_among_the_allowed() -> None:
    uniform = Draws(0, np.zeros(30_000, np.int64), np.arange(30_000)).season
    every = np.array([[bool(mask >> season & 1) for season in range(4)] for mask in range(1, 16)])
    masks = every[np.arange(30_000) % 15]
    drawn = draw_seasons(uniform, masks)
    assert masks[np.arange(30_000), drawn].all()
    for mask in range(15):
        shares = np.bincount(drawn[mask::15], minlength=4) / 2000
        np.testing.assert_allclose(shares, every[mask] / every[mask].sum(), atol=0.04)


def test_where_all_seasons_are_allowed_the_draw_is_the_fourth_it_falls_in() -> None:
    uniform = np.array([0, 0.2499, 0.25, 0.5, 0.75, np.nextafter(1, 0)])
    assert draw_seasons(uniform, np.ones((6, 4), bool)).tolist() == [0, 0, 1, 2, 3, 3]
    assert draw_seasons(uniform, np.tile([True, True, False, True], (6, 1))).tolist() == [0, 0, 0, 1, 3, 3]

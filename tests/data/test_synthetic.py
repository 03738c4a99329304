"""The synthetic archive: same bytes for the same config, the true layout, and noise that is what its kinds say."""

import csv
import hashlib
import json
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.synthetic import PLACES, Location, SyntheticConfig, synthesise, write_archive
from cromss_dist.data.synthetic import archive as synthetic_archive
from cromss_dist.data.synthetic.fields import borders, fractal_field, gaussian_field, parcels
from cromss_dist.data.synthetic.landscape import CROPS, SNOW, TREES, WATER
from cromss_dist.data.synthetic.radar import _speckle
from cromss_dist.data.synthetic.report import count, make_report
from cromss_dist.data.synthetic.settings import Stream
from cromss_dist.errors import ConfigError, OutputExistsError
from cromss_dist.schema import IMAGE_ARRAYS, NOISE_KINDS, S2_BANDS

SMALL = SyntheticConfig(num_locations=2, seed=7, size_px=48)


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file below `root`, by relative path."""
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "archive"
    write_archive(out, SMALL)
    return out


@pytest.fixture(scope="module")
def locations() -> list[Location]:
    """Two of each kind of place, large enough for rates to mean something."""
    config = SyntheticConfig(seed=3, size_px=96)
    return [synthesise(config, index) for index in range(2 * len(PLACES))]


def test_equal_configs_give_equal_bytes_whatever_the_workers(small: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "again", SMALL, workers=2)
    assert digests(tmp_path / "again") == digests(small)


def test_a_location_does_not_depend_on_how_many_there_are(small: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "one", replace(SMALL, num_locations=1))
    one, two = digests(tmp_path / "one"), digests(small)
    shared = [path for path in one if "/0000000/" in path]
    assert len(shared) == 4 * (3 + 14 + 3)
    assert all(one[path] == two[path] for path in shared)


def test_another_seed_gives_other_images() -> None:
    assert not np.array_equal(synthesise(SMALL, 0).s1, synthesise(replace(SMALL, seed=8), 0).s1)


@pytest.mark.parametrize("noise", ["none", "uniform", "image-only"])
def test_noise_changes_labels_and_neither_images_nor_truth(noise: str) -> None:
    default, other = synthesise(SMALL, 1), synthesise(replace(SMALL, noise=noise), 1)  # type: ignore[arg-type]
    assert np.array_equal(default.s1, other.s1)
    assert np.array_equal(default.truth, other.truth)
    assert all(np.array_equal(default.s2[band], other.s2[band]) for band in S2_BANDS)
    assert not np.array_equal(default.label, other.label)


def test_files_have_the_size_type_and_grid_of_the_real_archive(small: Path) -> None:
    with (small / "dw_complete_ids.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["ids", "sub1", "sub2", "sub3", "sub4"]
    assert [row[0] for row in rows] == ["0", "1"]
    for number, *scenes in rows:
        key = f"{int(number):07d}"
        assert scenes == sorted(scenes) == sorted(path.name for path in (small / "s2c" / key).iterdir())
        for scene in scenes:
            corners = set()
            for spec in IMAGE_ARRAYS:
                for band in spec.bands if spec.modality == "s2" else ():
                    with rasterio.open(small / "s2c" / key / scene / f"{band}.tif") as tif:
                        assert (tif.shape, tif.dtypes, tif.nodata) == ((48 // spec.scale,) * 2, ("uint16",), None)
                        assert "compress" not in tif.profile
                        corners.add((round(tif.bounds.left, 9), round(tif.bounds.bottom, 9), tif.crs.to_epsg()))
            assert len(corners) == 1
            for folder, name in (("dw_noisy_labels", "label"), ("reference_labels", "label"), ("noise_kinds", "kind")):
                with rasterio.open(small / folder / key / scene / f"{name}.tif") as tif:
                    assert (tif.shape, tif.dtypes) == ((48, 48), ("uint8",))
        for path in (small / "s1" / key).iterdir():
            metadata = json.loads((path / "metadata.json").read_text())
            assert metadata["system:index"] == path.name
            corners_lat = [lat for _, lat in metadata["system:footprint"]["coordinates"]]
            assert (max(corners_lat) - min(corners_lat)) * 111_320 == pytest.approx(48 * 10, abs=0.01)
            for band in ("VV", "VH"):
                with rasterio.open(path / f"{band}.tif") as tif:
                    assert (tif.shape, tif.dtypes) == ((48, 48), ("float32",))


def test_files_hold_the_location_in_memory(small: Path) -> None:
    location = synthesise(SMALL, 1)
    site = location.site
    for season in range(4):
        with rasterio.open(small / "s1" / "0000001" / site.s1_scenes[season] / "VH.tif") as tif:
            assert np.array_equal(tif.read(1), location.s1[season, 1])
        with rasterio.open(small / "s2c" / "0000001" / site.s2_scenes[season] / "B8A.tif") as tif:
            assert np.array_equal(tif.read(1), location.s2["B8A"][season])
        with rasterio.open(small / "noise_kinds" / "0000001" / site.s2_scenes[season] / "kind.tif") as tif:
            assert np.array_equal(tif.read(1), location.kind[season])


def test_the_archive_reader_takes_it_and_pairs_the_seasons(small: Path) -> None:
    archive = open_archive(small)
    assert archive.keys == ("0000000", "0000001")
    for index, key in enumerate(archive.keys):
        sample, location = archive.read(key), synthesise(SMALL, index)
        assert np.array_equal(sample.arrays["label"], location.label)
        assert np.array_equal(sample.arrays["reference"], location.truth)
        assert np.array_equal(sample.arrays["kind"], location.kind)
        assert sample.arrays["s1"].shape == (4, 2, 48, 48)


def test_s1_names_do_not_sort_by_date_and_lie_within_days_of_s2() -> None:
    for index in range(12):
        site = synthesise(replace(SMALL, num_locations=12), index).site
        by_name = [name.split("_")[4] for name in sorted(site.s1_scenes)]
        assert by_name != sorted(by_name)
        assert list(site.s2_times) == sorted(site.s2_times)
        for s1, s2, name in zip(site.s1_times, site.s2_times, site.s1_scenes, strict=True):
            assert abs((s1 - s2).total_seconds()) < 6 * 86400
            assert name.split("_")[4] == datetime.strftime(s1, "%Y%m%dT%H%M%S")


def test_kind_is_right_exactly_where_the_label_is_the_truth(locations: list[Location]) -> None:
    for location in locations:
        assert np.array_equal(location.kind == 0, location.label == location.truth)
        assert location.kind.max() < len(NOISE_KINDS)
        assert location.label.max() <= 8


def test_noise_rates_are_in_the_stated_ranges(locations: list[Location]) -> None:
    kinds = np.bincount(np.concatenate([one.kind.ravel() for one in locations]), minlength=5) / sum(
        one.kind.size for one in locations
    )
    assert 0.28 <= 1 - kinds[0] <= 0.37
    assert 0.05 <= kinds[1] <= 0.11  # border; more of it in small patches
    assert 0.10 <= kinds[2] <= 0.15  # confusion
    assert 0.06 <= kinds[3] <= 0.12  # appearance
    assert 0.005 <= kinds[4] <= 0.05  # cloud
    shares = np.bincount(np.concatenate([one.truth.ravel() for one in locations]), minlength=9) / sum(
        one.truth.size for one in locations
    )
    assert (shares > 0.01).all()


def test_cloud_errors_lie_in_cloudy_scenes_and_border_errors_near_borders(locations: list[Location]) -> None:
    for location in locations:
        for season in range(4):
            if location.cloud[season].max() == 0:
                assert not (location.kind[season] == NOISE_KINDS.index("cloud")).any()
    strata = make_report(12, sum((count(x.truth, x.label, x.kind, x.cloud) for x in locations[1:]), _count(locations[0])))
    near, far = strata.noise_by_distance["0-1 px"], strata.noise_by_distance["over 8 px"]
    assert near is not None
    assert far is not None
    assert near > 1.5 * far


def _count(location: Location):  # type: ignore[no-untyped-def]
    return count(location.truth, location.label, location.kind, location.cloud)


@pytest.mark.parametrize("noise", ["default", "image-only"])
def test_the_truth_is_the_most_frequent_label_of_each_class(locations: list[Location], noise: str) -> None:
    made = locations
    if noise != "default":
        config = SyntheticConfig(seed=3, size_px=96, noise=noise)  # type: ignore[arg-type]
        made = [synthesise(config, one.index) for one in locations]
    pairs = np.zeros((9, 9), np.int64)
    for one in made:
        np.add.at(pairs, (one.truth.ravel(), one.label.ravel()), 1)
    assert pairs.argmax(axis=1).tolist() == list(range(9))


def test_controls_are_what_they_say() -> None:
    none = synthesise(replace(SMALL, noise="none"), 0)
    assert np.array_equal(none.label, none.truth)
    assert none.kind.max() == 0
    uniform = synthesise(replace(SMALL, noise="uniform"), 0)
    assert (uniform.label != uniform.truth).mean() == pytest.approx(0.33, abs=0.02)
    image_only = synthesise(replace(SMALL, noise="image-only"), 0)
    assert set(np.unique(image_only.kind)) <= {0, NOISE_KINDS.index("appearance")}
    assert (image_only.kind > 0).mean() > 0.05


def test_season_share_decides_how_much_the_seasons_err_alike() -> None:
    def alike(share: float) -> float:
        made = [synthesise(SyntheticConfig(seed=1, size_px=48, season_share=share), i) for i in (0, 1, 2)]
        return float(np.mean([((x.kind == 2).all(axis=0)).mean() for x in made]))

    assert alike(0.95) > 3 * alike(0.0)


def test_values_are_physical(locations: list[Location]) -> None:
    for location in locations:
        assert np.isfinite(location.s1).all()
        assert location.s1.min() >= -45
        assert location.s1.max() <= 25
        for band, values in location.s2.items():
            assert values.min() >= 1
            assert values.max() < 20000, band
        clear = location.cloud[:, ::6, ::6] == 0
        assert np.median(location.s2["B10"][clear]) < 60
        assert np.percentile(location.s2["B1"][clear], 2) > 800  # path radiance


def test_classes_differ_in_the_bands_where_they_should(locations: list[Location]) -> None:
    truth = np.concatenate([x.truth.ravel() for x in locations])
    clear = np.concatenate([x.cloud.ravel() for x in locations]) == 0
    vv, vh = (np.concatenate([x.s1[:, band].ravel() for x in locations]) for band in (0, 1))
    red, nir = (np.concatenate([x.s2[band].ravel() for x in locations]).astype(float) for band in ("B4", "B8"))

    def mean(values: np.ndarray, cls: int) -> float:
        return float(values[clear & (truth == cls)].mean())

    assert mean(vv, WATER) < mean(vv, CROPS) - 3
    assert mean(vh, TREES) > mean(vh, CROPS) + 2
    assert mean(nir, WATER) < 800 < mean(nir, TREES)
    assert mean(red, SNOW) > 3500 > mean(red, CROPS)


def test_s1_shift_moves_the_radar_and_nothing_else() -> None:
    still, moved = synthesise(SMALL, 5), synthesise(replace(SMALL, s1_shift_px=3), 5)
    assert not np.array_equal(still.s1, moved.s1)
    assert np.array_equal(still.truth, moved.truth)
    assert np.array_equal(still.s2["B2"], moved.s2["B2"])


def test_fields_have_unit_variance_and_the_asked_scale() -> None:
    rng = np.random.default_rng(0)
    for scale in (1.0, 4.0):
        field = gaussian_field(rng, 512, scale)
        assert field.std() == pytest.approx(1, abs=0.1)
        # A field blurred with s has the correlation exp(-d ** 2 / (4 s ** 2)).
        step = int(2 * scale)
        assert np.mean(field[:, step:] * field[:, :-step]) == pytest.approx(np.exp(-1), abs=0.08)
    assert fractal_field(rng, 512, 2.5, 40).std() == pytest.approx(1, abs=0.15)


def test_speckle_is_gamma_noise_of_the_given_looks() -> None:
    speckle = _speckle(np.random.default_rng(0), 512, 5)
    assert speckle.mean() == pytest.approx(1, abs=0.02)
    assert speckle.var() == pytest.approx(1 / 5, rel=0.1)
    assert speckle.min() > 0


def test_parcels_are_connected_patches_of_the_asked_size() -> None:
    ids = parcels(np.random.default_rng(0), 264, 25, 3)
    sizes = np.unique(ids, return_counts=True)[1]
    assert 300 < np.median(sizes) < 2500
    assert borders(ids).mean() < 0.2


def test_distance_and_agreement_counts_match_a_hand_made_patch() -> None:
    truth = np.zeros((4, 6, 12), np.uint8)
    truth[:, :, 6:] = 1
    label, kind = truth.copy(), np.zeros_like(truth)
    label[:, 0, 0] = 4  # wrong in all seasons, 6 px from the border
    label[0, 1, 5] = 1  # wrong once, on the border
    kind[label != truth] = 1
    report = make_report(1, count(truth, label, kind, np.zeros(truth.shape, np.float32)))
    assert report.noise_rate == pytest.approx(5 / 288, abs=1e-5)
    assert report.class_shares["water"] == report.class_shares["trees"] == 0.5
    assert report.noise_by_kind["border"] == pytest.approx(5 / 288, abs=1e-5)
    assert report.noise_by_distance["0-1 px"] == pytest.approx(1 / 48, abs=1e-5)
    assert report.noise_by_distance["4-8 px"] == pytest.approx(4 / (4 * 6 * 4), abs=1e-5)
    assert report.seasons_agree == pytest.approx(71 / 72, abs=1e-5)
    assert report.wrong_in_all_seasons == report.wrong_in_most_seasons == pytest.approx(1 / 72, abs=1e-5)
    assert report.noise_by_class["snow"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size_px": 100}, "multiple of 6"),
        ({"size_px": 42}, "at least 48"),
        ({"size_px": 1206}, "at most 1200"),
        ({"num_locations": 0}, "num_locations=0"),
        ({"seed": -1}, "seed=-1"),
        ({"noise": "much"}, "image-only"),
        ({"cloudy_share": 1.5}, r"cloudy_share=1\.5"),
    ],
)
def test_a_wrong_parameter_says_what_is_allowed(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_no_output_is_replaced_unless_asked_and_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "archive"
    config = replace(SMALL, num_locations=1)
    write_archive(out, config)
    before = digests(out)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_archive(out, config)
    (out / "stale").touch()
    write_archive(out, config, overwrite=True)
    assert digests(out) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(OutputExistsError, match="left alone"):
        write_archive(mine, config, overwrite=True)
    assert (mine / "thesis.txt").exists()
    monkeypatch.chdir(out)
    write_archive(Path("."), config, overwrite=True)
    assert digests(out) == before
    assert sorted(os.listdir(tmp_path)) == ["archive", "mine"]


def test_a_failure_leaves_nothing_behind_and_keeps_the_old_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "archive"
    write_archive(out, replace(SMALL, num_locations=1))
    before = digests(out)

    def fail(config: SyntheticConfig, index: int) -> Location:
        if index == 1:
            raise RuntimeError("disk full")
        return synthesise(config, index)

    monkeypatch.setattr(synthetic_archive, "synthesise", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_archive(out, SMALL, overwrite=True)
    with pytest.raises(RuntimeError, match="disk full"):
        write_archive(tmp_path / "new", SMALL)
    assert digests(out) == before
    assert os.listdir(tmp_path) == ["archive"]


def test_progress_counts_up_to_the_number_of_locations(tmp_path: Path) -> None:
    seen: list[int] = []
    write_archive(tmp_path / "archive", SMALL, seen.append)
    assert seen == [1, 2]


def test_streams_of_a_location_are_independent() -> None:
    draws = {(i, s): SMALL.generator(i, s).random() for i in range(3) for s in Stream}
    assert len(set(draws.values())) == len(draws)

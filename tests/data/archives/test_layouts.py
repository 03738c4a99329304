"""Every shipped description, and invented ones, against pixels that were written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from cromss_dist.data.archives.layout.description import ArchiveDescription
from cromss_dist.data.archives.layout.typed_yaml import parse
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.sample import Rejected, Source
from cromss_dist.errors import ArchiveMissingError
from cromss_dist.schema import NORMALISATION, S2_BANDS
from tests.data.archives.layouts import Drawer, Pixels, write_bands, write_tiles

NAMES = ("-0.7588967520_38.1058157001-20190918", "103p7755863905_17p9450063992-20200223")
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def describe(text: str) -> ArchiveDescription:
    return parse(ArchiveDescription, text, "test")


def assert_tile(source: Source, key: str, s1: Pixels, s2: Pixels, label: Pixels) -> None:
    """One season; images are normalised, the label is given as it should come out."""
    arrays = source.read(key).arrays
    np.testing.assert_array_equal(arrays["s1"][0], NORMALISATION["s1"].to_uint8(s1, ["VV", "VH"]))
    np.testing.assert_array_equal(arrays["s2"][0], NORMALISATION["s2"].to_uint8(s2, S2_BANDS))
    np.testing.assert_array_equal(arrays["label"][0], label)


def minus_one(stored: Pixels, cloud: int | None = None) -> Pixels:
    ignored = (stored == 0) | (stored == cloud if cloud is not None else False)
    return np.where(ignored, 255, stored.astype(np.int16) - 1)


@pytest.mark.parametrize(
    ("split", "label", "top"), [("dw_train", "dw", 10), ("dw_test", "dw", 10), ("osm_train", "osm", 13), ("osm_test", "osm", 13)]
)
def test_downstream_tiles_are_found_out_and_their_labels_are_lowered_by_one(
    split: str, label: str, top: int, tmp_path: Path
) -> None:
    written = write_tiles(tmp_path, NAMES, split, label, top, 32)
    source = open_archive(tmp_path)
    assert source.keys == NAMES
    assert (source.spec.patch_px, source.spec.num_seasons, source.spec.names) == (32, 1, ("s1", "s2", "label"))
    assert len(source.spec.values[0].values) == {"dw": 9, "osm": 13}[label]
    for name in NAMES:
        stored = written[f"{split}/label_{label}/{label}_{name}.tif"][0]
        expected = minus_one(stored, 10 if label == "dw" else None)
        assert_tile(
            source, name, written[f"{split}/image_s1/s1_{name}.tif"], written[f"{split}/image_s2/s2_{name}.tif"], expected
        )
    season = source.read(NAMES[0]).metadata["seasons"][0]
    assert (season["s2_scene"], season["s2_time"]) == (None, "20190918T000000")
    assert season["transform"] == [10, 0, 400000, 0, -10, 5000000]


@pytest.mark.parametrize(("split", "size_px"), [("dw_train", 510), ("dw_test", 512)])
def test_real_tiles_equal_what_rasterio_reads(split: str, size_px: int) -> None:
    root = SHARED / "dw_real_mini"
    if not root.is_dir():
        pytest.skip("shared/data/dw_real_mini is not beside the repository")
    source = open_archive(root, split)
    assert source.spec.patch_px == size_px
    for key in source.keys:
        pixels = []
        for file in (f"image_s1/s1_{key}", f"image_s2/s2_{key}", f"label_dw/dw_{key}"):
            with rasterio.open(root / split / f"{file}.tif") as dataset:
                pixels.append(dataset.read())
        s1, s2, label = pixels
        assert_tile(source, key, s1, s2, minus_one(label[0], 10))


@pytest.mark.parametrize("top", ["ROIs0000_test/{}_0", "test/{}_test"])
def test_dfc2020_classes_become_those_of_dynamic_world(top: str, tmp_path: Path) -> None:
    draw = Drawer()
    s1 = write_bands(tmp_path / top.format("s1") / "ROIs0000_test_s1_0_p7.tif", draw.db(2, 16).astype(np.float64))
    s2 = write_bands(tmp_path / top.format("s2") / "ROIs0000_test_s2_0_p7.tif", draw.reflectance(13, 16))
    stored = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 255, 300, 1, 1], np.uint16), (16, 1))
    write_bands(tmp_path / top.format("dfc") / "ROIs0000_test_dfc_0_p7.tif", stored)
    ours = np.tile(np.array([255, 1, 5, 255, 2, 3, 4, 6, 255, 7, 0, 255, 255, 255, 1, 1]), (16, 1))
    assert_tile(open_archive(tmp_path), "test_p7", s1, s2, ours)


def test_date_folders_other_band_names_and_a_label_for_all_seasons(tmp_path: Path) -> None:
    draw = Drawer()
    dates = ("2021-04-02", "2021-07-05", "2021-10-08")
    for region in ("north-1", "south-2"):
        for date in dates:
            write_bands(tmp_path / f"{date}/{region}/radar.tif", draw.db(2, 24)[::-1])
            for band, size in (("B02", 24), ("B08", 24), ("B8A", 12)):
                write_bands(tmp_path / f"{date}/{region}/{band}.tif", draw.reflectance(1, size))
        write_bands(tmp_path / f"masks/{region}.tif", draw.classes(1, 2, 24))
    source = open_archive(
        tmp_path,
        describe(
            r"""
            name: dated
            fields: {region: '[a-z]+-\d'}
            key: '{region}'
            seasons: 3
            images:
              s1: {path: '{time}/{region}/radar.tif', bands: {VV: 2, VH: 1}, gsd_m: 10}
              s2: {path: '{time}/{region}/{band}.tif', bands: {B2: B02, B8: B08, B8A: B8A}}
            values:
              label: {path: 'masks/{region}.tif', classes: [field, forest], map: {1: 0, 2: 1}}
            """
        ),
    )
    assert source.keys == ("north-1", "south-2")
    assert source.spec.names == ("s1", "s2_10m", "s2_20m", "label")
    sample = source.read("south-2")
    for season, date in enumerate(dates):
        folder = tmp_path / date / "south-2"
        with rasterio.open(folder / "radar.tif") as dataset:
            expected = NORMALISATION["s1"].to_uint8(dataset.read([2, 1]), ["VV", "VH"])
        np.testing.assert_array_equal(sample.arrays["s1"][season], expected)
        with rasterio.open(folder / "B8A.tif") as dataset:
            expected = NORMALISATION["s2"].to_uint8(dataset.read(), ["B8A"])
        np.testing.assert_array_equal(sample.arrays["s2_20m"][season], expected)
        with rasterio.open(tmp_path / "masks/south-2.tif") as dataset:
            np.testing.assert_array_equal(sample.arrays["label"][season], dataset.read(1) - 1)
    assert [season["s2_time"] for season in sample.metadata["seasons"]] == [
        "20210402T000000",
        "20210705T000000",
        "20211008T000000",
    ]


ONE_MODALITY = r"""
name: optical
fields: {id: '\d+'}
seasons: 2
images:
  s2:
    path: s2/{id}_{scene}.tif
    scene: winter|summer
    bands: [B5, B6]
    units: reflectance
    normalisation: {mean: {B5: 2000, B6: 2000}, std: {B5: 1000, B6: 500}}
values:
  label: {path: 'truth/{id}_{scene}.tif', classes: [a, b]}
"""


def test_one_modality_of_20_m_in_reflectance_with_own_statistics_and_seasons_by_name(tmp_path: Path) -> None:
    for scene, value in (("winter", 0.2), ("summer", 0.25)):
        write_bands(tmp_path / f"s2/4_{scene}.tif", np.full((2, 8, 8), value, np.float32))
        write_bands(tmp_path / f"truth/4_{scene}.tif", np.full((16, 16), scene == "winter", np.uint8))
    source = open_archive(tmp_path, describe(ONE_MODALITY))
    assert (source.spec.patch_px, source.spec.shape("s2")) == (16, (2, 2, 8, 8))
    sample = source.read("4")  # in order of the names, as there is no time: summer, winter
    assert sample.arrays["s2"][:, :, 0, 0].tolist() == [[159, 191], [127, 127]]  # 255 (v - (mean - 2 std)) / (4 std)
    assert sample.arrays["label"][:, 0, 0].tolist() == [0, 1]
    season = sample.metadata["seasons"][0]
    assert (season["s1_scene"], season["s2_scene"], season["s2_time"]) == (None, "summer", None)
    assert season["transform"] == [5, 0, 400000, 0, -5, 5000000]


TWO_BANDS = """
name: picked
fields: {id: '[0-9]+'}
images:
  s2: {path: '{id}.tif', bands: %s, gsd_m: 10}
values:
  label: {path: 'label_{id}.tif', classes: [a, b]}
"""


@pytest.mark.parametrize(
    ("bands", "count", "reason"),
    [
        ("[B2, B3]", 3, "wrong_bands"),
        ("[B2, B3]", 1, "wrong_bands"),
        ("{B2: 3, B3: 1}", 2, "wrong_bands"),
        ("{B2: 3, B3: 1}", 4, None),
    ],
)
def test_a_list_names_all_bands_of_a_file_and_a_mapping_picks_some(
    bands: str, count: int, reason: str | None, tmp_path: Path
) -> None:
    pixels = write_bands(tmp_path / "1.tif", Drawer().reflectance(count, 16))
    write_bands(tmp_path / "label_1.tif", np.ones((16, 16), np.uint8))
    source = open_archive(tmp_path, describe(TWO_BANDS % bands))
    if reason is None:
        expected = NORMALISATION["s2"].to_uint8(pixels[[2, 0]], ["B2", "B3"])
        np.testing.assert_array_equal(source.read("1").arrays["s2"][0], expected)
    else:
        with pytest.raises(Rejected) as rejected:
            source.read("1")
        assert rejected.value.reason == reason


def test_tiles_without_b10_are_l2a(tmp_path: Path) -> None:
    write_tiles(tmp_path, NAMES[:1], "dw_train", "dw", 10, 32)
    write_bands(tmp_path / f"dw_train/image_s2/s2_{NAMES[0]}.tif", Drawer().reflectance(12, 32))
    with pytest.raises(Rejected, match="l2a"):
        open_archive(tmp_path).read(NAMES[0])


def test_two_files_for_one_place_are_no_choice_of_ours(tmp_path: Path) -> None:
    draw = Drawer()
    for folder in ("test/{}_test", "ROIs0000_test/{}_0"):
        write_bands(tmp_path / folder.format("s1") / "ROIs0000_test_s1_0_p7.tif", draw.db(2, 16))
        write_bands(tmp_path / folder.format("s2") / "ROIs0000_test_s2_0_p7.tif", draw.reflectance(13, 16))
        write_bands(tmp_path / folder.format("dfc") / "ROIs0000_test_dfc_0_p7.tif", draw.classes(1, 10, 16))
    with pytest.raises(Rejected, match="conflicting_duplicate"):
        open_archive(tmp_path).read("test_p7")


def test_a_layout_whose_files_are_not_there_says_which(tmp_path: Path) -> None:
    written: Any = write_tiles(tmp_path, NAMES, "dw_train", "dw", 10, 32)
    for path in written:
        if "label_dw" in path:
            (tmp_path / path).unlink()
    with pytest.raises(ArchiveMissingError, match=r"dw_train it lacks label \(dw_train/label_dw"):
        open_archive(tmp_path)

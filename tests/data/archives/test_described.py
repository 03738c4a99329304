import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, UnreadableInputError
from cromss_dist.schema import IMAGE_ARRAYS, NORMALISATION
from tests.data.tiny_archive import KEYS, LABEL, PATCH_PX, S1_SCENES, S2_FOLDER, S2_SCENES, TRAPS, write_tif


def pixels(path: Path) -> npt.NDArray[np.generic]:
    with rasterio.open(path) as dataset:
        return dataset.read(1)  # type: ignore[no-any-return]


def assert_sample_equals_files(root: Path, key: str) -> None:
    """Every array against what rasterio reads from the scene that the metadata names."""
    sample = open_archive(root).read(key)
    for season, scene in enumerate(sample.metadata["seasons"]):
        for spec in IMAGE_ARRAYS:
            folder = root / ("s1" if spec.modality == "s1" else "s2c") / key / scene[f"{spec.modality}_scene"]
            for index, band in enumerate(spec.bands):
                assert spec.modality is not None
                expected = NORMALISATION[spec.modality].to_uint8(pixels(folder / f"{band}.tif")[None], [band])[0]
                np.testing.assert_array_equal(sample.arrays[spec.name][season, index], expected)
        label = root / "dw_noisy_labels" / key / scene["s2_scene"] / "label.tif"
        np.testing.assert_array_equal(sample.arrays["label"][season], pixels(label))


def test_arrays_equal_the_files_after_normalisation(archive_root: Path) -> None:
    for key in KEYS:
        assert_sample_equals_files(archive_root, key)


def test_arrays_of_real_locations_equal_the_files_after_normalisation(mini_archive: Path) -> None:
    assert open_archive(mini_archive).spec.patch_px == 264
    for key in ("0000200", "0900505"):
        assert_sample_equals_files(mini_archive, key)


def test_seasons_are_paired_by_acquisition_time_not_by_name(archive_root: Path) -> None:
    seasons = open_archive(archive_root).read("0000003").metadata["seasons"]
    assert [season["s1_scene"] for season in seasons] == list(S1_SCENES) != sorted(S1_SCENES)
    assert [season["s2_scene"] for season in seasons] == list(S2_SCENES)
    assert [season["s1_time"][:8] for season in seasons] == ["20200329", "20200627", "20200928", "20201230"]


def test_place_and_crs_are_those_of_the_files(archive_root: Path) -> None:
    metadata = open_archive(archive_root).read("0000003").metadata
    assert metadata["lon"] == pytest.approx(73 + PATCH_PX / 2 * 9e-5, abs=1e-6)
    assert metadata["lat"] == pytest.approx(30 - PATCH_PX / 2 * 9e-5, abs=1e-6)
    assert metadata["seasons"][0]["crs"] == "EPSG:4326"


def test_a_place_off_the_earth_is_stored_as_none(archive_root: Path) -> None:
    with rasterio.open(archive_root / "s2c" / KEYS[0] / S2_SCENES[0] / "B2.tif", "r+") as dataset:
        dataset.transform, dataset.crs = rasterio.Affine(1e12, 0, 1e30, 0, -1e12, 1e30), "EPSG:32633"
    metadata = open_archive(archive_root).read(KEYS[0]).metadata
    assert (metadata["lon"], metadata["lat"], metadata["seasons"][0]["crs"]) == (None, None, "EPSG:32633")


@pytest.mark.parametrize("form", ["header", "no header", "no csv", "shuffled scenes"])
def test_the_csv_may_have_a_header_or_not_or_be_absent(archive_root: Path, form: str) -> None:
    expected = open_archive(archive_root).read("0000012").arrays["s1"]
    file = archive_root / "dw_complete_ids.csv"
    lines = file.read_text().splitlines()
    if form == "no csv":
        file.unlink()
    elif form == "no header":
        file.write_text("\n".join(lines[1:]))
    elif form == "shuffled scenes":
        file.write_text("\n".join(",".join([*line.split(",")[:1], *line.split(",")[:0:-1]]) for line in lines))
    archive = open_archive(archive_root)
    assert archive.keys == KEYS
    np.testing.assert_array_equal(archive.read("0000012").arrays["s1"], expected)


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_rejected_with_its_reason(archive_root: Path, trap: str) -> None:
    reason, damage = TRAPS[trap]
    damage(archive_root)
    archive = open_archive(archive_root)
    assert archive.keys == KEYS
    with pytest.raises(Rejected) as rejected:
        archive.read("0000012")
    assert rejected.value.reason == reason
    assert not Path(rejected.value.path).is_absolute()


def test_strays_are_no_locations(archive_root: Path) -> None:
    for folder in ("s1", "s2c", "dw_noisy_labels", "s1/0000003", "s2c/0000003", "dw_noisy_labels/0000003"):
        for name in (".DS_Store", "Thumbs.db", "metadata.json"):
            (archive_root / folder / name).write_text("{}")
    archive = open_archive(archive_root)
    assert archive.keys == KEYS
    assert archive.asides["strays"] == 18
    archive.read("0000003")


def test_images_without_a_label_are_counted_and_are_no_input(archive_root: Path) -> None:
    shutil.copytree(archive_root / "s1" / "0000003", archive_root / "s1" / "0000777")
    archive = open_archive(archive_root)
    assert archive.keys == KEYS
    assert archive.asides["unlabelled"] == 1


def test_a_surplus_row_and_column_are_cut_and_noted(archive_root: Path) -> None:
    band = pixels(archive_root / S2_FOLDER / "B2.tif")
    expected = open_archive(archive_root).read("0000012").arrays["s2_10m"]
    write_tif(archive_root / S2_FOLDER / "B2.tif", np.pad(band, ((0, 1), (0, 1))))
    sample = open_archive(archive_root).read("0000012")
    np.testing.assert_array_equal(sample.arrays["s2_10m"], expected)
    assert sample.notes == ("cropped",)


def test_a_label_of_another_size_is_resized_without_new_classes(archive_root: Path) -> None:
    label = np.repeat(np.repeat(np.array([[1, 5], [8, 255]], np.uint8), 12, 0), 12, 1)
    write_tif(archive_root / LABEL, label)
    sample = open_archive(archive_root).read("0000012")
    np.testing.assert_array_equal(sample.arrays["label"][1], np.repeat(np.repeat(label, 2, 0), 2, 1))
    assert sample.notes == ("label_resized",)
    write_tif(archive_root / LABEL, np.tile(np.array([1, 2, 3, 4], np.uint8), (32, 8)))  # two pixels become three
    resized = open_archive(archive_root).read("0000012").arrays["label"][1]
    assert resized[0, :6].tolist() == [1, 2, 2, 3, 4, 4]  # centres 1/3, 1, 5/3, 7/3, 3, 11/3


def test_nodata_of_a_label_becomes_ignore_unless_it_names_a_class(archive_root: Path) -> None:
    label = np.full((PATCH_PX, PATCH_PX), 4, np.uint8)
    label[0] = 77
    write_tif(archive_root / LABEL, label, nodata=77)
    read = open_archive(archive_root).read("0000012").arrays["label"][1]
    assert (read[0] == 255).all()
    assert (read[1:] == 4).all()
    write_tif(archive_root / LABEL, np.full_like(label, 4), nodata=4)
    assert (open_archive(archive_root).read("0000012").arrays["label"][1] == 4).all()


def test_the_offset_of_new_baselines_is_removed_and_noted(archive_root: Path) -> None:
    band = pixels(archive_root / S2_FOLDER / "B8.tif")
    (archive_root / S2_FOLDER / "metadata.json").write_text(json.dumps({"PROCESSING_BASELINE": "04.00"}))
    sample = open_archive(archive_root).read("0000012")
    without = np.maximum(band.astype(np.int64) - 1000, 0)
    np.testing.assert_array_equal(sample.arrays["s2_10m"][1, 3], NORMALISATION["s2"].to_uint8(without[None], ["B8"])[0])
    assert sample.notes == ("offset_removed",)


def test_uint8_archives_are_kept_as_they_are(uint8_archive: Path) -> None:
    archive = open_archive(uint8_archive)
    assert archive.spec.normalised_by == {"s1": "archive", "s2": "archive"}
    band = pixels(uint8_archive / "s2c" / KEYS[0] / S2_SCENES[2] / "B11.tif")
    np.testing.assert_array_equal(archive.read(KEYS[0]).arrays["s2_20m"][2, 4], band)


def test_missing_and_empty_archives_are_named(archive_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveMissingError, match="nowhere is not a folder"):
        open_archive(tmp_path / "nowhere")
    (archive_root / "s2c").rename(archive_root / "s2a")
    with pytest.raises(ArchiveMissingError, match="L2A"):
        open_archive(archive_root)
    for folder in ("s1", "s2c", "dw_noisy_labels"):
        (tmp_path / "empty" / folder).mkdir(parents=True)
    with pytest.raises(ArchiveEmptyError, match="no location"):
        open_archive(tmp_path / "empty")


def test_an_archive_without_a_readable_header_is_unreadable(archive_root: Path) -> None:
    for path in archive_root.glob("s2c/*/*/B2.tif"):
        path.write_bytes(b"")
    with pytest.raises(UnreadableInputError, match=r"B2\.tif: truncated"):
        open_archive(archive_root)


def test_a_csv_that_is_none_is_named(archive_root: Path) -> None:
    (archive_root / "dw_complete_ids.csv").write_text("ids,a\n../../etc,b\n")
    with pytest.raises(UnreadableInputError, match="line 2"):
        open_archive(archive_root)


FORMS: dict[str, Callable[[str], bytes]] = {
    "a byte order mark": lambda text: text.encode("utf-8-sig"),
    "line ends of DOS": lambda text: text.replace("\n", "\r\n").encode(),
    "a mark, no header, ends of DOS": lambda text: text.split("\n", 1)[1].replace("\n", "\r\n").encode("utf-8-sig"),
    "ids of 7 digits": lambda text: re.sub(r"(?m)^(\d+)", lambda found: found[1].zfill(7), text).encode(),
    "quoted cells and blanks": lambda text: re.sub(r"([^,\n]+)", r'"\1" ', text).encode(),
    "empty cells behind and empty lines": lambda text: text.replace("\n", ",,\n\n").encode(),
    "no last line end": lambda text: text.rstrip("\n").encode(),
    "each line twice, once with an empty cell": lambda text: (text + text.split("\n", 1)[1].replace("\n", ",\n")).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_csv_may_be_written_by_any_program(archive_root: Path, form: str) -> None:
    file = archive_root / "dw_complete_ids.csv"
    text = file.read_bytes().decode().replace("\r\n", "\n")
    before = open_archive(archive_root)
    file.write_bytes(FORMS[form](text))
    after = open_archive(archive_root)
    assert after.keys == before.keys == KEYS
    assert set(after.duplicates) == (set(KEYS) if form.startswith("each line twice") else set())
    for key in KEYS:
        one, other = before.read(key), after.read(key)
        assert one.metadata == other.metadata
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)

import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio

from cromss_dist.data.archives.layout.description import load
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.survey.draft import draft
from cromss_dist.data.survey.path_patterns import NUM_KEPT, Patterns, Piece, split_path
from cromss_dist.data.survey.survey import look
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, UnreadableInputError
from tests.data.invented_archives import DAYS, INVENTED, Pixel, write_tif

PATHS = (
    "s1/0000200/S1A_IW_GRDH_1SDV_20200329T010800_20200329T010825_032904_03CFBA_D457/VV.tif",
    "s2c/0000200/20200323T054639_20200323T055024_T43RCP/B8A.tif",
    "dw_train/image_s2/s2_-0.7588967520_38.1058157001-20190918.tif",
    "dw_test/label_dw/dw_103p7755863905_17p9450063992-20200223.tif",
    "ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif",
    "notes",
    ".DS_Store",
    "a b/ü.tar.gz",
)


@pytest.mark.parametrize("path", PATHS)
def test_the_parts_of_a_path_are_the_path(path: str) -> None:
    assert "".join(text for _, text in split_path(path)) == path


def test_pieces_are_told_by_their_looks() -> None:
    kinds = [[(kind, text) for kind, text in split_path(path) if kind != "text"] for path in PATHS[:4]]
    assert kinds[0][:2] == [("number", "0000200"), ("satellite", "S1A")]
    assert [text for kind, text in kinds[0] if kind == "time"] == ["20200329T010800", "20200329T010825"]
    assert kinds[0][-1] == ("band", "VV")
    assert kinds[1][-2:] == [("code", "T43RCP"), ("band", "B8A")]
    assert [kind for kind, _ in kinds[2]] == ["split", "decimal", "decimal", "time"]
    assert ("decimal", "103p7755863905") in kinds[3]


def test_pieces_that_name_the_same_places_are_known_though_only_some_values_are_kept() -> None:
    every, half, other = Piece("number"), Piece("number"), Piece("number")
    for number in range(5000):
        every.add(f"{number:06}")
        other.add(f"{number + 500_000:06}")
        if number % 2:
            half.add(f"{number:06}")
    assert len(every.values) <= 2 * NUM_KEPT
    assert every.shares(half)
    assert half.shares(every)
    assert not every.shares(other)


def test_words_are_values_from_three_on_and_roles_never_are() -> None:
    patterns = Patterns()
    for town in ("aachen", "bonn", "celle"):
        for kind in ("s1", "s2", "label"):
            patterns.add(f"{town}/{kind}.tif")
    assert [(pattern.text, pattern.count) for pattern in patterns.merged()] == [
        ("<word>/label.tif", 3),
        ("<word>/s1.tif", 3),
        ("<word>/s2.tif", 3),
    ]


def made(name: str, folder: Path) -> Path:
    root = folder / name.replace(" ", "_")
    INVENTED[name].write(root, Pixel())
    return root


@pytest.mark.parametrize("name", INVENTED)
def test_the_draft_of_an_invented_archive_shards_it(name: str, tmp_path: Path) -> None:
    root, invented = made(name, tmp_path), INVENTED[name]
    file = tmp_path / "draft.yaml"
    file.write_text(draft(look(root), "invented").text)
    assert load(file) == draft(look(root), "invented").description
    source = open_archive(root, file)
    assert len(source.keys) == invented.locations
    assert source.spec.num_seasons == invented.seasons
    assert {spec.name: len(spec.bands) for spec in source.spec.images} == invented.arrays
    assert len(source.spec.values[0].values) == invented.classes
    summary = convert(source, tmp_path / "out", max_reject_fraction=0)
    assert summary.num_samples == invented.locations


def test_a_drafted_description_reads_the_right_files(tmp_path: Path) -> None:
    root = made("towns", tmp_path)
    source = open_archive(root, draft(look(root), "towns").description)
    sample = source.read("bonn")
    for season, day in enumerate(DAYS):
        with rasterio.open(root / "bonn" / f"mask_{day}.tif") as dataset:
            label = dataset.read(1)
        np.testing.assert_array_equal(sample.arrays["label"][season], label)


def test_containers_are_looked_into(tmp_path: Path) -> None:
    root = made("stacks", tmp_path)
    packed = tmp_path / "packed"
    packed.mkdir()
    for folder in ("sentinel1", "sentinel2", "landcover"):
        subprocess.run(["tar", "czf", packed / f"{folder}.tar.gz", folder], cwd=root, check=True)
    assert draft(look(packed), "x").description == draft(look(root), "x").description


def test_odd_files_are_named(tmp_path: Path) -> None:
    root = made("towns", tmp_path)
    (root / "bonn" / f"s2_{DAYS[0]}.tif").write_bytes(b"")
    write_tif(root / "celle" / f"s2_{DAYS[1]}.tif", np.zeros((4, 40, 40), np.float32))
    write_tif(root / "quicklooks" / "0001.tif", np.zeros((3, 8, 8), np.uint8))
    survey = look(root)
    found = draft(survey, "towns")
    assert (survey.num_empty, survey.empty) == (1, [f"bonn/s2_{DAYS[0]}.tif"])
    assert [rejected.reason for rejected in survey.damaged if rejected.path == survey.empty[0]] != []
    assert len(found.census.odd) == 1
    assert found.census.odd[0].startswith(f"celle/s2_{DAYS[1]}.tif: 40 x 40 px, 4 bands, float32")
    assert [pattern.text for pattern in found.unused] == ["quicklooks/0001.tif"]


def test_facts_of_the_real_archive(mini_archive: Path) -> None:
    found = draft(look(mini_archive), "mini")
    assert found.description.seasons == 4
    assert found.description.locations is not None
    assert (found.description.locations.csv, found.description.locations.digits) == ("dw_complete_ids.csv", 7)
    assert found.census.locations == {"s1": 6, "s2": 6, "label": 6}
    assert found.census.label_counts[4] == 500_789  # crops, from the archive's own table
    assert "guess" not in found.text
    offset = found.description.images["s2"].offset
    assert offset is not None
    assert offset.field == "PROCESSING_BASELINE"
    shipped = open_archive(mini_archive, "noldo_s12")
    drafted = open_archive(mini_archive, found.description)
    key = shipped.keys[0]
    assert drafted.keys == shipped.keys
    for name, array in shipped.read(key).arrays.items():
        np.testing.assert_array_equal(drafted.read(key).arrays[name], array)


def test_units_are_told_by_the_values(tmp_path: Path) -> None:
    units = {name: draft(look(made(name, tmp_path)), "x").description.images for name in ("products", "colours", "towns")}
    assert units["products"]["s1"].units == "linear"
    assert units["products"]["s2"].units == "reflectance_x10000"
    assert units["colours"]["s2"].units == "reflectance"
    assert units["towns"]["s1"].units == "dB"


def test_an_offset_without_metadata_is_guessed_and_marked(tmp_path: Path) -> None:
    pixel = Pixel()
    for number in range(3):
        write_tif(tmp_path / "s2" / f"{number:03}_20230401.tif", (pixel.s2(13) + 1000).astype(np.uint16))
        write_tif(tmp_path / "label" / f"{number:03}_20230401.tif", pixel.label((0, 1)))
    found = draft(look(tmp_path), "x")
    offset = found.description.images["s2"].offset
    assert offset is not None
    assert (offset.subtract, offset.field) == (1000, None)
    assert found.remarks["images.s2.offset"].startswith("guess")
    lines = found.text.splitlines()
    assert "# guess" in lines[next(i for i, line in enumerate(lines) if line.lstrip().startswith("offset:")) - 1]


def test_a_planted_shift_shows(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for number in range(2):
        fields = np.kron(rng.uniform(0, 1, (12, 12)), np.ones((8, 8)))
        radar = np.roll(-14 + 8 * fields, (3, -2), (0, 1)) + rng.normal(0, 0.3, fields.shape)
        write_tif(tmp_path / "s1" / f"{number:03}.tif", np.stack([radar, radar - 6]).astype(np.float32))
        write_tif(tmp_path / "s2" / f"{number:03}.tif", np.stack([500 + 3000 * fields] * 4).astype(np.uint16))
        write_tif(tmp_path / "label" / f"{number:03}.tif", (fields > 0.5).astype(np.uint8)[None])
    shifts = draft(look(tmp_path), "x").census.shifts
    assert sorted(shifts) == ["000", "001"]
    assert all((s.rows_px, s.cols_px) == pytest.approx((3, -2), abs=0.3) for s in shifts.values())


def test_the_tiles_of_dynamic_world_are_known_by_their_values() -> None:
    root = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "dw_real_mini"
    if not root.is_dir():
        pytest.skip("shared/data/dw_real_mini is not beside the repository")
    label = draft(look(root), "dw").description.values["label"]
    assert label.classes == "dynamic_world"
    assert label.map == {0: "ignore", **{value + 1: value for value in range(9)}, 10: "ignore"}


def test_a_folder_without_labels_has_no_draft_but_a_reason(tmp_path: Path) -> None:
    root = made("colours", tmp_path)
    for path in (root / "train" / "gt", root / "test" / "gt"):
        for file in path.iterdir():
            file.unlink()
    with pytest.raises(ArchiveEmptyError, match="images and labels"):
        draft(look(root), "x")


def test_images_and_labels_that_have_no_name_in_common_have_no_draft(tmp_path: Path) -> None:
    pixel = Pixel()
    for number in range(5):
        write_tif(tmp_path / "s2" / f"{number:03}.tif", pixel.s2(13))
        write_tif(tmp_path / "label" / f"{number + 700:03}.tif", pixel.label((0, 1)))
    with pytest.raises(ArchiveEmptyError, match="alike"):
        draft(look(tmp_path), "x")


def test_labels_of_another_format_are_named_with_what_to_do(tmp_path: Path) -> None:
    for number in range(3):
        write_tif(tmp_path / "s2" / f"{number:03}.tif", Pixel().s2(13))
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{number:03}.png").write_bytes(b"png")
    with pytest.raises(
        ArchiveEmptyError, match=r"no labels were found, but labels/<number>\.png \(3 files\): \.png cannot be read"
    ):
        draft(look(tmp_path), "x")


def test_a_mosaic_is_to_be_cut(tmp_path: Path) -> None:
    write_tif(tmp_path / "s2.tif", Pixel().s2(13))
    write_tif(tmp_path / "label.tif", Pixel().label((0, 1)))
    with pytest.raises(ArchiveEmptyError, match="cut a mosaic into patches"):
        draft(look(tmp_path), "x")


@pytest.mark.parametrize("broken", ["s2", "label"])
def test_images_or_labels_that_are_all_damaged_are_named(tmp_path: Path, broken: str) -> None:
    for number in range(3):
        write_tif(tmp_path / "s2" / f"{number:03}.tif", Pixel().s2(13))
        write_tif(tmp_path / "label" / f"{number:03}.tif", Pixel().label((0, 1)))
        (tmp_path / broken / f"{number:03}.tif").write_bytes(b"")
    with pytest.raises(UnreadableInputError, match=rf"none of the {broken} .* truncated: it has 0 bytes"):
        draft(look(tmp_path), "x")


def test_a_second_kind_of_label_is_a_guess_to_check_and_names_come_before_pixels(tmp_path: Path) -> None:
    for number in range(3):
        for band in ("B02", "B03", "B04", "B08"):
            write_tif(tmp_path / f"{number:03}" / f"{band}.tif", Pixel().s2())
        write_tif(tmp_path / f"{number:03}" / "SCL.tif", Pixel().label((3, 4, 5)))
        write_tif(tmp_path / f"{number:03}" / "labels.tif", Pixel().label((0, 1)))
    found = draft(look(tmp_path), "x")
    assert found.description.values["label"].path == "{id}/labels.tif"
    assert found.remarks["values.label.path"].startswith("guess: <number>/SCL.tif (3 files) was left out")


@pytest.mark.parametrize(("bands", "dtype"), [(3, "uint8"), (1, "float32")])
def test_labels_that_are_colours_or_no_integers_are_to_be_edited(tmp_path: Path, bands: int, dtype: str) -> None:
    for number in range(3):
        write_tif(tmp_path / "s2" / f"{number:03}.tif", Pixel().s2(13))
        write_tif(tmp_path / "label" / f"{number:03}.tif", np.repeat(Pixel().label((0, 1)), bands, 0).astype(dtype))
    assert f"{dtype}; a label has one" in draft(look(tmp_path), "x").remarks["values.label.path"]


def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ArchiveMissingError):
        look(tmp_path / "nowhere")
    with pytest.raises(ArchiveEmptyError):
        look(tmp_path)

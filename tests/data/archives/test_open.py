import os
import pickle
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.sample import Rejected, Source
from cromss_dist.errors import ArchiveMissingError, ConfigError, InputChangedError, UnreadableInputError
from tests.data.archives.layouts import write_tiles
from tests.data.tiny_archive import KEYS, LABEL, S2_FOLDER, S2_SCENES

PARTS = ("s1", "s2c", "dw_noisy_labels", "reference_labels", "noise_kinds", "dw_complete_ids.csv")


def pack(root: Path, out: Path, how: str) -> Path:
    """The archive of `root` as it is distributed: one container a folder."""
    out.mkdir()
    for name in PARTS:
        if how == "zip":
            with zipfile.ZipFile(out / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for path in [root / name, *sorted((root / name).rglob("*"))]:
                    archive.write(path, path.relative_to(root))
        else:
            with tarfile.open(out / f"{name}.tar{'.gz' if how == 'tar.gz' else ''}", "w:gz" if how == "tar.gz" else "w") as tar:
                tar.add(root / name, name)
    return out


def assert_equal_samples(one: Source, other: Source) -> None:
    assert one.spec == other.spec
    assert one.keys == other.keys
    for key in one.keys:
        a, b = one.read(key), other.read(key)
        assert (a.metadata, a.notes, list(a.arrays)) == (b.metadata, b.notes, list(b.arrays))
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=f"{key} {name}")


@pytest.mark.parametrize("how", ["tar", "tar.gz", "zip"])
def test_a_packed_archive_gives_the_samples_of_the_tree(how: str, archive_root: Path, tmp_path: Path) -> None:
    assert_equal_samples(open_archive(pack(archive_root, tmp_path / "packed", how)), open_archive(archive_root))


def test_split_tar_gz_parts_give_the_samples_of_the_tree(archive_root: Path, tmp_path: Path) -> None:
    packed = pack(archive_root, tmp_path / "packed", "tar.gz")
    whole = packed / "s2c.tar.gz"
    data = whole.read_bytes()
    for number, suffix in enumerate(("aa", "ab", "ac")):
        third = len(data) // 3 + 1
        whole.with_name(f"s2c.tar.gz.part{suffix}").write_bytes(data[number * third : (number + 1) * third])
    whole.unlink()
    assert_equal_samples(open_archive(packed), open_archive(archive_root))


def test_real_locations_are_equal_by_tree_and_by_tar_gz(mini_archive: Path) -> None:
    packed = mini_archive.with_name("noldo_real_mini_targz")
    if not packed.is_dir():
        pytest.skip("shared/data/noldo_real_mini_targz is not beside the repository")
    assert_equal_samples(open_archive(packed), open_archive(mini_archive))


def test_an_archive_can_be_pickled_and_read_elsewhere(archive_root: Path) -> None:
    archive = open_archive(archive_root)
    copy: Source = pickle.loads(pickle.dumps(archive))
    assert_equal_samples(copy, archive)
    assert copy.fingerprint == archive.fingerprint


def test_the_fingerprint_changes_with_a_file_and_with_the_description(archive_root: Path) -> None:
    before = open_archive(archive_root).fingerprint
    assert open_archive(archive_root).fingerprint == before
    os.utime(archive_root / S2_FOLDER / "B2.tif", ns=(1, 1))
    after = open_archive(archive_root).fingerprint
    assert after != before
    edited = archive_root.with_name("edited.yaml")
    shipped = Path(__file__).resolve().parents[3] / "configs" / "archives" / "noldo_s12.yaml"
    edited.write_text(shipped.read_text().replace("subtract: 1000", "subtract: 999"))
    assert open_archive(archive_root, edited).fingerprint != after


@pytest.mark.parametrize("change", ["touched", "longer", "gone"])
def test_a_file_that_changes_after_opening_stops_the_reading_by_name(change: str, archive_root: Path) -> None:
    archive = open_archive(archive_root)
    file = archive_root / S2_FOLDER / "B3.tif"
    if change == "touched":
        os.utime(file, ns=(1, 1))
    elif change == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        file.unlink()
    with pytest.raises(InputChangedError, match=r"B3\.tif"):
        archive.read("0000012")
    archive.read("0000003")


@pytest.mark.parametrize("same", [True, False])
def test_a_file_packed_twice_is_a_duplicate_or_a_conflict(same: bool, archive_root: Path, tmp_path: Path) -> None:
    packed = pack(archive_root, tmp_path / "packed", "tar")
    label = archive_root / LABEL
    if not same:
        data = bytearray(label.read_bytes())
        data[-1] ^= 1
        label.write_bytes(data)
    with tarfile.open(packed / "dw_noisy_labels.tar", "a") as tar:
        tar.add(label, LABEL)
    archive = open_archive(packed)
    assert archive.keys == KEYS
    if same:
        assert archive.duplicates == Counter({"0000012": 1})
        archive.read("0000012")
    else:
        with pytest.raises(Rejected) as rejected:
            archive.read("0000012")
        assert rejected.value.reason == "conflicting_duplicate"
    archive.read("0000003")


def test_lines_of_the_csv_that_repeat_are_duplicates(archive_root: Path) -> None:
    with (archive_root / "dw_complete_ids.csv").open("a") as table:
        table.write(f"12,{','.join(S2_SCENES)}\n3,{','.join(S2_SCENES)}\n3,{','.join(S2_SCENES)}\n")
    assert open_archive(archive_root).duplicates == Counter({"0000003": 2, "0000012": 1})


def test_a_folder_that_two_layouts_fit_asks_which(tmp_path: Path) -> None:
    for split in ("dw_train", "dw_test"):
        write_tiles(tmp_path, ("1.5_2.5-20200101",), split, "dw", 10, 32)
    with pytest.raises(ConfigError, match=r"dw_test, dw_train.*--description"):
        open_archive(tmp_path)
    assert open_archive(tmp_path, "dw_test").asides["strays"] == 3


def test_files_of_another_layout_are_strays(archive_root: Path) -> None:
    path = archive_root / "dw_train" / "image_s1" / "s1_1.5_2.5-20200101.tif"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    archive = open_archive(archive_root)
    assert archive.keys == KEYS
    assert archive.asides["strays"] == 1


def test_a_folder_of_no_known_layout_is_told_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(ArchiveMissingError, match=r"noldo_s12.*1 in pictures.*tools/describe\.py"):
        open_archive(tmp_path)


def test_a_tar_gz_that_was_cut_off_is_unreadable(archive_root: Path, tmp_path: Path) -> None:
    packed = pack(archive_root, tmp_path / "packed", "tar.gz")
    whole = packed / "s2c.tar.gz"
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UnreadableInputError, match=r"s2c\.tar\.gz"):
        open_archive(packed)

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cromss_dist.data.archives.lmdb_archive import LmdbArchive, find_lmdbs, open_lmdb
from cromss_dist.data.archives.lmdb_file import open_lmdb_file
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, InputChangedError, UnreadableInputError
from cromss_dist.schema import S2_9, S2_BANDS

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "noldo_real_mini"

SIDE = 24
NAMES = {"s1": "0k_251k_uint8_s1.lmdb", "s2": "0k_251k_uint8_s2c.lmdb", "label": "dw_labels.lmdb"}
SHAPES = {"s1": (4, 2, SIDE, SIDE), "s2": (4, 13, SIDE, SIDE), "label": (4, SIDE, SIDE)}
IDS = (200, 17, 251078)  # in the order of the rows, which is not that of the ids
Rows = dict[str, dict[int, bytes]]


def pixels_of(role: str, number: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng((number, len(role), len(shapes[role])))
    return rng.integers(0, 9 if role == "label" else 256, shapes[role], np.uint8)


def record(array: npt.NDArray[np.uint8], number: int, role: str) -> bytes:
    """As the published scripts write it: the label's id is a numpy integer, that of the images is none."""
    return pickle.dumps((array.tobytes(), array.shape, np.int64(number) if role == "label" else number))


def rows_of(numbers: Iterable[int] = IDS, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Rows:
    return {r: {i: record(pixels_of(r, n, shapes), n, r) for i, n in enumerate(numbers)} for r in shapes}


def write(folder: Path, rows: Rows, subdir: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for role, records in rows.items():
        environment = lmdb.open(str(folder / NAMES[role]), map_size=2**30, subdir=subdir)
        with environment.begin(write=True) as transaction:
            for row, value in records.items():
                transaction.put(str(row).encode(), value)
        environment.close()
    return folder


def reason(archive: LmdbArchive, key: str) -> str:
    with pytest.raises(Rejected) as caught:
        archive.read(key)
    return caught.value.reason


@pytest.mark.parametrize("subdir", [True, False])
def test_every_location_is_read_as_it_was_written(tmp_path: Path, subdir: bool) -> None:
    archive = pickle.loads(pickle.dumps(open_lmdb(write(tmp_path / "lmdbs", rows_of(), subdir))))
    assert archive.keys == ("0000017", "0000200", "0251078")
    assert (archive.spec.patch_px, archive.spec.num_seasons, archive.spec.names) == (SIDE, 4, ("s1", "s2", "label"))
    assert archive.spec.images[1].bands == S2_BANDS
    assert set(archive.spec.normalised_by.values()) == {"archive"}
    assert (archive.asides, archive.duplicates) == ({"unlabelled": 0, "strays": 0}, {})
    for number in IDS:
        sample = archive.read(f"{number:07d}")
        for role, array in sample.arrays.items():
            assert array.shape == archive.spec.shape(role)
            np.testing.assert_array_equal(array, pixels_of(role, number))
        assert len(sample.metadata["seasons"]) == 4


def test_nine_bands_are_those_of_dynamic_world(tmp_path: Path) -> None:
    archive = open_lmdb(write(tmp_path / "lmdbs", rows_of(shapes={**SHAPES, "s2": (4, 9, SIDE, SIDE)})))
    assert archive.spec.images[1].bands == S2_9
    assert archive.spec.normalisation["s2"].bands == S2_9


def test_bad_records_are_rejected_and_the_others_are_read(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    numbers = list(range(100, 118))
    rows = rows_of(numbers)
    wrong = {role: pixels_of(role, 1) for role in SHAPES}
    empty, high = wrong["label"].copy(), wrong["label"].copy()
    empty[2], high[1, 2, 3] = 255, 9
    del rows["s1"][0], rows["s2"][1], rows["label"][2]
    rows["label"][3] = pickle.dumps(Command())
    rows["s2"][4] = pickle.dumps((b"x", (1,), Command()))
    rows["s1"][5] = rows["s1"][5][:-30]  # the id is cut off
    rows["s1"][6] = pickle.dumps((wrong["s1"].tobytes()[:-1], SHAPES["s1"], 106))
    rows["s1"][7] = pickle.dumps((wrong["s1"].tobytes(), SHAPES["s1"], 999))
    rows["s2"][8] = record(pixels_of("s2", 1, {"s2": (4, 12, SIDE, SIDE)}), 108, "s2")
    rows["s2"][9] = record(pixels_of("s2", 1, {"s2": (4, 13, SIDE, SIDE + 1)}), 109, "s2")
    rows["label"][10] = record(empty, 110, "label")
    rows["label"][11] = record(high, 111, "label")
    rows["s1"][12] = pickle.dumps((b"", (2**40, 2**40), 112))
    rows["s1"][13] = pickle.dumps((wrong["s1"].tobytes(), (-4, -2, SIDE, SIDE), 113))
    rows["s2"][14] = b""
    rows["label"][15] = pickle.dumps([1])
    rows["s1"][16] = pickle.dumps((b"x", (1,), -5))
    archive = open_lmdb(write(tmp_path / "lmdbs", rows))
    expected = {
        "0000100": "missing_modality", "0000101": "missing_modality", "row-3": "unsafe_pickle", "0000104": "unsafe_pickle",
        "0000105": "unreadable", "0000106": "truncated", "0000107": "id_mismatch", "0000108": "wrong_bands",
        "0000109": "wrong_size", "0000110": "label_empty", "0000111": "label_out_of_range", "0000112": "wrong_size",
        "0000113": "wrong_size", "0000114": "unreadable", "row-15": "unsafe_pickle", "0000116": "unreadable",
    }  # fmt: skip
    assert set(archive.keys) == {*expected, "0000117"}
    assert {key: reason(archive, key) for key in expected} == expected
    np.testing.assert_array_equal(archive.read("0000117").arrays["s2"], pixels_of("s2", 117))
    assert archive.asides == {"unlabelled": 1, "strays": 0}  # row 2
    assert not marker.exists()


def test_a_conversion_counts_bad_records_and_writes_the_others(tmp_path: Path) -> None:
    rows = rows_of(range(8))
    rows["label"][2] = pickle.dumps(os.getcwd)
    del rows["s2"][5]
    rows["s1"][6] = rows["s1"][6][:100]
    out = tmp_path / "out"
    convert(open_archive(write(tmp_path / "lmdbs", rows)), out, max_reject_fraction=1)
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert {line["key"]: line.get("reason") for line in ledger} == {
        **{f"{n:07d}": None for n in (0, 1, 3, 4, 7)}, "row-2": "unsafe_pickle", "0000005": "missing_modality",
        "0000006": "unreadable",
    }  # fmt: skip


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_lmdbs_written_the_published_way_agree_with_the_tree_they_were_made_of(tmp_path: Path) -> None:
    tree = open_archive(REAL)
    numbers = [int(line.split(",")[0]) for line in (REAL / "dw_complete_ids.csv").read_text().splitlines()[1:]]
    rows: Rows = {role: {} for role in NAMES}
    expected = {}
    for row, number in enumerate(numbers):
        arrays = dict(tree.read(f"{number:07d}").arrays)
        s2 = np.empty((4, 13, 264, 264), np.uint8)
        for spec in tree.spec.images[1:]:
            for season, band in np.ndindex(arrays[spec.name].shape[:2]):
                image = Image.fromarray(arrays[spec.name][season, band]).resize((264, 264), Image.Resampling.BICUBIC)
                s2[season, S2_BANDS.index(spec.bands[band])] = np.asarray(image)
        for spec in tree.spec.images[1:2]:  # a resize to the same size is none
            np.testing.assert_array_equal(s2[:, [S2_BANDS.index(band) for band in spec.bands]], arrays[spec.name])
        expected[f"{number:07d}"] = {"s1": arrays["s1"], "s2": s2, "label": arrays["label"]}
        for role, array in expected[f"{number:07d}"].items():
            rows[role][row] = record(array, number, role)
    archive = open_archive(write(tmp_path / "lmdbs", rows))
    assert archive.keys == tree.keys
    for key, arrays in expected.items():
        for name, array in archive.read(key).arrays.items():
            np.testing.assert_array_equal(array, arrays[name])


def test_a_record_that_is_too_big_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of()
    rows["s1"][1] = pickle.dumps((bytes(60 * SIDE * SIDE), SHAPES["s1"], 17))
    monkeypatch.setattr("cromss_dist.data.archives.lmdb_archive.MAX_RECORD_BYTES", 60 * SIDE * SIDE)
    archive = open_lmdb(write(tmp_path / "lmdbs", rows))
    assert reason(archive, "0000017") == "too_big"
    archive.read("0000200")


def test_equal_rows_of_an_id_are_duplicates_and_others_conflict(tmp_path: Path) -> None:
    rows = rows_of((1, 2, 1, 2, 1, 3))
    rows["s2"][3] = record(pixels_of("s2", 99), 2, "s2")
    archive = open_lmdb(write(tmp_path / "lmdbs", rows))
    assert archive.keys == ("0000001", "0000002", "0000003")
    assert archive.duplicates == {"0000001": 2}
    assert reason(archive, "0000002") == "conflicting_duplicate"
    np.testing.assert_array_equal(archive.read("0000001").arrays["s1"], pixels_of("s1", 1))


def test_what_is_no_row_is_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "lmdbs", rows_of())
    environment = lmdb.open(str(root / NAMES["label"]))
    with environment.begin(write=True) as transaction:
        for key in (b"__len__", b"007", b"-1", b"9" * 30):
            transaction.put(key, b"")
    environment.close()
    assert open_lmdb(root).asides["strays"] == 4


def test_opening_writes_nothing_and_notices_a_changed_file(tmp_path: Path) -> None:
    root = write(tmp_path / "lmdbs", rows_of())
    for path in root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    archive = open_lmdb(root)
    archive.read("0000017")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert archive.fingerprint == open_lmdb(root).fingerprint
    changed = root / NAMES["s1"] / "data.mdb"
    os.utime(changed, ns=(0, 0))
    with pytest.raises(InputChangedError, match=NAMES["s1"]):
        archive.read("0000017")
    assert archive.fingerprint != open_lmdb(root).fingerprint
    for path in root.iterdir():
        path.chmod(0o755)
    changed.unlink()
    with pytest.raises(InputChangedError, match="gone"):
        archive.read("0000017")


def test_environments_are_found_by_the_words_of_their_names(tmp_path: Path) -> None:
    for name in ("0k_251k_uint8_s1.lmdb", "S2-train", "labels", "notes_s1", "dfc2020"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("data.mdb" if "notes" not in name else "readme")).touch()
    assert {role: path.name for role, path in find_lmdbs(tmp_path).items()} == {
        "s1": "0k_251k_uint8_s1.lmdb", "s2": "S2-train", "label": "labels",
    }  # fmt: skip
    shutil.copytree(tmp_path / "labels", tmp_path / "dw_labels.lmdb")
    with pytest.raises(UnreadableInputError, match=r"dw_labels\.lmdb and labels"):
        find_lmdbs(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda root: shutil.rmtree(root / NAMES["s1"]), ArchiveMissingError),
        (lambda root: shutil.rmtree(root), ArchiveMissingError),
        (lambda root: (root / NAMES["s2"] / "data.mdb").write_bytes(b"x" * 20000), UnreadableInputError),
        (lambda root: os.truncate(root / NAMES["s2"] / "data.mdb", 100), UnreadableInputError),
        (lambda root: os.truncate(root / NAMES["s2"] / "data.mdb", 60000), UnreadableInputError),
        (lambda root: _replace(root, "label", {}), ArchiveEmptyError),
        (lambda root: _replace(root, "s2", {0: b"x", 1: b"y"}), UnreadableInputError),
        (lambda root: _replace(root, "s2", rows_of(shapes={"s2": (4, 12, SIDE, SIDE)})["s2"]), UnreadableInputError),
    ],
)
def test_what_cannot_be_opened_is_said(tmp_path: Path, change: Callable[[Path], object], error: type[Exception]) -> None:
    root = write(tmp_path / "lmdbs", rows_of())
    change(root)
    with pytest.raises(error, match="lmdb"):
        open_lmdb(root)


def _replace(root: Path, role: str, records: dict[int, bytes]) -> None:
    shutil.rmtree(root / NAMES[role])
    write(root, {role: records})


def test_a_file_is_read_as_the_lmdb_package_reads_it(tmp_path: Path) -> None:
    rng = random.Random(1)
    environment = lmdb.open(str(tmp_path / "e"), map_size=2**30)
    for start in range(0, 3000, 250):  # many transactions, long and short values, freed pages, three levels
        with environment.begin(write=True) as transaction:
            for row in range(start, start + 250):
                transaction.put(rng.randbytes(rng.randint(1, 200)), rng.randbytes(rng.choice((0, 10, 3000, 9000))))
                if row % 5 == 0:
                    transaction.delete(next(transaction.cursor().iternext(values=False)))
    with environment.begin() as transaction:
        expected = [(bytes(key), bytes(value)) for key, value in transaction.cursor()]
        assert transaction.stat()["depth"] >= 3
    environment.close()
    file = open_lmdb_file(tmp_path / "e")
    assert [(value.key, file.read(value.offset, value.size)) for value in file.values()] == expected


def test_a_tree_that_leads_to_a_key_twice_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "lmdbs", rows_of(IDS[:2]))
    path = root / NAMES["label"] / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"\1\0" + b"1", b"\1\0" + b"0"))  # the length of a key, and the key
    with pytest.raises(UnreadableInputError, match="out of order"):
        open_lmdb(root)


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "lmdbs", rows_of(range(40)))
    path = root / NAMES["label"] / "data.mdb"
    good = path.read_bytes()
    rng = random.Random(2)
    outcomes = set()
    for number in range(300):
        data = bytearray(good)
        if number % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 20) if number % 3 else 0):  # most structure lies in the first bytes of a page
            place = 4096 * rng.randrange(len(data) // 4096) + rng.randrange(128)
            data[place] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(data)
        try:
            archive = open_lmdb(root)
            for key in archive.keys[:5]:
                archive.read(key)
            outcomes.add("read")
        except (Rejected, UnreadableInputError, ArchiveEmptyError) as error:
            outcomes.add(type(error).__name__)
    assert {"read", "UnreadableInputError"} <= outcomes

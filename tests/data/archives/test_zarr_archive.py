import json
import os
import pickle
import random
import shutil
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import zarr

from cromss_dist.data.archives import zarr_zip
from cromss_dist.data.archives.zarr_archive import ZarrArchive, open_zarr_zips
from cromss_dist.data.archives.zarr_zip import find_zarr_zip
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, InputChangedError, UnreadableInputError
from cromss_dist.schema import NORMALISATION, S1_BANDS, S2_BANDS
from tests.data.archives.test_hostile import zeros

SIDE = 12
IDS = ("0080717", "0060573", "0012333")  # in the order of the rows
S1_TIMES = ("20200510T174031", "20210210T174036", "20200808T174006", "20201109T060646")  # S1A, S1A, S1B, S1B
S2_TIMES = ("20200419T094031", "20200718T094041", "20201016T094031", "20210114T094251")
# Stored order of the bands, which is not ours in everything.
S2_STORED = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")


def s1_name(time: str) -> str:
    return f"S1{'AABB'[S1_TIMES.index(time)]}_IW_GRDH_1SDV_{time}_{time}_032506_03C3BC_30A2"


def s2_name(time: str) -> str:
    return f"{time}_{time}_T44RKT"


def s1_pixels(key: str) -> npt.NDArray[np.float16]:
    return np.random.default_rng(int(key)).normal(-15, 5, (4, 2, SIDE, SIDE)).astype(np.float16)


def s2_pixels(key: str, offset: int = 1000) -> npt.NDArray[np.int16]:
    pixels = np.random.default_rng(int(key) + 1).integers(1, 4000, (4, 13, SIDE, SIDE), np.int16)
    pixels[:, 10] %= 60  # cirrus
    return pixels + np.int16(offset)


def label(key: str, time: str) -> npt.NDArray[np.uint8]:
    return np.random.default_rng((int(key), int(time[:8]))).integers(0, 9, (SIDE, SIDE), np.uint8)


def write_store(
    path: Path,
    pixels: npt.NDArray[Any],
    bands: tuple[str, ...],
    names: list[str],
    ids: tuple[str, ...] = IDS,
    chunks: tuple[int, ...] | None = None,
    compressor: Any = None,
) -> None:
    """As xarray writes it: Zarr v2 in a zip file, texts of fixed length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store = zarr.storage.ZipStore(path, mode="w")
    group = zarr.open_group(store, mode="w", zarr_format=2)
    centres = 300000.0 + 10 * np.arange(SIDE) + 5
    arrays = {
        "bands": pixels, "sample": np.array(ids), "band": np.array(bands), "file_id": np.array([names] * len(ids)),
        "crs": np.full(len(ids), 32651), "center_lon": np.full(len(ids), 125.6), "center_lat": np.full(len(ids), 42.66),
        "x_": np.tile(centres, (len(ids), 1)), "y_": np.tile(4728000 - centres, (len(ids), 1)),
    }  # fmt: skip
    for name, array in arrays.items():
        chunked = (chunks or (len(ids), 1, *array.shape[2:])) if name == "bands" else array.shape
        codec = compressor or numcodecs.Blosc()
        group.create_array(
            name, data=array, chunks=chunked, compressors=codec, chunk_key_encoding={"name": "v2", "separator": "."}
        )
    store.close()


def write_s1(root: Path, **options: Any) -> Path:
    path = root / "train/S1GRD/ssl4eos12_train_seasonal_data_000001.zarr.zip"
    pixels = options.pop("pixels", np.stack([s1_pixels(key) for key in options.get("ids", IDS)]))
    write_store(path, pixels, options.pop("bands", ("vv", "vh")), [s1_name(time) for time in S1_TIMES], **options)
    return path


def write_s2(root: Path, number: int = 1, **options: Any) -> Path:
    path = root / f"train/S2L1C/ssl4eos12_train_seasonal_data_{number:06d}.zarr.zip"
    pixels = options.pop("pixels", np.stack([s2_pixels(key) for key in options.get("ids", IDS)]))
    write_store(path, pixels, options.pop("bands", S2_STORED), [s2_name(time) for time in S2_TIMES], **options)
    return path


def write_label(root: Path, key: str, time: str, values: npt.NDArray[np.uint8] | None = None) -> Path:
    path = root / "dw_noisy_labels" / key / s2_name(time) / "label.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", height=SIDE, width=SIDE, count=1, dtype="uint8") as file:
            file.write(label(key, time) if values is None else values, 1)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "v1.1"
    write_s1(root)
    write_s2(root)
    for key in IDS[:2]:
        for time in S2_TIMES:
            write_label(root, key, time)
    return root


def reason(archive: ZarrArchive, key: str) -> str:
    with pytest.raises(Rejected) as caught:
        archive.read(key)
    return caught.value.reason


def check(archive: ZarrArchive, key: str, s1_order: tuple[int, ...] = (0, 2, 3, 1)) -> None:
    sample = archive.read(key)
    s1 = NORMALISATION["s1"].to_uint8(s1_pixels(key)[list(s1_order)], S1_BANDS)
    s2 = NORMALISATION["s2"].to_uint8(np.maximum(s2_pixels(key, 0), 0), S2_BANDS)
    np.testing.assert_array_equal(sample.arrays["s1"], s1)
    np.testing.assert_array_equal(sample.arrays["s2"], s2)
    np.testing.assert_array_equal(sample.arrays["label"], np.stack([label(key, time) for time in S2_TIMES]))
    assert {name: array.shape for name, array in sample.arrays.items()} == {n: archive.spec.shape(n) for n in archive.spec.names}


def test_locations_are_read_in_the_order_of_time_without_the_offset(root: Path) -> None:
    opened = open_zarr_zips(root)
    archive = pickle.loads(pickle.dumps(opened))
    assert archive.keys == tuple(sorted(IDS[:2]))
    assert (archive.asides, archive.offset) == ({"unlabelled": 1, "strays": 0}, 1000)
    for key in archive.keys:
        check(archive, key)
    sample = archive.read(IDS[0])
    assert [season["s1_time"] for season in sample.metadata["seasons"]] == sorted(S1_TIMES)
    assert [season["s2_scene"] for season in sample.metadata["seasons"]] == [s2_name(time) for time in S2_TIMES]
    assert sample.metadata["seasons"][0]["crs"] == "EPSG:32651"
    assert sample.metadata["seasons"][0]["transform"] == [10, 0, 300000, 0, -10, 4428000]
    assert (sample.metadata["lon"], sample.metadata["lat"], sample.notes) == (125.6, 42.66, ("offset_removed",))


def test_digital_numbers_without_an_offset_are_kept(root: Path) -> None:
    write_s2(root, pixels=np.stack([s2_pixels(key, 0) for key in IDS]))
    archive = open_zarr_zips(root)
    assert (archive.offset, archive.read(IDS[0]).notes) == (0, ())
    check(archive, IDS[0])


def test_bands_are_taken_by_name(root: Path) -> None:
    order = np.random.default_rng(0).permutation(13)
    pixels = np.stack([s2_pixels(key) for key in IDS])[:, :, order]
    write_s2(root, pixels=pixels, bands=tuple(S2_STORED[i] for i in order))
    write_s1(root, pixels=np.stack([s1_pixels(key) for key in IDS])[:, :, ::-1], bands=("vh", "vv"))
    check(open_zarr_zips(root), IDS[1])


@pytest.mark.parametrize(
    ("chunks", "compressor"),
    [
        ((1, 1, 13, SIDE, SIDE), numcodecs.Blosc("zstd", shuffle=2)),
        ((2, 3, 5, 7, 5), numcodecs.Zstd(3)),
        ((3, 4, 13, SIDE, SIDE), numcodecs.Zlib()),
        ((2, 1, 13, SIDE, SIDE), numcodecs.GZip()),
        ((2, 1, 13, SIDE, SIDE), numcodecs.LZ4()),
    ],
)
def test_any_chunks_and_known_codecs_give_the_same(root: Path, chunks: tuple[int, ...], compressor: object) -> None:
    write_s2(root, chunks=chunks, compressor=compressor)
    check(open_zarr_zips(root), IDS[1])


def test_labels_may_be_a_zip_file_beside_the_stores_or_lie_elsewhere(root: Path) -> None:
    with zipfile.ZipFile(root / "ssl4eo_s12_nol.zip", "w") as file:
        for path in sorted((root / "dw_noisy_labels").rglob("*.tif")):
            file.write(path, path.relative_to(root))
    (root.parent / "labels").mkdir()
    (root / "dw_noisy_labels").rename(root.parent / "labels" / "dw_noisy_labels")
    for archive in (open_zarr_zips(root), open_zarr_zips(root, root.parent / "labels")):
        assert archive.keys == tuple(sorted(IDS[:2]))
        check(archive, IDS[0])


def test_labels_that_do_not_fit_are_rejected(root: Path) -> None:
    shutil.rmtree(root / "dw_noisy_labels" / IDS[0] / s2_name(S2_TIMES[2]))
    write_label(root, IDS[1], S2_TIMES[0], np.full((SIDE, SIDE), 9, np.uint8))
    for time in S2_TIMES:
        write_label(root, IDS[2], time, np.full((SIDE, SIDE), 255, np.uint8))
    archive = open_zarr_zips(root)
    assert [reason(archive, key) for key in IDS] == ["missing_label", "label_out_of_range", "label_empty"]


def test_pixels_that_are_none_are_rejected(root: Path) -> None:
    s1, s2 = np.stack([s1_pixels(key) for key in IDS]), np.stack([s2_pixels(key) for key in IDS])
    s1[0, 1, 0, 3, 3] = np.nan
    s2[1, 2, 4] = 0
    write_s1(root, pixels=s1)
    write_s2(root, pixels=s2)
    archive = open_zarr_zips(root)
    assert [reason(archive, key) for key in IDS[:2]] == ["non_finite", "nodata_only"]


def test_a_location_of_one_modality_is_rejected(root: Path) -> None:
    write_s1(root, ids=IDS[1:])
    archive = open_zarr_zips(root)
    assert reason(archive, IDS[0]) == "missing_modality"
    check(archive, IDS[1])


def test_a_location_in_two_stores_is_a_duplicate_or_a_conflict(root: Path) -> None:
    write_s2(root, 2, ids=IDS[:1])
    archive = open_zarr_zips(root)
    assert archive.duplicates == {IDS[0]: 1}
    check(archive, IDS[0])
    write_s2(root, 2, ids=IDS[:1], pixels=s2_pixels("0000001")[None])
    archive = open_zarr_zips(root)
    assert (reason(archive, IDS[0]), archive.duplicates) == ("conflicting_duplicate", {})
    check(archive, IDS[1])


def edit(path: Path, member: str, change: Callable[[bytes], bytes | None]) -> None:
    """Rewrites a store with one member changed, or left out where `change` gives None."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    changed = change(members.pop(member))
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
        if changed is not None:
            file.writestr(member, changed)


def set_key(key: str, value: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), key: value}).encode()


@pytest.mark.parametrize(
    ("member", "change", "expected"),
    [
        ("bands/.zarray", set_key("compressor", {"id": "pickle"}), "unreadable"),
        ("bands/.zarray", set_key("filters", [{"id": "pickle"}]), "unreadable"),
        ("bands/.zarray", set_key("dtype", "|O"), "unreadable"),
        ("bands/.zarray", set_key("dtype", [["a", "<i2"]]), "unreadable"),
        ("bands/.zarray", set_key("order", "F"), "unreadable"),
        ("bands/.zarray", set_key("shape", [10**12, 4, 13, 12, 12]), "too_big"),
        ("bands/.zarray", set_key("chunks", [3, 4, 13, 10**6, 10**6]), "too_big"),
        ("bands/.zarray", lambda data: b"[" * 10**5, "unreadable"),
        ("bands/.zarray", lambda data: None, "missing_file"),
        ("bands/.zattrs", set_key("scale_factor", 0.1), "unreadable"),
        ("sample/0", lambda data: None, "missing_file"),
        ("sample/0", lambda data: data[:-3], "unreadable"),
        ("band/0", lambda data: numcodecs.Blosc().encode(b"\0" * 5000), "unreadable"),
    ],
)
def test_a_store_that_is_not_as_expected_is_rejected_and_the_others_are_read(
    root: Path, member: str, change: Callable[[bytes], bytes | None], expected: str
) -> None:
    second = write_s2(root, 2, ids=("0000009",), pixels=s2_pixels("0000009")[None])
    edit(second, member, change)
    archive = open_zarr_zips(root)
    assert archive.keys == (*sorted(IDS[:2]), "train/S2L1C/ssl4eos12_train_seasonal_data_000002.zarr.zip")
    assert reason(archive, archive.keys[2]) == expected
    check(archive, IDS[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: None, "missing_file"),  # a Zarr library would give fill values
        (lambda data: data[: len(data) // 2], "unreadable"),
        (lambda data: numcodecs.Blosc().encode(bytes(2**24)), "unreadable"),  # more than its metadata says
        (lambda data: numcodecs.Blosc().encode(b"x"), "unreadable"),
        (lambda data: b"", "unreadable"),
    ],
)
def test_damaged_chunks_are_rejected(root: Path, change: Callable[[bytes], bytes | None], expected: str) -> None:
    edit(write_s2(root), "bands/0.2.0.0.0", change)
    assert reason(open_zarr_zips(root), IDS[0]) == expected


@pytest.mark.parametrize("compressor", [numcodecs.Zstd(3), numcodecs.Zlib(), numcodecs.LZ4(), numcodecs.GZip()])
def test_chunks_that_inflate_are_rejected(root: Path, compressor: Any) -> None:
    bomb = compressor.encode(bytes(2**26))
    edit(write_s2(root, compressor=compressor), "bands/0.0.0.0.0", lambda data: bomb)
    assert reason(open_zarr_zips(root), IDS[0]) in ("unreadable", "truncated")


def test_a_member_that_inflates_beyond_its_stated_size_is_rejected_in_little_memory(root: Path) -> None:
    path, name = write_s2(root), "bands/0.0.0.0.0"
    edit(path, name, lambda data: zeros(256) + b"\3\0")
    data = bytearray(path.read_bytes())
    for signature, method, size in ((b"PK\3\4", 8, 22), (b"PK\1\2", 10, 24)):  # stored is said to be deflated, of 1,000 bytes
        at = data.rindex(signature)
        data[at + method], data[at + size : at + size + 4] = 8, (1000).to_bytes(4, "little")
    path.write_bytes(data)
    archive = open_zarr_zips(root)
    tracemalloc.start()
    assert reason(archive, IDS[0]) == "unreadable"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def test_a_directory_of_more_entries_than_any_store_has_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = write_s2(root, 2, ids=("0000009",), pixels=s2_pixels("0000009")[None])
    with zipfile.ZipFile(second, "a") as file:
        for number in range(1000):
            file.writestr(f"{number:0100d}", b"")
    monkeypatch.setattr(zarr_zip, "MAX_DIRECTORY_BYTES", 10**5)
    archive = open_zarr_zips(root)
    assert reason(archive, archive.keys[2]) == "too_big"
    check(archive, IDS[0])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda root: shutil.rmtree(root / "train/S1GRD"), ArchiveMissingError),
        (lambda root: (root / "train/S2L1C").rename(root / "train/S2L2A"), ArchiveMissingError),
        (lambda root: shutil.rmtree(root / "dw_noisy_labels"), ArchiveEmptyError),
        (lambda root: next((root / "train/S1GRD").iterdir()).write_bytes(b"PK"), UnreadableInputError),
        (lambda root: write_s2(root, 2, ids=IDS[:1], pixels=s2_pixels("1")[None, :2]), UnreadableInputError),
    ],
)
def test_what_cannot_be_opened_is_said(root: Path, change: Callable[[Path], object], error: type[Exception]) -> None:
    change(root)
    with pytest.raises(error, match=r"S1GRD|s2|dw_noisy_labels"):
        open_zarr_zips(root)


def test_reading_writes_nothing_and_notices_a_changed_store(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    archive = open_zarr_zips(root)
    archive.read(IDS[0])
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    os.utime(next((root / "train/S1GRD").iterdir()), ns=(0, 0))
    with pytest.raises(InputChangedError, match="S1GRD"):
        archive.read(IDS[0])
    assert archive.fingerprint != open_zarr_zips(root).fingerprint


def test_mutated_stores_are_read_or_rejected(root: Path, tmp_path: Path) -> None:
    good = write_s2(root).read_bytes()
    path = tmp_path / "mutant.zarr.zip"
    rng = random.Random(3)
    outcomes = set()
    for number in range(300):
        data = bytearray(good)
        if number % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with find_zarr_zip(path, tmp_path).open() as store:
                for name in ("sample", "band", "file_id", "bands"):
                    store.read(name)
            outcomes.add("read")
        except Rejected as error:
            outcomes.add(error.reason)
    assert {"unreadable", "read"} <= outcomes

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr

from cromss_dist.data.sample import Sample, SampleSpec, ValueSpec
from cromss_dist.data.store.cube import writer
from cromss_dist.data.store.cube.layout import Coordinate, Row, coordinate_node, encode_coordinate, encode_shard, json_bytes
from cromss_dist.data.store.cube.reader import CubeLayout
from cromss_dist.data.store.cube.record import CUBE, RECORD, CubeFile, write_record
from cromss_dist.data.store.cube.writer import CubeReader, create_cube, finish_cube, grow_cube, open_cube, read_rows, write_rows
from cromss_dist.data.store.times import from_seconds, to_seconds
from cromss_dist.errors import ShardError
from cromss_dist.schema import ArraySpec, Modality, Normalisation
from tests.data.fake_source import FakeSource, spec_of

PER_SHARD = 3
LAYOUT = CubeLayout({name: spec_of().shape(name) for name in spec_of().names}, PER_SHARD)


def write(folder: Path, source: FakeSource, missing: tuple[str, ...] = ()) -> tuple[list[Sample | None], str]:
    """A cube of all samples of a source but the missing ones, and the digest of its record."""
    samples = [None if key in missing else source.read(key) for key in source.keys]
    cube = folder / CUBE
    create_cube(cube, source.spec, len(samples), PER_SHARD)
    files: list[CubeFile] = []
    for first in range(0, len(samples), PER_SHARD):
        files += write_rows(cube, source.spec, first, samples[first : first + PER_SHARD])
    files += finish_cube(cube, source.spec, rows_of(samples))
    return samples, write_record(folder, files)["record_sha256"]


def rows_of(samples: list[Sample | None]) -> list[Row]:
    return [Row("", None) if sample is None else Row(sample.key, sample.metadata) for sample in samples]


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def source() -> FakeSource:
    return FakeSource(7)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, source: FakeSource) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("cube")
    return folder, write(folder, source, missing=("0000002",))[1]


@pytest.fixture
def folder(template: tuple[Path, str], tmp_path: Path) -> Path:
    """Seven locations in shards of three, the third of them rejected; to be damaged at will."""
    return Path(shutil.copytree(template[0], tmp_path / "dataset"))


def test_xarray_opens_the_cube_and_every_sample_is_what_was_written(folder: Path, source: FakeSource) -> None:
    dataset = xr.open_zarr(folder / CUBE, chunks=None)
    assert dict(dataset.sizes)["location"] == 7
    assert set(dataset.data_vars) == set(source.spec.names)
    for row, key in enumerate(source.keys):
        for name in source.spec.names:
            stored = dataset[name].isel(location=row)
            assert stored.dtype == np.uint8, "a _FillValue would have made it float32"
            if key == "0000002":
                assert (stored == (255 if name == "label" else 0)).all()
            else:
                np.testing.assert_array_equal(stored, source.read(key).arrays[name])
    assert dataset.valid.values.tolist() == [[key != "0000002"] * 4 for key in source.keys]


def test_samples_are_chosen_by_key_season_and_band_name(folder: Path, source: FakeSource) -> None:
    dataset = open_cube(folder)
    vh = dataset.s1.sel(location="0000005", season=2, s1_band="VH")
    np.testing.assert_array_equal(vh, source.read("0000005").arrays["s1"][2, 1])
    assert dataset.s2_20m.dims == ("location", "season", "s2_20m_band", "y_20m", "x_20m")
    assert [str(band) for band in dataset.s2_60m_band.values] == ["B1", "B9", "B10"]


def test_coordinates_say_where_when_and_in_which_grid(folder: Path, source: FakeSource) -> None:
    place = open_cube(folder).sel(location="0000004").isel(season=1)
    told = source.read("0000004").metadata
    season = told["seasons"][1]
    assert (float(place.lon), float(place.lat)) == (told["lon"], told["lat"])
    assert place.s1_time.values == np.datetime64("2020-04-05T01:02:03")
    assert place.s2_time.values == np.datetime64("2020-04-07T04:05:06")
    assert (str(place.s2_scene.values), str(place.crs.values)) == (season["s2_scene"], "EPSG:4326")
    np.testing.assert_array_equal(place.transform, season["transform"])
    assert place.spatial_ref.attrs["grid_mapping_name"] == "latitude_longitude"
    assert 'AUTHORITY["EPSG","4326"]' in place.spatial_ref.attrs["crs_wkt"]
    nowhere = open_cube(folder).isel(location=2)
    assert np.isnan(nowhere.lon)
    assert np.isnat(nowhere.s1_time).all()


def test_attributes_state_classes_contract_and_conventions(folder: Path, source: FakeSource) -> None:
    dataset = open_cube(folder)
    label = dataset.label.attrs
    assert label["flag_values"] == [*range(9), 255]
    assert label["flag_meanings"].split()[0::9] == ["water", "ignored"]
    assert dataset.attrs["normalisation"] == json.loads(json.dumps(source.spec.contracts()))
    assert dataset.s2_60m.attrs["normalisation_digest"] == source.spec.normalisation["s2"].digest
    assert dataset.attrs["proj:code"] == "EPSG:4326"
    assert {entry["name"] for entry in dataset.attrs["zarr_conventions"]} == {"proj:", "spatial:"}
    assert dataset.s2_20m.attrs["spatial:dimensions"] == ["y_20m", "x_20m"]


def test_tensorstore_reads_the_same_pixels(folder: Path, source: FakeSource) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    for name in source.spec.names:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / CUBE / name)}}
        np.testing.assert_array_equal(tensorstore.open(spec).result()[4].read().result(), source.read("0000004").arrays[name])


def test_zarr_itself_writes_what_reads_back_as_our_coordinates(tmp_path: Path) -> None:
    texts = np.array(["é", "", "a" * 300], object)
    for values, dtype in ((texts, str), (np.array([1.5, np.nan, -2]), "float64"), (np.arange(3), "int64")):
        theirs = zarr.create_array(tmp_path / "z", shape=(3,), chunks=(3,), dtype=dtype, overwrite=True, filters="auto")
        theirs[:] = values
        ours = Coordinate(values, ("x",), "" if dtype is str else 0, {})
        root = tmp_path / "ours"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / "zarr.json").write_bytes(json_bytes(coordinate_node(ours)))
        for name, data in encode_coordinate(ours):
            (root / name).write_bytes(data)
        read = zarr.open_array(root, mode="r")
        np.testing.assert_array_equal(read[:], theirs[:])


def test_equal_samples_give_equal_bytes_in_any_order_and_nothing_is_left_over(folder: Path, tmp_path: Path) -> None:
    source = FakeSource(7, rejected={"0000002": "truncated"})
    samples = [None if key == "0000002" else source.read(key) for key in source.keys]
    cube = tmp_path / "again" / CUBE
    create_cube(cube, source.spec, 7, PER_SHARD)
    for first in (6, 0, 3, 0):
        write_rows(cube, source.spec, first, samples[first : first + PER_SHARD])
    (cube / "s1" / ".c.0.0.0.0.0.0123456789abcdef.tmp").write_bytes(b"of a killed writer")
    finish_cube(cube, source.spec, rows_of(samples))
    assert contents(cube) == contents(folder / CUBE)


def test_a_grown_cube_is_that_of_all_samples_and_a_linked_copy_keeps_its_own(folder: Path, tmp_path: Path) -> None:
    source = FakeSource(11)
    samples: list[Sample | None] = [None if key == "0000002" else source.read(key) for key in source.keys]
    before = contents(folder)
    cube = tmp_path / "grown" / CUBE
    shutil.copytree(folder / CUBE, cube, copy_function=os.link)
    grow_cube(cube, source.spec, 13)
    added = [*samples[7:], None, None]
    rows = [*read_rows(cube), *rows_of([None, None]), *rows_of(samples[7:])]
    write_rows(cube, source.spec, 9, added[:3])
    write_rows(cube, source.spec, 12, samples[10:])
    finish_cube(cube, source.spec, rows)
    assert contents(folder) == before
    dataset = xr.open_zarr(cube, chunks=None)
    assert dataset.sizes["location"] == 13
    assert dataset.valid.values[:, 0].tolist() == [i not in (2, 7, 8) for i in range(13)]
    np.testing.assert_array_equal(dataset.label.sel(location="0000009"), source.read("0000009").arrays["label"])
    assert (dataset.s1.isel(location=7) == 0).all()


def test_a_cube_without_data_is_a_group_of_arrays_with_the_rows_it_was_made_for(tmp_path: Path) -> None:
    spec = spec_of()
    create_cube(tmp_path, spec, 4, PER_SHARD)
    for num_rows in (4, 13):
        grow_cube(tmp_path, spec, num_rows)
        arrays = dict(zarr.open_group(tmp_path, mode="r").arrays())
        assert {name: array.shape for name, array in arrays.items()} == {n: (num_rows, *spec.shape(n)) for n in spec.names}


@pytest.mark.parametrize(("first_row", "num_samples"), [(1, 1), (0, PER_SHARD + 1)])
def test_only_whole_shards_are_written(tmp_path: Path, first_row: int, num_samples: int) -> None:
    create_cube(tmp_path, spec_of(), 7, PER_SHARD)
    before = contents(tmp_path)
    with pytest.raises(AssertionError, match="a shard of 3"):
        write_rows(tmp_path, spec_of(), first_row, [None] * num_samples)
    assert contents(tmp_path) == before


def test_rows_come_back_as_they_were_given(folder: Path, source: FakeSource) -> None:
    expected = [Row("", None) if key == "0000002" else Row(key, source.read(key).metadata) for key in source.keys]
    assert list(read_rows(folder / CUBE)) == expected


def test_what_an_archive_does_not_say_stays_unsaid(tmp_path: Path) -> None:
    image = ArraySpec("s2", ("B4", "B3", "B2"), 1, "s2")
    contract: dict[Modality, Normalisation] = {"s2": spec_of().normalisation["s2"]}
    spec = SampleSpec(8, 1, (image,), (ValueSpec("label", ("a b", "c")),), contract, {"s2": "archive"})
    season = dict.fromkeys(("s1_scene", "s1_time", "s2_scene", "s2_time", "crs", "transform"))
    pixels = {name: np.zeros(spec.shape(name), np.uint8) for name in spec.names}
    sample = Sample("ä 1", pixels, {"key": "ä 1", "lon": None, "lat": None, "seasons": [season]}, ())
    cube = tmp_path / CUBE
    create_cube(cube, spec, 1, 5)
    files = [*write_rows(cube, spec, 0, [sample]), *finish_cube(cube, spec, [Row("ä 1", sample.metadata)])]
    assert write_record(tmp_path, files)["files"] == len(files)
    dataset = open_cube(tmp_path)
    assert "proj:code" not in dataset.attrs
    assert "crs_wkt" not in dataset.spatial_ref.attrs
    assert dataset.label.attrs["flag_meanings"] == "a_b c ignored"
    assert read_rows(cube) == (Row("ä 1", sample.metadata),)


@pytest.mark.parametrize("time", ["20200229T235959", "19691231T000000", None])
def test_times_survive_as_seconds(time: str | None) -> None:
    assert from_seconds(to_seconds(time)) == time


def test_a_time_without_a_clock_is_midnight() -> None:
    assert from_seconds(to_seconds("20200101")) == "20200101T000000"


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "deleted": ("is missing", lambda cube: (cube / "label" / "c.1.0.0.0").unlink()),
    "truncated": ("bytes, its record states", lambda cube: os.truncate(cube / "s1" / "c.0.0.0.0.0", 100)),
    "surplus": ("is not in the record", lambda cube: (cube / "s1" / "c.9.0.0.0.0").write_bytes(b"x")),
    "metadata": ("is not the metadata", lambda cube: replace(cube / "label" / "zarr.json", b"[3,", b"[2,", b'"y"', b'"z"')),
    "folder": ("is missing", lambda cube: shutil.rmtree(cube / "lon")),
    "dead link": ("is missing", lambda cube: relink(cube / "label" / "c.1.0.0.0", cube / "nowhere")),
    "linked folder": ("is not in the record", lambda cube: (cube / "more").symlink_to(cube / "s1")),
}


def relink(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


def replace(path: Path, *texts: bytes) -> None:
    data = path.read_bytes()
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        data = data.replace(old, new)
    assert data != path.read_bytes()
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cube_with_a_damaged_file_does_not_open(folder: Path, damage: str) -> None:
    message, do = DAMAGES[damage]
    do(folder / CUBE)
    with pytest.raises(ShardError, match=message):
        open_cube(folder)


def test_a_record_that_is_not_the_manifests_is_refused(folder: Path, template: tuple[Path, str]) -> None:
    open_cube(folder, template[1])
    with pytest.raises(ShardError, match="not the record"):
        open_cube(folder, "0" * 64)
    for strange in (b"{}", b"{", b"[]", b"[" * 100_000):
        (folder / RECORD).write_bytes(strange)
        with pytest.raises(ShardError, match="no record of a cube"):
            open_cube(folder)
    (folder / RECORD).unlink()
    with pytest.raises(ShardError, match="no commit record"):
        open_cube(folder)


def test_a_record_of_another_version_is_refused(folder: Path) -> None:
    replace(folder / RECORD, b'"schema_version":1', b'"schema_version":2')
    with pytest.raises(ShardError, match="version 2"):
        open_cube(folder)


def test_metadata_that_no_cube_of_ours_has_is_refused_though_the_record_fits(folder: Path) -> None:
    replace(folder / CUBE / "label" / "zarr.json", b'"zstd"', b'"bz2"')
    files = [CubeFile(path, (folder / CUBE / path).stat().st_size, digest) for path, digest in contents(folder / CUBE).items()]
    write_record(folder, files)
    for opened in (lambda: open_cube(folder), lambda: CubeReader(folder / CUBE, LAYOUT)):
        with pytest.raises(ShardError, match=r"no cube of ours.*bz2"):
            opened()


def test_a_file_that_the_disk_changed_does_not_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path)[:-1] + b"?")
    with pytest.raises(ShardError, match="read back is not what was written"):
        create_cube(tmp_path / CUBE, spec_of(), 3, 3)
    assert contents(tmp_path) == {}


def test_a_shard_that_zarr_reads_otherwise_does_not_get_its_name(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_cube(tmp_path, source.spec, 3, 3)
    before = contents(tmp_path)
    monkeypatch.setattr(writer, "encode_shard", lambda rows, *sizes: encode_shard([*rows[1:], rows[0]], *sizes))
    with pytest.raises(ShardError, match=r"c\.0\.0.*read back is not what was written"):
        write_rows(tmp_path, source.spec, 0, [source.read(key) for key in source.keys[:3]])
    monkeypatch.undo()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["http://example.org/cube", "empty"])
def test_only_a_local_cube_is_opened(place: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no cube\.zarr"):
        open_cube(place if "://" in place else tmp_path)


def damage_and_read(folder: Path, rng: np.random.Generator, kind: str) -> bool:
    """Damages one file of pixels; whether opening or reading that file says so."""
    cube = folder / CUBE
    files = sorted(path for path in cube.rglob("c.*") if path.is_file() and path.parent.name in ("s1", "s2_20m", "label"))
    path = files[rng.integers(len(files))]
    whole = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(whole[: rng.integers(len(whole))])
    else:
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
    try:
        dataset = open_cube(folder)
        _ = dataset[path.parent.name].values
    except (ShardError, ValueError, RuntimeError):
        return True
    finally:
        path.write_bytes(whole)
    return False


@pytest.mark.parametrize("kind", ["deleted", "flipped", "truncated"])
@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_no_damaged_chunk_is_ever_read_as_pixels(folder: Path, kind: str, times: int) -> None:
    rng = np.random.default_rng(len(kind))
    assert [damage_and_read(folder, rng, kind) for _ in range(times)] == [True] * times


def checked(data: bytes) -> bytes:
    """With a CRC-32C that fits: what a wrong writer, not a broken disk, would leave."""
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def without_longitude(cube: Path) -> None:
    shutil.rmtree(cube / "lon")
    create_cube(cube, spec_of(), 7, PER_SHARD)  # a group that does not consolidate it


# Each makes zarr raise another kind of error.
UNREADABLE: dict[str, Callable[[Path], object]] = {
    "no group": lambda cube: (cube / "zarr.json").unlink(),
    "no coordinate": without_longitude,
    "changed coordinate": lambda cube: (cube / "lon" / "c.0").write_bytes(b"no coordinate"),
    "checked coordinate": lambda cube: (cube / "lon" / "c.0").write_bytes(checked(b"no coordinate")),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_reader_refuses_coordinates_that_cannot_be_read(folder: Path, damage: str) -> None:
    UNREADABLE[damage](folder / CUBE)
    with pytest.raises(ShardError, match="coordinates cannot be read"):
        CubeReader(folder / CUBE, LAYOUT)


def test_opening_reads_no_pixel(folder: Path) -> None:
    path = folder / CUBE / "s1" / "c.0.0.0.0.0"
    path.write_bytes(bytes(path.stat().st_size))
    assert open_cube(folder).sizes["location"] == 7


def test_a_reader_names_the_array_and_row_with_a_changed_byte(folder: Path, source: FakeSource) -> None:
    reader = CubeReader(folder / CUBE, LAYOUT)
    path = folder / CUBE / LAYOUT.file_of(4, "label")
    assert path.name == "c.1.0.0.0"
    flipped = bytearray(path.read_bytes())
    flipped[20] ^= 1  # in the first chunk of the shard: row 3, season 0
    path.write_bytes(flipped)
    with pytest.raises(ShardError, match=r"label/c\.1\.0\.0\.0: row 3: season 0"):
        reader.read(3, "label")
    np.testing.assert_array_equal(reader.read(3, "label", season=1), source.read("0000003").arrays["label"][1])
    np.testing.assert_array_equal(reader.read(4, "label"), source.read("0000004").arrays["label"])
    offset, size = np.frombuffer(flipped[-4 - 16 * 4 * PER_SHARD : -4], "<u8")[:2].tolist()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(checked(bytes(size - 4)))
    with pytest.raises(ShardError, match=r"label/c\.1\.0\.0\.0: row 3: season 0"):
        reader.read(3, "label")

import dataclasses
import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
import pytest
import safetensors.numpy

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Uint8Array
from cromss_dist.data.store.cube.writer import read_rows
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.files import LocalFiles
from cromss_dist.data.store.index import ShardIndex, open_shards
from cromss_dist.data.store.index_file import INDEX, IndexTables, TarTables, join, places_of, write_index
from cromss_dist.data.store.manifest import canonical
from cromss_dist.data.store.open import open_dataset
from cromss_dist.data.store.stored import read_stored
from cromss_dist.data.store.times import NO_TIME, to_seconds
from cromss_dist.errors import ShardError
from tests.data.fake_source import FakeSource, spec_of
from tests.data.tiny_archive import KEYS


def reseal(folder: Path, **changes: object) -> None:
    """Edits the manifest and gives it a digest that fits."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = {**manifest, **changes}
    del content["digest"]
    (folder / "manifest.json").write_text(json.dumps({**content, "digest": hashlib.sha256(canonical(content)).hexdigest()}))


def tars_of(index: ShardIndex) -> TarTables:
    assert index.tables.tars is not None
    return index.tables.tars


def test_any_season_of_any_location_equals_the_archive(shards: Path, archive_template: Path) -> None:
    index = open_shards(shards)
    archive = open_archive(archive_template)
    assert index.locations == KEYS
    for sample_id, key in enumerate(KEYS):
        expected = archive.read(key).arrays
        for season in range(4):
            found = index.read(sample_id, season, index.arrays)
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[name] if name == "label" else expected[name][season])


def test_real_locations_come_back_as_they_were_read(mini_archive: Path, tmp_path: Path) -> None:
    archive = open_archive(mini_archive)
    convert(archive, tmp_path / "out", shard_size_mib=8)
    index = open_shards(tmp_path / "out")
    expected = archive.read("0900303").arrays
    for name, array in index.read(index.locations.index("0900303"), 2, index.arrays).items():
        np.testing.assert_array_equal(array, expected[name] if name == "label" else expected[name][2])


def test_only_what_is_asked_for_is_read(shards: Path) -> None:
    assert list(open_shards(shards).read(0, 0, ["s2_60m", "label"])) == ["s2_60m", "label"]


def test_every_flipped_byte_of_pixels_is_an_error_that_names_shard_key_and_member(shards: Path) -> None:
    index = open_shards(shards)
    path = shards / "shard-000000.tar"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for array, name in enumerate(index.arrays):
        size = int(np.prod(index.manifest["arrays"][name]["shape"]))
        for place in [0, size - 1, *rng.integers(0, size, 10)]:
            bad = bytearray(good)
            bad[tars_of(index).offsets[1, array] + place] ^= 1 << rng.integers(8)
            path.write_bytes(bad)
            season = int(place) // (size // 4)
            with pytest.raises(ShardError, match=f"shard-000000.tar: sample {KEYS[1]}, member {name}.npy, season {season}"):
                index.read(1, season, [name])
            if name != "label":
                index.read(1, (season + 1) % 4, [name])  # other seasons are whole


@pytest.fixture
def seven_shards(tmp_path: Path) -> Path:
    """Tars of one sample each, all of one size."""
    convert(FakeSource(7, spec_of(patch_px=12)), tmp_path / "out", shard_size_mib=0.001)
    assert len({path.stat().st_size for path in (tmp_path / "out").glob("*.tar")}) == 1
    assert len(list((tmp_path / "out").glob("*.tar"))) == 7
    return tmp_path / "out"


def test_all_shards_that_are_missing_surplus_cut_or_swapped_are_listed_at_once(seven_shards: Path) -> None:
    tars = sorted(seven_shards.glob("*.tar"))
    tars[1].rename(seven_shards / "x")
    tars[3].rename(tars[1])
    (seven_shards / "x").rename(tars[3])
    tars[0].unlink()
    tars[4].with_suffix(".json").unlink()
    os.truncate(tars[5], 512)
    (seven_shards / "shard-000009.tar").touch()
    with pytest.raises(ShardError) as raised:
        open_shards(seven_shards)
    for told in (
        "2 missing (shard-000004.json, shard-000000.tar)",
        "2 swapped (shard-000001.tar, shard-000003.tar)",
        "1 of another size (shard-000005.tar)",
        "1 surplus (shard-000009.tar)",
    ):
        assert told in str(raised.value)


def test_of_many_missing_shards_the_first_few_are_named_and_all_counted(seven_shards: Path) -> None:
    for tar in seven_shards.glob("*.tar"):
        tar.unlink()
    with pytest.raises(ShardError, match=r"7 missing \(shard-000000\.tar, .*shard-000004\.tar, \.\.\.\)"):
        open_shards(seven_shards)


def test_a_shard_cut_after_opening_is_an_error(shards: Path) -> None:
    index = open_shards(shards)
    (shards / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=f"sample {KEYS[2]}, member s1.npy, season 0: the file ends before it"):
        index.read(2, 0, ["s1"])
    (shards / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar is missing"):
        index.read(2, 0, ["s1"])


def test_a_missing_record_is_told(shards: Path) -> None:
    (shards / "shard-000000.json").unlink()
    with pytest.raises(ShardError, match=r"1 missing \(shard-000000\.json\)"):
        open_shards(shards)


def test_an_index_that_is_missing_cut_or_not_the_manifests_is_refused(shards: Path) -> None:
    path = shards / INDEX
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [0, 7, 8, *rng.integers(len(good), size=20), len(good) - 1]:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        with pytest.raises(ShardError, match="not the index that the manifest was made with"):
            open_shards(shards)
    for bad in (bytearray(good[:-1]), bytearray(good + b"x")):
        path.write_bytes(bad)
        with pytest.raises(ShardError, match="not the index that the manifest was made with"):
            open_shards(shards)
    path.unlink()
    with pytest.raises(ShardError, match=r"no index\.safetensors"):
        open_shards(shards)


def test_an_edited_manifest_is_refused(shards: Path) -> None:
    path = shards / "manifest.json"
    path.write_text(path.read_text().replace('"patch_px": 48', '"patch_px": 96'))
    with pytest.raises(ShardError, match="digest"):
        open_shards(shards)
    path.write_text("{")
    with pytest.raises(ShardError, match="no JSON"):
        open_shards(shards)
    path.unlink()
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        open_shards(shards)


def test_another_schema_version_is_refused(shards: Path) -> None:
    reseal(shards, schema_version=2)
    with pytest.raises(ShardError, match="version 2"):
        open_shards(shards)


@pytest.mark.parametrize("name", ["../shards/shard-000000.tar", "/etc/passwd", "pipe:touch x", "http://a/b.tar", "a\nb.tar", ""])
def test_names_that_are_not_plain_are_refused(shards: Path, name: str) -> None:
    entries = json.loads((shards / "manifest.json").read_text())["shards"]
    reseal(shards, shards=[{**entries[0], "name": name}])
    with pytest.raises(ShardError, match="plain names"):
        open_shards(shards)


@pytest.mark.parametrize(
    "changes", [{"arrays": None}, {"shards": 3}, {"shards": [{"name": "a.tar"}]}, {"arrays": {"s1": {"shape": "x"}}}]
)
def test_a_malformed_manifest_with_a_fitting_digest_is_refused(shards: Path, changes: dict[str, object]) -> None:
    reseal(shards, **changes)
    with pytest.raises(ShardError):
        open_shards(shards)


def sign_index(folder: Path, **changes: object) -> None:
    """Changes arrays of the index, or takes away those that are None, and signs it."""
    arrays = safetensors.numpy.load_file(folder / INDEX)
    kept = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    write_signed(folder, safetensors.numpy.save(kept))  # type: ignore[arg-type]


def write_signed(folder: Path, data: bytes) -> None:
    (folder / INDEX).write_bytes(data)
    reseal(folder, index={"name": INDEX, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def edited(folder: Path, name: str, place: tuple[int, ...], value: int) -> dict[str, object]:
    array = safetensors.numpy.load_file(folder / INDEX)[name].copy()
    array[place] = value
    return {name: array}


@pytest.mark.parametrize("value", [-1, 10**6, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(("name", "place"), [("offsets", (1, 2)), ("metadata_spans", (1, 0)), ("metadata_spans", (1, 1))])
def test_what_lies_outside_its_tar_is_refused_on_opening(shards: Path, name: str, place: tuple[int, ...], value: int) -> None:
    sign_index(shards, **edited(shards, name, place, value))
    with pytest.raises(ShardError, match=r"malformed.*not lie inside"):
        open_shards(shards)


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": None},
        {"lon": None},
        {"surplus": np.zeros(3)},
        {"cube_rows": np.arange(3)},  # without a cube
        {"lat": np.zeros(3, np.float32)},
        {"lat": np.zeros(2)},
        {"s1_time": np.zeros((3, 5), np.int64)},
        {"shard_sizes": np.array([1, 2])},
        {"shard_sizes": np.array([3, 0])},
        {"shard_sizes": np.array([2**62, 2**62 + 3])},
        {"shard_sizes": np.array([2])},
        {"key_offsets": np.array([0, 7, 3, 21])},
        {"key_offsets": np.array([0, 7, 14, 22])},
        {"key_offsets": np.array([-7, 0, 7, 21])},
        {"keys": np.full(21, 0xFF, np.uint8)},
        {"keys": np.zeros((3, 7), np.uint8)},
    ],
)
def test_an_index_of_another_dataset_is_refused_though_all_digests_fit(shards: Path, changes: dict[str, object]) -> None:
    sign_index(shards, **changes)
    with pytest.raises(ShardError, match="malformed"):
        open_shards(shards)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_what_is_no_safetensors_file_is_refused(shards: Path, data: bytes) -> None:
    write_signed(shards, data)
    with pytest.raises(ShardError, match="malformed"):
        open_shards(shards)


def test_numbers_of_samples_and_seasons_that_no_memory_holds_are_refused(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    for changes in (
        {"num_samples": 10**13},
        {"index": {**manifest["index"], "size": 10**18}},
        {"shards": [{**manifest["shards"][0], "samples": 10**13}, *manifest["shards"][1:]]},
        {"arrays": {**manifest["arrays"], "label": {**manifest["arrays"]["label"], "shape": [10**13, 48, 48]}}},
    ):
        reseal(shards, **{**manifest, **changes})
        with pytest.raises(ShardError, match=r"malformed|not the index"):
            open_shards(shards)


def test_metadata_that_is_no_json_object_is_an_error_though_its_checksum_holds(shards: Path) -> None:
    tar = shards / "shard-000000.tar"
    start, size, _ = tars_of(open_shards(shards)).metadata_spans[0].tolist()
    for text in (b"[1, 2]", b"{", b"\0\0\0\xff", b"[" * 500):
        data = text.ljust(size)
        tar.write_bytes(tar.read_bytes()[:start] + data + tar.read_bytes()[start + size :])
        sign_index(shards, **edited(shards, "metadata_spans", (0, 2), google_crc32c.value(data)))
        with pytest.raises(ShardError, match="no JSON"):
            open_shards(shards).metadata(0)


def test_an_array_larger_than_its_member_is_refused(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    for array in manifest["arrays"].values():
        array["shape"][-2:] = [10 * side for side in array["shape"][-2:]]
    reseal(shards, arrays=manifest["arrays"], patch_px=10 * manifest["patch_px"])
    with pytest.raises(ShardError, match="not lie inside"):
        open_shards(shards)


def test_a_dataset_of_a_cube_alone_has_no_shards_to_open(tmp_path: Path) -> None:
    convert(FakeSource(2), tmp_path / "out", write="cube")
    for opened in (open_shards, lambda folder: open_dataset(folder, reader="shards")):
        with pytest.raises(ShardError, match="has no shards, only a cube"):
            opened(tmp_path / "out")


@pytest.mark.parametrize("folder", ["http://example.org/shards", "pipe:touch x", "nowhere"])
def test_what_is_no_folder_is_refused(folder: str) -> None:
    with pytest.raises(ShardError, match="is not a folder"):
        open_shards(folder)


def filled(index: Dataset, sample_id: int, season: int) -> dict[str, Uint8Array]:
    arrays: dict[str, Uint8Array] = {name: np.full(index.shape(name), 7, np.uint8) for name in index.arrays}
    index.read_into(sample_id, season, arrays)
    return arrays


def test_a_dataset_reads_into_the_callers_arrays_what_the_archive_has(shards: Path, archive_template: Path) -> None:
    dataset = open_dataset(shards)
    archive = open_archive(archive_template)
    for sample_id, key in enumerate(dataset.locations):
        expected = archive.read(key).arrays
        for season in range(4):
            for name, array in filled(dataset, sample_id, season).items():
                np.testing.assert_array_equal(array, expected[name] if name == "label" else expected[name][season])
    assert dataset.shard_sizes.tolist() == [2, 1]
    for shard in range(2):
        dataset.fetch(shard)


def test_a_place_in_a_batch_is_filled_and_its_neighbours_are_left(shards: Path) -> None:
    index = open_shards(shards)
    batch = np.full((3, *index.shape("s1")), 7, np.uint8)
    index.read_into(1, 2, {"s1": batch[1]})
    np.testing.assert_array_equal(batch[1], index.read(1, 2, ["s1"])["s1"])
    assert np.all(batch[[0, 2]] == 7)


def test_a_short_file_is_an_error_even_where_the_array_holds_the_right_bytes_from_before(shards: Path) -> None:
    index = open_shards(shards)
    arrays = {"label": np.empty(index.shape("label"), np.uint8)}
    index.read_into(0, 0, arrays)
    os.truncate(shards / "shard-000000.tar", int(tars_of(index).offsets[0, index.arrays.index("label")]) + 48 * 48 + 1)
    with pytest.raises(ShardError, match=r"member label\.npy, season 1: the file ends before it"):
        index.read_into(0, 0, arrays)


def test_arrays_of_another_type_or_size_or_with_gaps_are_refused(shards: Path) -> None:
    index = open_shards(shards)
    wrong = (np.empty((2, 48, 47), np.uint8), np.empty((2, 48, 48), np.int8), np.empty((2, 48, 96), np.uint8)[..., ::2])
    for array in wrong:
        with pytest.raises(ValueError, match="s1 needs a C-contiguous uint8 array"):
            index.read_into(0, 0, {"s1": array})  # type: ignore[dict-item]
    for sample_id, season in ((-1, 0), (3, 0), (0, -1), (0, 4)):
        with pytest.raises(IndexError):
            index.read_into(sample_id, season, {})


@dataclasses.dataclass
class TwoCopies:
    """A damaged copy, then whole ones, if there is another to be had."""

    bad: Path
    good: Path
    others: int
    asked: int = 0
    are_local: bool = False

    def open(self, shard: int) -> int:
        return LocalFiles(self.path(0).parent, (self.path(0).name,)).open(0)

    def path(self, shard: int) -> Path:
        return self.good if self.asked and self.others else self.bad

    def discard(self, shard: int) -> bool:
        self.asked += 1
        return self.asked <= self.others


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("what", ["pixels", "metadata"])
def test_a_damaged_copy_is_discarded_and_a_fresh_one_read_once(shards: Path, damage: str, what: str) -> None:
    index = open_shards(shards)
    bad = shards / "bad.tar"
    data = bytearray((shards / "shard-000000.tar").read_bytes())
    for offset in (tars_of(index).offsets[0, 0], tars_of(index).metadata_spans[0, 0]):
        data[offset] ^= 1
    if damage != "missing":
        bad.write_bytes(data if damage == "flipped" else data[:512])

    def read(files: TwoCopies) -> object:
        remote = dataclasses.replace(index, files=files)
        return remote.metadata(0) if what == "metadata" else remote.read(0, 0, ["s1"])["s1"].tobytes()

    whole = index.metadata(0) if what == "metadata" else index.read(0, 0, ["s1"])["s1"].tobytes()
    files = TwoCopies(bad, shards / "shard-000000.tar", others=1)
    assert read(files) == whole
    assert files.asked == 1
    for lost in (TwoCopies(bad, bad, others=0), TwoCopies(bad, bad, others=1)):
        with pytest.raises(ShardError):
            read(lost)
        assert lost.asked == 1


@pytest.mark.parametrize("write", ["shards", "cube", "both"])
def test_the_index_says_where_and_when_every_sample_was_taken(write: Literal["shards", "cube", "both"], tmp_path: Path) -> None:
    source = FakeSource(7, rejected={"0000003": "truncated"})
    convert(source, tmp_path / "out", write=write, shard_size_mib=0.06, max_reject_fraction=1)
    tables = read_stored(tmp_path / "out").tables
    keys = [key for key in source.keys if key != "0000003"]
    assert tables.locations == tuple(keys)
    assert tables.shard_sizes.tolist() == [2, 1, 2, 1]
    metadata = [source.read(key).metadata for key in keys]
    assert tables.places.lon.tolist() == [of["lon"] for of in metadata]
    assert tables.places.lat.tolist() == [of["lat"] for of in metadata]
    for name in ("s1_time", "s2_time"):
        expected = [[to_seconds(season[name]) for season in of["seasons"]] for of in metadata]
        assert getattr(tables.places, name).tolist() == expected
    for checksums, key in zip(tables.checksums, keys, strict=True):
        arrays = source.read(key).arrays.values()
        assert checksums.tolist() == [[google_crc32c.value(season) for season in array] for array in arrays]
    assert (tables.tars is None) == (write == "cube")
    assert (tables.cube_rows is None) == (write == "shards")
    if tables.cube_rows is not None:
        rows = read_rows(tmp_path / "out" / "cube.zarr")
        assert [rows[row].key for row in tables.cube_rows.tolist()] == keys


def test_unknown_places_and_times_are_nan_and_no_time() -> None:
    season = {"s1_time": None, "s2_time": "20200101"}
    places = places_of([{"lon": None, "lat": None, "seasons": [season]}], 1)
    assert np.isnan([places.lon, places.lat]).all()
    assert (places.s1_time.tolist(), places.s2_time.tolist()) == ([[NO_TIME]], [[1577836800]])


def test_keys_that_are_no_text_come_back(tmp_path: Path) -> None:
    keys = ("", "a.b/c", "\u00e9\u4e2d", "\udcff", "\0")
    convert(FakeSource(keys=keys), tmp_path / "out", shard_size_mib=0.06)
    assert open_shards(tmp_path / "out").locations == tuple(sorted(keys))


def test_an_appended_dataset_has_the_index_that_one_conversion_of_its_parts_has(tmp_path: Path) -> None:
    convert(FakeSource(3), tmp_path / "grown", write="both", shard_size_mib=0.06)
    first = read_stored(tmp_path / "grown").tables
    later = FakeSource(keys=["0000007", "0000008"])
    convert(later, tmp_path / "grown", append=True)
    convert(later, tmp_path / "alone", write="both", shard_size_mib=0.06)
    grown, alone = read_stored(tmp_path / "grown").tables, read_stored(tmp_path / "alone").tables
    assert grown.cube_rows is not None
    moved = dataclasses.replace(alone, cube_rows=grown.cube_rows[3:])  # the old parts leave room for a fourth sample
    assert grown.cube_rows.tolist() == [0, 1, 2, 4, 5]
    assert index_bytes(tmp_path, join([first, moved])) == (tmp_path / "grown" / INDEX).read_bytes()


def index_bytes(folder: Path, tables: IndexTables) -> bytes:
    write_index(folder, tables)
    return (folder / INDEX).read_bytes()


def test_threads_and_processes_read_alike(shards: Path) -> None:
    index = open_shards(shards)
    expected = [index.read(i % 3, i % 4, ["s2_10m"])["s2_10m"].tobytes() for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: index.read(i % 3, i % 4, ["s2_10m"])["s2_10m"].tobytes(), range(24))) == expected
    sent = pickle.loads(pickle.dumps(index))
    assert sent.read(1, 1, ["s2_10m"])["s2_10m"].tobytes() == expected[1]

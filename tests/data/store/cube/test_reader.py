"""A cube read as a dataset: the pixels of the source it was made from, or an error."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import torch

from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.conversion.plan import Sinks
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.data.loading.plan import Source, TrainPlan
from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.data.store.cube.reader import CHECKED, CubeIndex, cube_index, cube_of
from cromss_dist.data.store.cube.record import CUBE, RECORD, read_record
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.files import LocalFiles
from cromss_dist.data.store.manifest import read_manifest, write_manifest
from cromss_dist.data.store.open import open_dataset
from cromss_dist.data.store.stored import read_stored
from cromss_dist.errors import ShardError
from cromss_dist.schema import Batch
from tests.data.fake_source import FakeSource

SOURCE = FakeSource(11, rejected={"0000001": "truncated", "0000005": "truncated"})
SEASONS = range(4)


def converted(folder: Path, write: Sinks, source: FakeSource = SOURCE) -> Path:
    """Three locations a part."""
    return convert(source, folder, write=write, shard_size_mib=0.1, max_reject_fraction=0.5).folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("both") / "out", "both")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("alone") / "out", "cube")


@pytest.fixture
def damaged(alone: Path, tmp_path: Path) -> Path:
    """To be damaged at will."""
    return Path(shutil.copytree(alone, tmp_path / "damaged"))


def cube(folder: Path) -> CubeIndex:
    dataset = open_dataset(folder, reader="cube")
    assert isinstance(dataset, CubeIndex)
    return dataset


def read(dataset: Dataset, sample_id: int, season: int) -> dict[str, Uint8Array]:
    """All arrays, into ones that hold something else."""
    arrays: dict[str, Uint8Array] = {name: np.full(dataset.shape(name), 77, np.uint8) for name in dataset.arrays}
    dataset.read_into(sample_id, season, arrays)
    return arrays


def truth(key: str, season: int, source: FakeSource = SOURCE) -> dict[str, Uint8Array]:
    arrays = source.read(key).arrays
    return {name: array if name == "label" else array[season] for name, array in arrays.items()}


def assert_is_the_source(dataset: Dataset, source: FakeSource = SOURCE) -> None:
    for sample_id, key in enumerate(dataset.locations):
        for season in SEASONS:
            found, expected = read(dataset, sample_id, season), truth(key, season, source)
            assert found.keys() == expected.keys()
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{key} {season} {name}")


@pytest.mark.parametrize("write", ["both", "alone"])
def test_a_cube_has_ids_order_places_and_pixels_of_the_shards(write: str, both: Path, request: pytest.FixtureRequest) -> None:
    shards, dataset = open_dataset(both, reader="shards"), cube(request.getfixturevalue(write))
    assert list(dataset.locations) == list(shards.locations) == [key for key in SOURCE.keys if key not in SOURCE.rejected]
    assert dataset.shard_sizes.tolist() == shards.shard_sizes.tolist() == [2, 2, 3, 2]
    for name, values in vars(shards.places).items():
        np.testing.assert_array_equal(getattr(dataset.places, name), values)
    assert_is_the_source(dataset)
    assert_is_the_source(shards)


def test_a_dataset_opens_as_what_it_has(both: Path, alone: Path, tmp_path: Path) -> None:
    assert not isinstance(open_dataset(both), CubeIndex)
    assert isinstance(open_dataset(alone), CubeIndex)
    with pytest.raises(ShardError, match="only a cube"):
        open_dataset(alone, reader="shards")
    with pytest.raises(ShardError, match="has no cube"):
        open_dataset(converted(tmp_path / "out", "shards"), reader="cube")


def test_an_appended_cube_is_read_past_its_padding(damaged: Path) -> None:
    more = FakeSource(keys=[f"9{i:06d}" for i in range(4)])
    convert(more, damaged, append=True, max_reject_fraction=0.5)
    dataset = cube(damaged)
    assert dataset.rows.tolist() == [0, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15]
    assert_is_the_source(dataset, FakeSource(keys=[*SOURCE.keys, *more.keys]))


def test_batches_from_the_cube_are_those_from_the_shards(both: Path, alone: Path) -> None:
    def batches(dataset: Dataset) -> list[Batch]:
        plan = TrainPlan(sources=[Source(dataset)], seed=3, global_batch=4, micro_batch=4, window=4)
        with TrainLoader(plan=plan) as loader:
            return list(islice(loader, 5))  # more than an epoch

    expected = batches(open_dataset(both, reader="shards"))
    for dataset in (cube(both), cube(alone)):
        for found, batch in zip(batches(dataset), expected, strict=True):
            assert (found.keys, found.specs) == (batch.keys, batch.specs)
            for name in ("sample_ids", "epochs", "seasons", "weights", "images", "labels", "reference"):
                torch.testing.assert_close(getattr(found, name), getattr(batch, name), rtol=0, atol=0)


def test_many_threads_read_the_same(alone: Path) -> None:
    dataset = cube(alone)
    wanted = [(sample_id, season) for sample_id in range(len(dataset)) for season in SEASONS] * 3
    with ThreadPoolExecutor(8) as pool:
        for (sample_id, season), arrays in zip(wanted, pool.map(lambda of: read(dataset, *of), wanted), strict=True):
            for name, expected in truth(dataset.locations[sample_id], season).items():
                np.testing.assert_array_equal(arrays[name], expected)


def cut(path: Path, rng: np.random.Generator) -> None:
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def flip(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def blank(path: Path, rng: np.random.Generator) -> None:
    """A page of zeros, as a crash may leave it."""
    data = bytearray(path.read_bytes())
    page = slice(start := int(rng.integers(len(data))), start + 512)
    data[page] = bytes(len(data[page]))
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, np.random.Generator], object]] = {
    "deleted": lambda path, _: path.unlink(),
    "cut": cut,
    "flipped": flip,
    "blanked": blank,
}


@pytest.mark.parametrize("times", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_or_changed_is_never_read_as_pixels(damaged: Path, damage: str, times: int) -> None:
    rng = np.random.default_rng(len(damage))
    dataset = cube(damaged)  # opened before: reading alone must see it
    paths = [damaged / CUBE / dataset.layout.file_of(row, name) for row in (0, 3, 6, 9) for name in dataset.arrays]
    for path in rng.choice(np.array(paths, object), times):
        whole, refused = path.read_bytes(), 0
        DAMAGES[damage](path, rng)
        changed = not path.is_file() or path.read_bytes() != whole  # a page may have been zeros before
        for sample_id in range(len(dataset)):
            for season in SEASONS:
                name = path.parent.name
                array: Uint8Array = np.zeros(dataset.shape(name), np.uint8)
                try:
                    dataset.read_into(sample_id, season, {name: array})
                except ShardError as error:
                    refused += 1
                    assert path.name in str(error)  # noqa: PT017 - others must not raise
                else:
                    np.testing.assert_array_equal(array, truth(dataset.locations[sample_id], season)[name])
        assert (refused > 0) == changed
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_files_that_are_missing_or_too_short_are_seen_at_opening(damaged: Path, damage: str) -> None:
    DAMAGES[damage](damaged / CUBE / "s2_10m" / "c.1.0.0.0.0", np.random.default_rng(0))
    with pytest.raises(ShardError, match=r"not as it was written, 1 files: s2_10m/c\.1\.0\.0\.0\.0"):
        open_dataset(damaged)


def test_a_changed_byte_is_told_with_file_sample_array_and_season(damaged: Path) -> None:
    dataset = cube(damaged)
    path = damaged / CUBE / "label" / "c.0.0.0.0"
    data = bytearray(path.read_bytes())
    offset, _ = spans(data)[2, 3].tolist()
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"label/c\.0\.0\.0\.0: sample 0000002, array label, season 3: .* CRC-32C"):
        read(dataset, 1, 0)


def spans(data: bytearray) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """The index of a file of three rows."""
    return np.frombuffer(bytes(data[-4 - 16 * 12 : -4]), "<u8").reshape(3, 4, 2).copy()


def with_index(data: bytearray, index: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> bytes:
    return bytes(data[: -4 - 16 * 12]) + checked(index.tobytes())


def checked(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def compressed(pixels: int) -> bytes:
    return checked(numcodecs.Zstd().encode(bytes(pixels)))


# What a wrong or hostile writer leaves: all checksums fit.
FORGERIES: dict[str, tuple[str, Callable[[int], bytes | tuple[int, int]]]] = {
    "no chunk": ("there is no chunk", lambda _: (2**64 - 1, 2**64 - 1)),
    "outside": ("does not lie inside", lambda _: (0, 2**40)),
    "overflow": ("does not lie inside", lambda _: (2**63, 2**63)),
    "empty": ("do not match", lambda _: (0, 0)),
    "too few pixels": ("has 575 pixels, not 576", lambda size: compressed(size - 1)),
    "too many pixels": ("cannot be decoded", lambda size: compressed(size + 1)),
    "no pixels": ("has 0 pixels", lambda _: checked(b"")),
    "no zstd": ("cannot be decoded", lambda _: checked(b"no frame")),
    "a promise of 2^63 bytes": ("cannot be decoded", lambda _: checked(bytes.fromhex("28b52ffde0ffffffffffffff7f") + b"xx")),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_chunk_is_refused_though_its_checksums_fit(damaged: Path, forgery: str) -> None:
    message, forge = FORGERIES[forgery]
    dataset = cube(damaged)
    path = damaged / CUBE / "label" / "c.0.0.0.0"
    data = bytearray(path.read_bytes())
    index = spans(data)
    forged = forge(24 * 24)
    if isinstance(forged, bytes):
        offset = int(index[0, 1, 0])
        assert len(forged) <= index[0, 1, 1]
        data[offset : offset + len(forged)] = forged
        forged = offset, len(forged)
    index[0, 1] = forged
    path.write_bytes(with_index(data, index))
    with pytest.raises(ShardError, match=f"sample 0000000, array label, season 1: .*{message}"):
        read(dataset, 0, 0)


@pytest.mark.parametrize("write", ["both", "alone"])
def test_files_of_equal_size_that_changed_places_are_never_read_as_each_other(
    write: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(write), tmp_path / "swapped"))
    one, other = (folder / CUBE / "s1" / f"c.{number}.0.0.0.0" for number in (0, 1))
    assert one.stat().st_size == other.stat().st_size
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    dataset = cube(folder)
    for sample_id, key in enumerate(dataset.locations[:4]):
        with pytest.raises(ShardError, match=f"sample {key}, array s1, season 1: (the pixels do not match|there is no chunk)"):
            dataset.read_into(sample_id, 1, {"s1": np.empty(dataset.shape("s1"), np.uint8)})
    assert read(dataset, 4, 1)["s1"].tobytes() == truth(dataset.locations[4], 1)["s1"].tobytes()


def test_chunks_that_changed_places_inside_a_file_are_seen_though_all_its_checksums_fit(damaged: Path) -> None:
    dataset = cube(damaged)
    path = damaged / CUBE / "label" / "c.0.0.0.0"
    data = bytearray(path.read_bytes())
    index = spans(data)
    index[0, [1, 2]] = index[0, [2, 1]]
    path.write_bytes(with_index(data, index))
    with pytest.raises(ShardError, match="sample 0000000, array label, season 1: the pixels do not match"):
        read(dataset, 0, 0)


@dataclass
class Copies:
    """Files that can be had again from a whole copy, `copies` times."""

    local: LocalFiles
    whole: Path
    copies: int
    asked: list[str] = field(default_factory=list)
    are_local: bool = False

    def open(self, shard: int) -> int:
        self.asked.append(self.local.names[shard])
        return self.local.open(shard)

    def path(self, shard: int) -> Path:
        return self.local.path(shard)

    def discard(self, shard: int) -> bool:
        self.copies -= 1
        if self.copies >= 0:
            shutil.copyfile(self.whole / CUBE / self.local.names[shard], self.local.path(shard))
        return self.copies >= 0


def copies_of(damaged: Path, alone: Path, copies: int) -> tuple[CubeIndex, Copies]:
    recorded = read_record(damaged, None)
    files = Copies(LocalFiles(damaged / CUBE, tuple(file.path for file in recorded)), alone, copies)
    return cube_index(read_stored(damaged), recorded, files), files


def test_a_damaged_file_is_read_again_where_there_is_another_copy(damaged: Path, alone: Path) -> None:
    dataset, files = copies_of(damaged, alone, copies=1)
    path = damaged / CUBE / "s1" / "c.0.0.0.0.0"
    path.write_bytes(bytes(path.stat().st_size))
    assert_is_the_source(dataset)
    path.unlink()
    with pytest.raises(ShardError, match=r"s1/c\.0\.0\.0\.0\.0 is missing"):
        read(dataset, 0, 0)
    assert files.copies == -1


def test_fetching_a_shard_asks_for_one_file_an_array(damaged: Path, alone: Path) -> None:
    dataset, files = copies_of(damaged, alone, copies=0)
    dataset.fetch(3)
    assert files.asked == [dataset.layout.file_of(9, name) for name in dataset.arrays]


def test_a_record_that_lacks_a_file_with_samples_does_not_open(alone: Path) -> None:
    recorded = [file for file in read_record(alone, None) if file.path != "s1/c.2.0.0.0.0"]
    with pytest.raises(ShardError, match=r"record of the cube lacks s1/c\.2\.0\.0\.0\.0"):
        cube_index(read_stored(alone), recorded, LocalFiles(alone / CUBE, ()))


def test_another_record_than_the_manifests_does_not_open(damaged: Path) -> None:
    (damaged / RECORD).write_bytes((damaged / RECORD).read_bytes() + b" ")
    with pytest.raises(ShardError, match="not the record"):
        cube_of(damaged, read_stored(damaged))


CUBES: list[Any] = [[], 1, {}, "cube", {"record_sha256": 1}]
SIZES: list[Any] = [0, -3, 1.5, "3", None, 2**70, 1, 9]
ENTRIES: list[Json] = [{"path": 1}, {"path": None}, {"path": "../../x"}, {"size": "1"}, {"sha256": []}, {"more": 1}]
MALFORMED = [
    *(("manifest", {"cube": strange}) for strange in CUBES),
    *(("manifest", {"parts": {"count": 4, "locations_per_part": strange}}) for strange in SIZES),
    *(("record", strange) for strange in ENTRIES),
]


@pytest.mark.parametrize(("file", "change"), MALFORMED)
def test_a_dataset_signed_again_by_a_hostile_writer_is_refused_as_such(damaged: Path, file: str, change: Json) -> None:
    manifest = read_manifest(damaged)
    del manifest["digest"]
    if file == "record":
        record = json.loads((damaged / RECORD).read_bytes())
        record["files"][3] |= change
        (damaged / RECORD).write_text(json.dumps(record))
        change = {"cube": {**manifest["cube"], "record_sha256": hashlib.sha256((damaged / RECORD).read_bytes()).hexdigest()}}
    write_manifest(damaged, {**manifest, **change})
    with pytest.raises(ShardError):
        read(open_dataset(damaged), 8, 0)


@pytest.mark.parametrize(
    "wrong", [np.empty((2, 24, 23), np.uint8), np.empty((2, 24, 24), np.int8), np.empty((2, 24, 48), np.uint8)[..., ::2]]
)
def test_only_arrays_that_fit_are_filled(alone: Path, wrong: Uint8Array) -> None:
    with pytest.raises(ValueError, match="s1 needs a C-contiguous uint8 array of shape"):
        cube(alone).read_into(0, 0, {"s1": wrong})


@pytest.mark.parametrize(("sample_id", "season"), [(-1, 0), (9, 0), (0, 4), (0, -1)])
def test_a_sample_that_there_is_not_is_an_error(alone: Path, sample_id: int, season: int) -> None:
    with pytest.raises(IndexError, match="of 9 samples of 4 seasons"):
        cube(alone).read_into(sample_id, season, {})


def test_a_checksum_behind_its_bytes_always_gives_the_same_value() -> None:
    rng = np.random.default_rng(0)
    assert {google_crc32c.value(checked(rng.bytes(size))) for size in (0, 1, 7, 4096)} == {CHECKED}

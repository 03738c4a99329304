"""Datasets behind URLs: the same samples as from a folder, whatever server, network and cache do."""

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.index import ShardIndex
from cromss_dist.data.store.manifest import canonical
from cromss_dist.data.store.open import open_dataset
from cromss_dist.data.store.remote.cache import CachedFiles, ShardCache
from cromss_dist.data.store.remote.remote import Patience, Remote
from cromss_dist.errors import ConfigError, DownloadError, ShardError
from tests.data.fake_source import FakeSource, spec_of
from tests.data.file_server import Fault, FileServer

IMPATIENT = Patience(tries=4, backoff_s=0.001, stall_s=20, deadline_s=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven locations, about two in each of the shards."""
    out = tmp_path_factory.mktemp("datasets") / "ours"
    convert(FakeSource(7, spec_of(patch_px=12)), out, shard_size_mib=0.03)
    return out


@pytest.fixture
def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[FileServer]:
    with FileServer(files) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cromss_dist.data.store.open.Remote", lambda url: Remote(url, IMPATIENT))


def read(dataset: Dataset, sample_id: int, season: int) -> dict[str, np.ndarray]:
    arrays = {name: np.empty(dataset.shape(name), np.uint8) for name in dataset.arrays}
    dataset.read_into(sample_id, season, arrays)
    return arrays


def assert_all_equal(found: Dataset, expected: Dataset) -> None:
    for sample_id in range(len(expected.locations)):
        for season in range(expected.num_seasons):
            pixels = read(found, sample_id, season)
            for name, array in read(expected, sample_id, season).items():
                np.testing.assert_array_equal(pixels[name], array)


def test_a_dataset_behind_a_url_is_the_one_in_the_folder(server: FileServer, folder: Path, cache: ShardCache) -> None:
    local, found = open_dataset(folder), open_dataset(server.url, cache)
    assert (found.digest, found.locations, found.images) == (local.digest, local.locations, local.images)
    np.testing.assert_array_equal(found.shard_sizes, local.shard_sizes)
    assert (found.is_local, local.is_local) == (False, True)
    assert_all_equal(found, local)


def test_opening_takes_two_requests_and_the_second_time_one(server: FileServer, cache: ShardCache) -> None:
    open_dataset(server.url, cache)
    assert server.requests == {"manifest.json": 1, "index.safetensors": 1}
    open_dataset(server.url, cache)
    assert server.requests == {"manifest.json": 2, "index.safetensors": 1}


def test_a_shard_is_fetched_once_and_by_fetch_already(server: FileServer, folder: Path, cache: ShardCache) -> None:
    dataset = open_dataset(server.url, cache)
    for shard in range(len(dataset.shard_sizes)):
        dataset.fetch(shard)
    before = dict(server.requests)
    assert_all_equal(dataset, open_dataset(folder))
    assert_all_equal(open_dataset(server.url, cache), open_dataset(folder))
    assert {name: n for name, n in server.requests.items() if name.endswith(".tar")} == {
        name: 1 for name in before if name.endswith(".tar")
    }


def test_only_shards_that_are_read_are_fetched(server: FileServer, cache: ShardCache) -> None:
    dataset = open_dataset(server.url, cache)
    read(dataset, len(dataset.locations) - 1, 0)
    assert [name for name in server.requests if name.endswith(".tar")] == [f"shard-{len(dataset.shard_sizes) - 1:06d}.tar"]


def test_wrong_bytes_of_a_bad_server_never_get_into_a_sample(
    server: FileServer, files: dict[str, bytes], folder: Path, cache: ShardCache
) -> None:
    """Catalogue L10: each file fails in some way, some for longer than is tried; what is read is right or an error."""
    rng = random.Random(0)
    faults: list[Fault] = [500, 503, 429, "cut", "short", "long", "wrong", "wrong"]
    local = open_dataset(folder)
    num_errors = 0
    for run in range(5):
        server.faults = {name: rng.choices(faults, k=rng.randint(0, 5)) for name in files}
        fresh = ShardCache(cache.folder / str(run), 1)
        for sample_id in range(len(local.locations)):
            try:
                pixels = read(open_dataset(server.url, fresh), sample_id, 0)
            except (DownloadError, ShardError):  # ShardError: the manifest has no other checksum than its own digest
                num_errors += 1
                continue
            for name, array in read(local, sample_id, 0).items():
                np.testing.assert_array_equal(pixels[name], array)
    assert 0 < num_errors < 5 * len(local.locations)


@pytest.mark.parametrize("fault", [500, 404, "stall", "wrong"])
def test_a_shard_that_cannot_be_had_is_an_error_that_names_it(
    server: FileServer, cache: ShardCache, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        monkeypatch.setattr("cromss_dist.data.store.open.Remote", lambda url: Remote(url, replace(IMPATIENT, stall_s=0.5)))
    server.faults["shard-000001.tar"], server.always = [fault], {"shard-000001.tar"}
    dataset = open_dataset(server.url, cache)
    dataset.fetch(0)
    with pytest.raises(DownloadError, match=f"{server.url}/shard-000001.tar could not be fetched"):
        dataset.fetch(1)
    assert server.requests["shard-000001.tar"] <= IMPATIENT.tries


def test_a_poisoned_cache_is_mended_after_a_restart(server: FileServer, folder: Path, cache: ShardCache) -> None:
    """Catalogue S7: bytes flipped, zeroed or cut off in the cache between two runs; no wrong sample, no error."""
    local = open_dataset(folder)
    assert_all_equal(open_dataset(server.url, cache), local)
    rng = random.Random(0)
    for _ in range(12):
        path = rng.choice([path for path in cache.folder.iterdir() if path.suffix != ".lock"])
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + 4096] = bytes(len(data[place : place + 4096]))
            case 2:
                del data[place:]
        path.write_bytes(data)
        assert_all_equal(open_dataset(server.url, cache), local)


def test_a_shard_that_vanishes_from_the_cache_is_fetched_anew(server: FileServer, folder: Path, cache: ShardCache) -> None:
    dataset = open_dataset(server.url, cache)
    assert_all_equal(dataset, open_dataset(folder))
    for path in cache.folder.iterdir():
        path.unlink()
    assert_all_equal(dataset, open_dataset(folder))


def test_a_shard_damaged_before_its_digest_was_taken_is_an_error(server: FileServer, folder: Path, cache: ShardCache) -> None:
    """The cache has the bytes that the manifest names; its index says that they are wrong: fetching again cannot mend it."""
    dataset = open_dataset(server.url, cache)
    assert isinstance(dataset, ShardIndex)
    dataset.tables.checksums[0, 0, 0] ^= 1
    with pytest.raises(ShardError, match=f"sample {dataset.locations[0]}.*season 0"):
        read(dataset, 0, 0)
    assert server.requests["shard-000000.tar"] == 1


def test_two_datasets_share_a_cache(server: FileServer, folder: Path, cache: ShardCache, tmp_path: Path) -> None:
    convert(FakeSource(7, spec_of(patch_px=12), seed=1), tmp_path / "theirs", shard_size_mib=0.03)
    with FileServer({path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}) as other:
        assert_all_equal(open_dataset(other.url, cache), open_dataset(tmp_path / "theirs"))
        assert_all_equal(open_dataset(server.url, cache), open_dataset(folder))
        assert_all_equal(open_dataset(other.url, cache), open_dataset(tmp_path / "theirs"))
        assert max(other.requests["shard-000000.tar"], server.requests["shard-000000.tar"]) == 1


def test_a_dataset_larger_than_the_cache_is_read(
    server: FileServer, files: dict[str, bytes], folder: Path, cache: ShardCache
) -> None:
    small = ShardCache(cache.folder, 2.5 * len(files["shard-000000.tar"]) / 2**30)
    assert_all_equal(open_dataset(server.url, small), open_dataset(folder))
    assert small.num_bytes() <= small.limit_gib * 2**30


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors"])
def test_what_does_not_belong_to_the_manifest_is_refused(
    server: FileServer, files: dict[str, bytes], cache: ShardCache, name: str
) -> None:
    data = files[name]
    for changed in (data[:-1], b"", b"{}", data.replace(b"2", b"3", 1)):
        server.files[name] = changed
        with pytest.raises((ShardError, DownloadError)):
            open_dataset(server.url, cache)
    del server.files[name]
    with pytest.raises(DownloadError, match=f"{name} could not be fetched, tried once: there is no such file"):
        open_dataset(server.url, cache)


def test_a_manifest_cannot_lead_out_of_its_folder(server: FileServer, folder: Path, cache: ShardCache) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    shards = content["shards"]
    del content["digest"]
    for changes, said in (
        ({"name": "../secret.tar"}, "allowed are plain names"),
        ({"name": "http://elsewhere/x.tar"}, "allowed are plain names"),
        ({"sha256": "../../x"}, r"states the sha256 '\.\./\.\./x', which is none"),
    ):
        content["shards"] = [{**entry, **changes} for entry in shards]
        digest = hashlib.sha256(canonical(content)).hexdigest()
        server.files["manifest.json"] = json.dumps({**content, "digest": digest}).encode()
        with pytest.raises(ShardError, match=said):
            open_dataset(server.url, cache).fetch(0)
    assert not set(server.requests) - {"manifest.json", "index.safetensors"}


def test_a_cube_behind_a_url_is_the_one_in_the_folder(tmp_path: Path, cache: ShardCache) -> None:
    convert(FakeSource(3, spec_of(patch_px=12)), tmp_path / "cube", shard_size_mib=0.03, write="cube")
    paths = [path for path in (tmp_path / "cube").rglob("*") if path.is_file()]
    files = {path.relative_to(tmp_path / "cube").as_posix(): path.read_bytes() for path in paths}
    with FileServer(files) as server:
        dataset = open_dataset(server.url, cache)
        assert server.requests == {"manifest.json": 1, "index.safetensors": 1, "cube.json": 1}
        dataset.fetch(0)
        fetched = {name: n for name, n in server.requests.items() if name.startswith("cube.zarr/")}
        assert fetched == {f"cube.zarr/{name}/c.0.0.0.0{'' if name == 'label' else '.0'}": 1 for name in dataset.arrays}
        assert_all_equal(dataset, open_dataset(tmp_path / "cube"))
        for path in cache.folder.iterdir():
            path.write_bytes(bytes(path.stat().st_size))
        assert_all_equal(dataset, open_dataset(tmp_path / "cube"))
        with pytest.raises(ShardError, match="no shards, only a cube"):
            open_dataset(server.url, cache, reader="shards")
        server.files["cube.json"] += b" "
        with pytest.raises(ShardError, match=r"cube\.json is not the record"):
            open_dataset(server.url, cache)


def test_what_is_neither_a_folder_nor_a_url_says_so(tmp_path: Path) -> None:
    for location in (tmp_path / "nothing", "pipe:cat x"):
        with pytest.raises(ShardError, match="neither a folder nor a URL"):
            open_dataset(location)
    for url in ("ftp://host/x", "simplecache::http://host/x", "https://host/x?signature=y"):
        with pytest.raises(ConfigError):
            open_dataset(url)


def test_the_dataset_goes_to_other_processes(server: FileServer, folder: Path, cache: ShardCache) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(server.url, cache)))
    assert isinstance(dataset.files, CachedFiles)
    shutil.rmtree(cache.folder)
    assert_all_equal(dataset, open_dataset(folder))

"""A dataset that is converted again is the same dataset, byte for byte."""

import pickle
from pathlib import Path

import pytest

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.manifest import read_manifest
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import InputChangedError, ShardError

SHARD_MIB = 0.3  # of the template: two locations a shard


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shards_of_a_dataset_are_its_own(shards: Path, tmp_path: Path) -> None:
    again = convert(StoredArchive.of(shards), tmp_path / "again", shard_size_mib=SHARD_MIB)
    assert contents(again.folder) == contents(shards)


def test_a_cube_gives_the_shards_that_the_archive_gives(archive_root: Path, shards: Path, tmp_path: Path) -> None:
    cube = convert(open_archive(archive_root), tmp_path / "cube", write="cube", shard_size_mib=SHARD_MIB)
    again = convert(StoredArchive.of(cube.folder), tmp_path / "again", shard_size_mib=SHARD_MIB)
    assert contents(again.folder) == contents(shards)


def test_what_was_computed_says_of_what(shards: Path, tmp_path: Path) -> None:
    source, origin = StoredArchive.of(shards), {"dataset": "d" * 64}
    folder = convert(source, tmp_path / "again", shard_size_mib=SHARD_MIB, origin=origin).folder
    dataset = open_dataset(folder)
    assert read_manifest(folder)["origin"] == origin
    assert dataset.archives[dataset.digest]["origin"] == origin
    assert dataset.digest != source.digest


def test_it_travels_as_a_place_and_a_digest(shards: Path) -> None:
    source = StoredArchive.of(shards)
    there = pickle.loads(pickle.dumps(source))
    key = source.keys[0]
    assert len(pickle.dumps(source)) < 1000
    assert there.read(key).metadata == source.read(key).metadata
    assert source.size_bytes == 292_608  # 3 locations x 4 seasons of 24,384 pixels


def test_another_dataset_in_its_place_is_refused(shards: Path, tmp_path: Path) -> None:
    source = StoredArchive(str(shards), "0" * 64)
    with pytest.raises(InputChangedError, match="another dataset"):
        source.read("0000001")


def test_a_damaged_dataset_is_an_error_and_no_reject(shards: Path, tmp_path: Path) -> None:
    tar = sorted(shards.glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[data.index(b"s1.npy") + 1000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="CRC-32C"):
        convert(StoredArchive.of(shards), tmp_path / "again", shard_size_mib=SHARD_MIB)
    assert not (tmp_path / "again").exists()

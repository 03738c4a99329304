import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.index import open_shards
from cromss_dist.data.store.shards import canonical
from cromss_dist.errors import ShardError
from tests.data.fake_source import FakeSource, spec_of
from tests.data.tiny_archive import KEYS


def reseal(folder: Path, **changes: object) -> None:
    """Edits the manifest and gives it a digest that fits."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = {**manifest, **changes}
    del content["digest"]
    (folder / "manifest.json").write_text(json.dumps({**content, "digest": hashlib.sha256(canonical(content)).hexdigest()}))


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
            bad[index.tables.tars.offsets[1, array] + place] ^= 1 << rng.integers(8)
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
    with pytest.raises(ShardError, match="do not match"):
        index.read(2, 0, ["s1"])


def test_records_that_are_missing_or_not_the_manifests_are_refused(shards: Path) -> None:
    record = shards / "shard-000000.json"
    good = record.read_text()
    record.write_text(good.replace(KEYS[0], "9999999"))
    with pytest.raises(ShardError, match=r"1 not the manifest's \(shard-000000\.json\)"):
        open_shards(shards)
    record.unlink()
    with pytest.raises(ShardError, match=r"1 missing \(shard-000000\.json\)"):
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
    reseal(shards, schema_version=3)
    with pytest.raises(ShardError, match="version 3"):
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


def sign_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the record of the first shard, and signs it again."""
    path = folder / "shard-000000.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_bytes(canonical(record))
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    reseal(folder, shards=[{**entries[0], "record_sha256": hashlib.sha256(canonical(record)).hexdigest()}, *entries[1:]])


@pytest.mark.parametrize(
    "place", [{"size": 10**15}, {"offset": -5}, {"size": -1}, {"offset": 2**70}, {"crc32c": 2**70}, {"size": "x"}]
)
def test_metadata_that_lies_nowhere_is_refused_on_opening(shards: Path, place: dict[str, object]) -> None:
    sign_record(shards, lambda record: record["samples"][0]["members"][0].update(place))
    with pytest.raises(ShardError, match="malformed"):
        open_shards(shards)


def test_numbers_of_samples_and_seasons_that_no_memory_holds_are_refused(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    for changes in (
        {"shards": [{**manifest["shards"][0], "samples": 10**13}, *manifest["shards"][1:]]},
        {"arrays": {**manifest["arrays"], "label": {**manifest["arrays"]["label"], "shape": [10**13, 48, 48]}}},
    ):
        reseal(shards, **changes)
        with pytest.raises(ShardError, match="malformed"):
            open_shards(shards)


def test_metadata_that_is_no_json_object_is_an_error_though_its_checksum_holds(shards: Path) -> None:
    tar = shards / "shard-000000.tar"
    span = open_shards(shards).metadata_spans[0]
    for text in (b"[1, 2]", b"{", b"\0\0\0\xff", b"[" * 500):
        data = text.ljust(int(span[1]))
        tar.write_bytes(tar.read_bytes()[: span[0]] + data + tar.read_bytes()[span[0] + span[1] :])
        place = {"crc32c": google_crc32c.value(data)}
        sign_record(shards, lambda record, place=place: record["samples"][0]["members"][0].update(place))  # type: ignore[misc]
        with pytest.raises(ShardError, match="no JSON"):
            open_shards(shards).metadata(0)


def test_an_array_larger_than_its_member_is_refused(shards: Path) -> None:
    arrays = json.loads((shards / "manifest.json").read_text())["arrays"]
    arrays["s1"]["shape"] = [4, 2, 10**6, 10**6]
    reseal(shards, arrays=arrays)
    with pytest.raises(ShardError, match="does not lie inside"):
        open_shards(shards)


@pytest.mark.parametrize("folder", ["http://example.org/shards", "pipe:touch x", "nowhere"])
def test_what_is_no_folder_is_refused(folder: str) -> None:
    with pytest.raises(ShardError, match="is not a folder"):
        open_shards(folder)

"""Adding an archive to a dataset: all of it or nothing, and the old part as it was."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cromss_dist.data.conversion import convert as converter
from cromss_dist.data.conversion.convert import Summary
from cromss_dist.data.conversion.statistics import Statistics
from cromss_dist.data.store.cube.writer import open_cube
from cromss_dist.data.store.index import open_shards
from cromss_dist.data.store.manifest import read_manifest
from cromss_dist.errors import ConfigError, OutputExistsError, ShardError
from tests.data.conversions import SMALL, killed_at, tree
from tests.data.fake_source import FakeSource, spec_of

OLD = FakeSource(5, rejected={"0000003": "truncated"})
# One key of the old dataset with its pixels, one with others, one that was rejected then, and new ones.
NEW = FakeSource(
    keys=["0000000", "0000001", "0000003", "0000005", "0000006", "0000007", "0000008"], same_as={"0000001": "9999999"}
)


def convert(out: Path, source: FakeSource, **options: Any) -> Summary:
    return converter.convert(source, out, **{**SMALL, "write": None, **options})


@pytest.fixture(params=["shards", "cube", "both"])
def sinks(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_old_and_new_samples_are_all_there_and_the_account_adds_up(tmp_path: Path, sinks: str) -> None:
    out = tmp_path / "out"
    old = convert(out, OLD, write=sinks)
    grown = convert(out, NEW, append=True)
    assert grown.ledger == {
        "inputs": 12,
        "written": 9,
        "duplicate": 1,
        "rejected": 2,
        "rejected.conflicting_duplicate": 1,
        "rejected.truncated": 1,
    }
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    written = [line["key"] for line in lines if line["status"] == "written"]
    assert written == [f"{i:07d}" for i in (0, 1, 2, 4, 3, 5, 6, 7, 8)]
    assert grown.num_samples == 9
    assert grown.manifest["parts"] == {"count": 5, "locations_per_part": 3}
    assert grown.digest != old.digest
    statistics = Statistics(OLD.spec)
    for key in written:
        statistics.add((OLD if key in ("0000000", "0000001") else NEW).read(key))
    assert statistics.to_json().items() <= grown.manifest.items()
    if sinks != "cube":
        index = open_shards(out)
        assert list(index.locations) == written
        for sample_id, key in enumerate(written):
            expected = (OLD if key == "0000001" else NEW).read(key).arrays["s1"][2]
            np.testing.assert_array_equal(index.read(sample_id, 2, ["s1"])["s1"], expected)
    if sinks != "shards":
        with open_cube(out) as cube:
            keys = cube["location"].values.tolist()
            assert keys == [f"{i:07d}" if i >= 0 else "" for i in (0, 1, 2, -1, 4, -1, -1, -1, 3, 5, 6, 7, 8)]
            assert cube["valid"].values[:, 0].tolist() == [bool(key) for key in keys]
            for row, key in enumerate(keys):
                expected = (OLD if key == "0000001" else NEW).read(key).arrays["label"] if key else 255
                np.testing.assert_array_equal(cube["label"].values[row], expected)
            for key in ("0000002", "0000008"):
                assert float(cube["lon"].values[keys.index(key)]) == OLD.read(key).metadata["lon"]
    assert os.listdir(tmp_path) == ["out"]


def test_old_tars_are_not_copied_and_a_reader_of_the_old_dataset_goes_on(tmp_path: Path) -> None:
    convert(tmp_path / "out", OLD)
    reader = open_shards(tmp_path / "out")
    files = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    convert(tmp_path / "out", NEW, append=True)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in files} == files
    np.testing.assert_array_equal(reader.read(0, 0, ["s1"])["s1"], OLD.read("0000000").arrays["s1"][0])


@pytest.mark.parametrize(
    "place", ["mid_write", "after_record", "before_replace:12", "before_manifest", "before_publish", "after_publish"]
)
def test_a_kill_leaves_the_old_dataset_or_the_new_one_and_the_same_call_completes_it(tmp_path: Path, place: str) -> None:
    convert(tmp_path / "undisturbed", OLD, write="both")
    old = tree(tmp_path / "undisturbed")
    convert(tmp_path / "undisturbed", NEW, append=True)
    new = tree(tmp_path / "undisturbed")
    convert(tmp_path / "out", OLD, write="both")
    killed_at(tmp_path / "out", NEW, place, append=True, write=None)
    assert tree(tmp_path / "out") == (new if place == "after_publish" else old)
    convert(tmp_path / "out", NEW, append=True)
    assert tree(tmp_path / "out") == new
    assert sorted(os.listdir(tmp_path)) == ["out", "undisturbed"]


def test_an_overwrite_that_is_killed_leaves_the_old_dataset_or_the_new_one(tmp_path: Path) -> None:
    convert(tmp_path / "new", NEW)
    for place in ("before_publish", "after_publish"):
        convert(tmp_path / "out", OLD, overwrite=True)
        old = tree(tmp_path / "out")
        killed_at(tmp_path / "out", NEW, place, overwrite=True, write=None)
        assert tree(tmp_path / "out") == (tree(tmp_path / "new") if place == "after_publish" else old)
        convert(tmp_path / "out", NEW, overwrite=True)
        assert tree(tmp_path / "out") == tree(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_a_file_system_that_cannot_swap_folders_gets_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tmp_path / "out", OLD)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    convert(tmp_path / "out", NEW, overwrite=True)
    convert(tmp_path / "fresh", NEW)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out"]


def test_an_archive_of_another_kind_is_refused(tmp_path: Path) -> None:
    convert(tmp_path / "out", OLD)
    before = tree(tmp_path / "out")
    with pytest.raises(ConfigError, match="arrays differ"):
        convert(tmp_path / "out", FakeSource(3, spec=spec_of(patch_px=48)), append=True)
    with pytest.raises(ConfigError, match="consists of shards"):
        convert(tmp_path / "out", NEW, append=True, write="both")
    with pytest.raises(ConfigError, match="contradict"):
        convert(tmp_path / "out", NEW, append=True, overwrite=True)
    with pytest.raises(ConfigError, match="nothing can be appended"):
        convert(tmp_path / "nowhere", NEW, append=True)
    assert tree(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_damaged_dataset_is_not_added_to(tmp_path: Path) -> None:
    convert(tmp_path / "out", OLD)
    ledger = tmp_path / "out" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("0000001", "0000009"))
    with pytest.raises(ShardError, match="ledger"):
        convert(tmp_path / "out", NEW, append=True)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="does not look like shards of ours"):
        convert(tmp_path / "out", NEW, append=True)


def test_the_manifest_of_a_dataset_grown_twice_still_reads(tmp_path: Path) -> None:
    convert(tmp_path / "out", OLD)
    for seed in (1, 2):
        convert(tmp_path / "out", FakeSource(keys=[f"{seed}-{i}" for i in range(4)], seed=seed), append=True)
    manifest = read_manifest(tmp_path / "out")
    assert [shard["name"] for shard in manifest["shards"]] == [f"shard-{i:06d}.tar" for i in range(6)]
    assert manifest["num_samples"] == 12

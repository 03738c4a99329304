"""The converter's promises: nothing lost, nothing twice, equal bytes whatever happened on the way."""

import errno
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cromss_dist.data.conversion import convert as converter
from cromss_dist.data.conversion.convert import Summary
from cromss_dist.data.conversion.estimate import estimate
from cromss_dist.data.store.cube.writer import open_cube
from cromss_dist.data.store.index import open_shards
from cromss_dist.data.store.manifest import read_manifest
from cromss_dist.data.store.verify.verify import verify
from cromss_dist.errors import ConfigError, InputChangedError, OutputExistsError, RejectedInputsError, ShardError, StorageError
from tests.data.conversions import SMALL, killed_at, start, tree
from tests.data.fake_source import FakeSource

NUM_LOCATIONS = 8  # three parts
SOURCE: dict[str, Any] = {
    "num_locations": NUM_LOCATIONS,
    "rejected": {"0000004": "truncated"},
    "duplicates": {"0000001": 2},
    "same_as": {"0000007": "0000002"},
}
PLACES = (
    "after_open",
    "mid_write",
    "before_fsync",
    "after_fsync",
    "before_replace",
    "after_replace",
    "before_record",
    "after_record",
    "before_manifest",
    "before_publish",
    "after_publish",
)


def convert(out: Path, source: FakeSource | None = None, **options: Any) -> Summary:
    return converter.convert(source or FakeSource(**SOURCE), out, **{**SMALL, **options})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed conversion of SOURCE writes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    convert(out)
    return tree(out)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The output of a conversion that was killed after its second part."""
    killed_at(tmp_path / "out", FakeSource(**SOURCE), "after_record:2")
    return tmp_path / "out"


@pytest.mark.parametrize("place", [*PLACES, "after_replace:5", "before_fsync:9"])
def test_a_kill_at_any_failpoint_leaves_no_trace_in_the_result(tmp_path: Path, reference: dict[str, str], place: str) -> None:
    killed_at(tmp_path / "out", FakeSource(**SOURCE), place)
    assert (tmp_path / "out").exists() == (place == "after_publish")
    convert(tmp_path / "out")
    assert tree(tmp_path / "out") == reference
    assert os.listdir(tmp_path) == ["out"]


def _kill_at_random(out: Path, reference: dict[str, str], num_kills: int, seed: int) -> None:
    draw, kills = random.Random(seed), 0
    source = FakeSource(**SOURCE, delay_s=0.02)
    while kills < num_kills:
        target = out / str(kills)
        while True:
            process = start(target, source)
            process.join(draw.uniform(0, 0.8))
            if process.exitcode is not None:  # 0, or a refusal where the one before had published and tidied up
                break
            process.kill()
            process.join()
            kills += 1
        assert tree(target) == reference
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()


def test_five_kills_at_random_times_leave_no_trace(tmp_path: Path, reference: dict[str, str]) -> None:
    _kill_at_random(tmp_path, reference, num_kills=5, seed=0)


@pytest.mark.slow
def test_fifty_kills_at_random_times_leave_no_trace(tmp_path: Path, reference: dict[str, str]) -> None:
    _kill_at_random(tmp_path, reference, num_kills=50, seed=1)


def test_finished_parts_are_not_written_again(begun: Path, reference: dict[str, str]) -> None:
    kept = {path.name: path.stat().st_mtime_ns for path in begun.parent.glob(".out.partial/result/*.tar")}
    assert len(kept) == 2
    seen: list[str] = []

    class Watched(FakeSource):
        def read(self, key: str) -> Any:
            seen.append(key)
            return super().read(key)

    convert(begun, Watched(**SOURCE))
    assert seen == ["0000006", "0000007"]
    assert {name: (begun / name).stat().st_mtime_ns for name in kept} == kept
    assert tree(begun) == reference


@pytest.mark.parametrize("damage", ["record", "tar", "cube"])
def test_a_part_whose_files_are_not_as_committed_is_written_again(begun: Path, reference: dict[str, str], damage: str) -> None:
    work = begun.parent / ".out.partial"
    cube_file = next(path for path in work.glob("result/cube.zarr/s1/c.*"))
    path = {"record": work / "parts/part-000000.json", "tar": work / "result/shard-000000.tar", "cube": cube_file}[damage]
    path.write_bytes(path.read_bytes()[:-1])
    convert(begun)
    assert tree(begun) == reference


def _backwards(function: Callable[..., Any], shared: Any, jobs: Sequence[Any]) -> Generator[Any, None, None]:
    for job in reversed(jobs):
        yield function(shared, job)


def test_the_order_of_parts_and_of_the_listing_does_not_matter(tmp_path: Path, reference: dict[str, str]) -> None:
    source = FakeSource(**SOURCE)
    source.keys = tuple(random.Random(3).sample(source.keys, len(source.keys)))
    convert(tmp_path / "out", source, run=_backwards)
    assert tree(tmp_path / "out") == reference


def test_shards_and_cube_are_the_same_alone_or_together(tmp_path: Path, reference: dict[str, str]) -> None:
    for write, suffix in (("shards", ".tar"), ("cube", "/c.0.0.0.0.0")):
        convert(tmp_path / write, write=write)
        alone = {name: digest for name, digest in tree(tmp_path / write).items() if name.endswith(suffix)}
        assert alone
        assert alone.items() <= reference.items()


def test_of_two_converters_one_wins_and_the_other_names_it(tmp_path: Path, reference: dict[str, str]) -> None:
    first = start(tmp_path / "out", FakeSource(**SOURCE, delay_s=0.2))
    while not (tmp_path / ".out.partial" / "plan.json").exists():
        time.sleep(0.01)
    with pytest.raises(OutputExistsError, match=f"is being written by process {first.pid} on "):
        convert(tmp_path / "out")
    first.join(60)
    assert tree(tmp_path / "out") == reference


def test_running_again_when_done_rewrites_nothing(tmp_path: Path) -> None:
    convert(tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(OutputExistsError, match="is there already"):
        convert(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path} == stamps


def test_a_converter_killed_after_publishing_is_finished_by_the_same_call_alone(tmp_path: Path) -> None:
    killed_at(tmp_path / "out", FakeSource(**SOURCE), "after_publish")
    with pytest.raises(OutputExistsError, match="is there already"):
        convert(tmp_path / "out", FakeSource(3))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_disk_that_fails_is_named_and_the_rest_goes_on_when_it_works_again(
    tmp_path: Path, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    works = os.fsync

    def fail_later(descriptor: int) -> None:
        if "shard-000001.tar" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        works(descriptor)

    monkeypatch.setattr(os, "fsync", fail_later)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        convert(tmp_path / "out")
    assert str(raised.value.filename).endswith("shard-000001.tar")
    assert raised.value.__notes__ == [
        f"1 finished parts are kept in {tmp_path}/.out.partial; the command that wrote them goes on after them."
    ]
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    convert(tmp_path / "out")
    assert tree(tmp_path / "out") == reference


def test_bytes_that_change_between_writing_and_reading_back_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = os.fsync

    def flip(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".tmp") and "shard-000001.tar" in path:
            with open(path, "r+b") as file:
                file.seek(5000)
                byte = file.read(1)[0]
                file.seek(5000)
                file.write(bytes([byte ^ 1]))
        works(descriptor)

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(ShardError, match=r"shard-000001\.tar.*read back is not what was written"):
        convert(tmp_path / "out")


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**6, 10**6 - 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="8 locations may need"):
        convert(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_input_that_changes_on_the_way_stops_the_conversion_and_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(InputChangedError, match="0000005") as raised:
        convert(tmp_path / "out", FakeSource(**SOURCE, changed=["0000005"]))
    assert "1 finished parts" in raised.value.__notes__[0]


def test_other_inputs_or_settings_are_not_mixed_in_and_restart_begins_anew(begun: Path, tmp_path: Path) -> None:
    other = FakeSource(NUM_LOCATIONS, seed=5)
    with pytest.raises(InputChangedError, match=r"fingerprint.*--restart"):
        convert(begun, other)
    with pytest.raises(ConfigError, match=r"locations_per_part 3 \(now 7\).*--restart"):
        convert(begun, shard_size_mib=0.2)
    with pytest.raises(ConfigError, match="write both"):
        convert(begun, write="shards")
    convert(begun, other, restart=True)
    convert(tmp_path / "fresh", other)
    assert tree(begun) == tree(tmp_path / "fresh")


def test_every_input_has_its_line_in_order_and_the_account_adds_up(tmp_path: Path) -> None:
    summary = convert(tmp_path / "out")
    assert summary.ledger == {"inputs": 10, "written": 7, "duplicate": 2, "rejected": 1, "rejected.truncated": 1}
    found = [(line["key"], line["status"]) for line in lines(tmp_path / "out")]
    expected = [(f"{i:07d}", "rejected" if i == 4 else "written") for i in range(NUM_LOCATIONS)]
    assert found == [*expected[:2], *[("0000001", "duplicate")] * 2, *expected[2:]]
    assert summary.manifest["ledger"]["asides"] == {"strays": 3, "unlabelled": 2}
    assert summary.manifest["identical"] == [["0000002", "0000007"]]


def test_too_many_rejects_over_several_parts_stop_before_the_last(tmp_path: Path) -> None:
    seen: list[str] = []
    source = FakeSource(30, rejected={"0000001": "wrong_size", "0000010": "wrong_size"})
    with pytest.raises(RejectedInputsError, match="2 of the 11 inputs read so far"):
        convert(tmp_path / "out", source, max_reject_fraction=0.04, progress=lambda key, _: seen.append(key))
    assert len(seen) < 30
    assert os.listdir(tmp_path) == [".out.partial"]
    convert(tmp_path / "out", source, max_reject_fraction=0.1)
    assert os.listdir(tmp_path) == ["out"]


def test_when_every_input_is_rejected_there_is_no_dataset(tmp_path: Path) -> None:
    source = FakeSource(2, rejected={"0000000": "l2a", "0000001": "l2a"})
    with pytest.raises(RejectedInputsError, match="2 of the 2 inputs"):
        convert(tmp_path / "out", source, max_reject_fraction=1)


NAMES = (
    "a.b.c", "a_b_c", "a b c", "a/b/c", "a%2Eb%2Ec", "Straße/Ünïcode", "CASE", "case", "x" * 255, "x" * 254 + "y",
    "../../etc/passwd", "漢" * 85, "~", "-", "a\nb",
)  # fmt: skip


def test_any_key_comes_back_as_it_was_and_none_overwrites_another(tmp_path: Path) -> None:
    source = FakeSource(keys=NAMES)
    convert(tmp_path / "out", source)
    index = open_shards(tmp_path / "out")
    assert index.locations == tuple(sorted(NAMES))
    assert verify(tmp_path / "out", deep=True, source=source).problems == []
    for sample_id, key in enumerate(index.locations):
        np.testing.assert_array_equal(index.read(sample_id, 1, ["s1"])["s1"], source.read(key).arrays["s1"][1])


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(tmp_path: Path) -> None:
    told = estimate(FakeSource(100), tmp_path / "out", "both", 0.1, workers=2)
    convert(tmp_path / "out", FakeSource(100))
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert (told.num_inputs, told.bytes_in, told.num_parts, told.num_tried) == (100, 100_000, 34, 8)
    assert told.bytes_out == pytest.approx(size, rel=0.25)
    assert told.seconds > 0
    assert os.listdir(tmp_path) == ["out"]


def test_the_cube_holds_the_rows_that_were_written_and_marks_the_others(tmp_path: Path) -> None:
    convert(tmp_path / "out")
    source = FakeSource(**SOURCE)
    with open_cube(tmp_path / "out") as cube:
        keys = cube["location"].values.tolist()
        assert keys == ["" if key in source.rejected else key for key in source.keys]
        np.testing.assert_array_equal(cube["valid"].values, np.array([[bool(key)] * 4 for key in keys]))
        for row, key in enumerate(keys):
            if key:
                np.testing.assert_array_equal(cube["label"].values[row], source.read(key).arrays["label"])
    assert read_manifest(tmp_path / "out")["cube"]["path"] == "cube.zarr"

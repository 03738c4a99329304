"""What was damaged after it was saved is found, set aside and never used; all ranks fall back to the same one."""

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.errors import CheckpointError
from cromss_dist.train.checkpoint.reader import read_record, verify_share
from cromss_dist.train.checkpoint.record import RECORD, seal, unseal
from cromss_dist.train.checkpoint.store import Checkpoints
from tests.ranks import run_ranks
from tests.train.checkpoint.programs import ALONE, assert_whole, find, newest, save_steps, told

NEW, OLD = "step-0000002", "step-0000001"
SHARE = "rank-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, saved by two ranks. Read only."""
    folder = tmp_path_factory.mktemp("two-steps")
    assert run_ranks(save_steps, 2, folder, [1, 2]) == [0, 0]
    return folder / "saved"


@pytest.fixture
def saved(two_steps: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(two_steps, tmp_path / "saved"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A record that is sealed as it must be, and states something else."""
    content = unseal((folder / RECORD).read_bytes())
    change(content)
    (folder / RECORD).write_bytes(seal(content))


def link(path: Path) -> None:
    """Moves a file or folder out and leaves a link to it."""
    outside = path.parents[1] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def escape(content: dict[str, Any]) -> None:
    content["shares"][1]["name"] = f"../{OLD}/{SHARE}"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of the data": (lambda new: flip(new / SHARE, -1), f"{SHARE} cannot be read or is not as written"),
    "a flipped bit of the header": (lambda new: flip(new / SHARE, 9), f"{SHARE} cannot be read or is not as written"),
    "a truncated file": (lambda new: os.truncate(new / SHARE, 100), "has 100 bytes"),
    "an emptied file": (lambda new: os.truncate(new / SHARE, 0), "has 0 bytes"),
    "a deleted file": (lambda new: (new / SHARE).unlink(), f"{SHARE} cannot be found"),
    "the file of another step": (lambda new: shutil.copy(new.parent / OLD / SHARE, new / SHARE), "not as written"),
    "a linked file": (lambda new: link(new / SHARE), f"{SHARE} is not a regular file"),
    "a pipe": (lambda new: replace_by_pipe(new / SHARE), f"{SHARE} is not a regular file"),
    "a linked folder": (link, f"{NEW} is not a folder"),
    "a file for a folder": (replace_by_file, f"{NEW} is not a folder"),
    "no record": (lambda new: (new / RECORD).unlink(), f"{RECORD} cannot be found"),
    "a linked record": (lambda new: link(new / RECORD), f"{RECORD} is not a regular file"),
    "an empty record": (lambda new: os.truncate(new / RECORD, 0), "garbled"),
    "half a record": (lambda new: os.truncate(new / RECORD, 300), "garbled"),
    "a record that is no JSON": (lambda new: (new / RECORD).write_bytes(os.urandom(500)), "garbled"),
    "a huge record": (lambda new: os.truncate(new / RECORD, 1 << 40), "at most"),
    "a record of another step": (lambda new: shutil.copy(new.parent / OLD / RECORD, new / RECORD), "is of step 1"),
    "a record with a path": (lambda new: rewrite(new, escape), "not the files of all ranks"),
    "a record of one rank": (lambda new: rewrite(new, lambda content: content["shares"].pop()), "not the files of all ranks"),
    "a record without ranks": (lambda new: rewrite(new, lambda content: content.update(shares=[])), "not the files of all ranks"),
    "a record of the future": (lambda new: rewrite(new, lambda content: content.update(schema=99)), "schema 99"),
    "a record without a state": (lambda new: rewrite(new, lambda content: content.pop("state")), "KeyError('state')"),
    "a record of numbers": (lambda new: (new / RECORD).write_bytes(seal([1])), "has not the fields"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_with_its_reason_and_the_one_before_is_used(saved: Path, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    damage(saved / NEW)
    with Checkpoints(saved, ALONE, 2, "stop") as checkpoints:
        assert_whole(checkpoints.newest(), 1)
        (told,) = checkpoints.take_news()
        assert reason in told
        assert checkpoints.last_committed == 1
        assert_whole(checkpoints.newest(), 1)  # and is not found again
        assert not checkpoints.take_news()
    (note,) = (saved / "quarantine").glob("*.txt")
    assert reason in note.read_text()
    assert os.path.lexists(note.with_suffix(""))  # kept
    assert not os.path.lexists(saved / NEW)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("path", ["", SHARE, RECORD])
def test_what_belongs_to_another_user_is_not_used(saved: Path, path: str) -> None:
    os.chown(saved / NEW / path, 12345, -1)
    assert_whole(newest(saved), 1)
    (note,) = (saved / "quarantine").glob("*.txt")
    assert "belongs to user 12345" in note.read_text()


def test_any_changed_byte_of_a_record_is_found(saved: Path) -> None:
    data = (saved / NEW / RECORD).read_bytes()
    for place in range(len(data)):
        with pytest.raises(CheckpointError, match="garbled"):
            unseal(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])


def test_any_changed_bit_of_a_share_is_found(saved: Path) -> None:
    share = read_record(saved / NEW, os.geteuid()).shares[1]
    data, drawn = (saved / NEW / SHARE).read_bytes(), random.Random(0)
    for place in [drawn.randrange(len(data)) for _ in range(100)]:
        (saved / NEW / SHARE).write_bytes(data[:place] + bytes([data[place] ^ (1 << drawn.randrange(8))]) + data[place + 1 :])
        assert not verify_share(saved / NEW, share)
    (saved / NEW / SHARE).write_bytes(data)
    assert verify_share(saved / NEW, share)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_fall_back_to_the_same_one_at_any_world_size(saved: Path, world_size: int) -> None:
    flip(saved / NEW / SHARE, -1)  # only one rank reads this file
    assert run_ranks(find, world_size, saved.parent) == [0] * world_size
    first, *others = told(saved.parent, world_size)
    assert all(other == first for other in others)
    step, state, values, news = first
    assert (step, state, len(news)) == (1, {"step": 1}, 1)
    assert values == {name: [1] for name in ("weights/0", "weights/1", "buffers/num_0", "buffers/num_1")}


def test_a_kill_while_one_is_set_aside_loses_none(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(saved / NEW / SHARE, -1)
    monkeypatch.setenv("CROMSS_FAILPOINT", "checkpoint_quarantined")
    assert run_ranks(find, 2, saved.parent)[0] == -signal.SIGKILL
    monkeypatch.delenv("CROMSS_FAILPOINT")
    assert_whole(newest(saved), 1)
    assert len(list((saved / "quarantine").glob("step-*"))) == 1


def test_a_run_of_which_nothing_verifies_does_not_start(saved: Path) -> None:
    for folder in (OLD, NEW):
        flip(saved / folder / SHARE, -1)
    for _ in range(2):  # the second time all of them are in quarantine
        with pytest.raises(CheckpointError, match=r"none verifies.*--fresh"):
            newest(saved)
    assert len(list((saved / "quarantine").glob("step-*[0-9a-f]"))) == 2


def test_what_is_not_named_as_a_checkpoint_is_left_alone(saved: Path) -> None:
    strange = ("step-00000003", "step-3", "step-0000003.old", "notes.txt")
    for name in strange:
        (saved / name).mkdir()
    assert_whole(newest(saved), 2)
    assert all((saved / name).is_dir() for name in strange)


def test_what_a_dead_saving_left_is_removed_and_not_used(saved: Path) -> None:
    probe = saved / ".seen-by-all.0123456789abcdef"
    probe.touch()
    staging = saved / ".step-0000003.0123456789abcdef"
    shutil.copytree(saved / NEW, staging)
    link(saved / NEW / SHARE)  # a link in what is removed must not take its target along
    outside = saved / f"outside-{SHARE}"
    (staging / "link").symlink_to(saved / OLD)
    assert_whole(newest(saved), 1)
    assert not staging.exists()
    assert not probe.exists()
    assert outside.exists()


def test_the_record_is_json_that_names_step_state_files_and_versions(saved: Path) -> None:
    record = json.loads((saved / NEW / RECORD).read_text())["content"]
    assert (record["schema"], record["step"], record["state"]) == (1, 2, {"step": 2})
    assert {"torch", "safetensors", "cromss_dist"} <= set(record["versions"])
    for share in record["shares"]:
        data = (saved / NEW / share["name"]).read_bytes()
        assert share == {"name": share["name"], "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {path.name for path in (saved / NEW).iterdir()} == {RECORD, *(share["name"] for share in record["shares"])}

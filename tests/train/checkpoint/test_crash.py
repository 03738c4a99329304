"""Ranks that are killed while they save, and disks that are full."""

import os
import signal
from pathlib import Path

import pytest

from cromss_dist.train.checkpoint.store import Checkpoints
from tests.ranks import run_ranks
from tests.train.checkpoint.programs import (
    ALONE,
    assert_whole,
    die_while_saving,
    fill_the_disk,
    newest,
    see_other_folders,
    told,
)

# In the order in which a rank comes by; the second file that rank 1 writes is its vote, and that of rank 0 the record.
OF_ANY_RANK = (
    "checkpoint_staged",
    "after_open",
    "checkpoint_mid_share",
    "before_fsync",
    "before_replace",
    "after_replace",
    "before_replace:2",
)
OF_RANK_0 = ("checkpoint_before_record", "checkpoint_recorded", "checkpoint_before_publish")
AFTER_COMMIT = (
    (0, "checkpoint_published"),
    (0, "checkpoint_purge"),
    (0, "checkpoint_purged"),
    (1, "checkpoint_voted"),  # it has done all it must
)
DEATHS = [(rank, place) for rank in (0, 1) for place in OF_ANY_RANK] + [(0, place) for place in OF_RANK_0]
DEATHS += [(1, "checkpoint_before_vote"), *AFTER_COMMIT]


@pytest.mark.parametrize(("victim", "place"), DEATHS)
def test_a_rank_killed_at_any_place_leaves_a_whole_checkpoint_as_the_newest(tmp_path: Path, victim: int, place: str) -> None:
    codes = run_ranks(die_while_saving, 2, tmp_path, victim, place, 0.0)
    assert codes[victim] == -signal.SIGKILL
    assert_whole(newest(tmp_path / "saved"), 3 if (victim, place) in AFTER_COMMIT else 2)
    assert not list((tmp_path / "saved").glob(".step-*"))
    assert not (tmp_path / "saved" / "quarantine").exists()


@pytest.mark.parametrize(("victim", "place"), [(0, "after_replace"), (1, "checkpoint_mid_share"), (1, "checkpoint_voted")])
def test_a_rank_that_comes_late_to_the_saving_of_one_that_died_mixes_nothing(tmp_path: Path, victim: int, place: str) -> None:
    codes = run_ranks(die_while_saving, 2, tmp_path, victim, place, 3.0 if victim == 0 else 1.0)
    assert codes[victim] == -signal.SIGKILL
    assert_whole(newest(tmp_path / "saved"), 3 if (victim, place) in AFTER_COMMIT else 2)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("place", ["checkpoint_purge", "checkpoint_purged"])
def test_a_kill_while_old_ones_are_removed_leaves_as_many_as_are_to_be_kept(tmp_path: Path, place: str, keep: int) -> None:
    assert run_ranks(die_while_saving, 2, tmp_path, 0, place, 0.0, keep)[0] == -signal.SIGKILL
    assert len(list((tmp_path / "saved").glob("step-*"))) == keep
    for step in range(3, 3 - keep, -1):
        assert_whole(newest(tmp_path / "saved"), step)
        os.truncate(tmp_path / "saved" / f"step-{step:07d}" / "rank-00001-of-00002.safetensors", 1)


@pytest.mark.parametrize(("room_bytes", "reason"), [(4096, "rank 1: File too large"), (16, "rank 1 left no word")])
def test_a_full_disk_of_one_rank_fails_the_saving_on_all_and_training_goes_on(
    tmp_path: Path, room_bytes: int, reason: str
) -> None:
    assert run_ranks(fill_the_disk, 2, tmp_path, "continue", room_bytes) == [0, 0]
    (failures, last, names), other = told(tmp_path, 2)
    assert other[:2] == [failures, last]
    assert len(failures) == 1
    assert "step 2" in failures[0]
    assert reason in failures[0]
    assert sorted(names) == ["step-0000001", "step-0000003"]  # nothing of the failed one
    assert_whole(newest(tmp_path / "saved"), 3)


def test_a_full_disk_ends_the_run_on_all_ranks_where_that_is_wished(tmp_path: Path) -> None:
    assert run_ranks(fill_the_disk, 2, tmp_path, "stop", 4096) == [3, 3]
    assert_whole(newest(tmp_path / "saved"), 1)


def test_ranks_that_do_not_share_a_disk_are_told_so(tmp_path: Path) -> None:
    assert run_ranks(see_other_folders, 2, tmp_path) == [73, 73]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="Not a directory") as caught, Checkpoints(tmp_path / "file" / "saved", ALONE, 2, "stop"):
        pass
    assert type(caught.value).__name__ == "StorageError"

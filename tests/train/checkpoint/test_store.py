"""What is saved, when, and what stays."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cromss_dist.errors import StorageError
from cromss_dist.train.checkpoint import writer
from cromss_dist.train.checkpoint.shelf import Shelf
from cromss_dist.train.checkpoint.store import Checkpoints
from tests.ranks import run_ranks
from tests.train.checkpoint.programs import ALONE, assert_whole, newest, save_steps, share


class Held:
    """`write_share` that begins when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self._write_share = writer.write_share
        monkeypatch.setattr(writer, "write_share", self)

    def __call__(self, *args: Any) -> Any:
        assert self.go.wait(60)
        return self._write_share(*args)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_any_number_of_ranks_saved_one_process_finds(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(save_steps, world_size, tmp_path, [1, 2]) == [0] * world_size
    assert_whole(newest(tmp_path / "saved"), 2, world_size)


def test_tensors_come_back_bit_for_bit_and_other_readers_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randint(0, 2, (3, 5), dtype=torch.uint8).to(dtype) for dtype in writer._DTYPES
    }
    tensors |= {
        "random": torch.randn(1000, 7),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": torch.randn(8, 8).t()[1:, ::2],
        "bigger than a chunk": torch.randn(writer._CHUNK_BYTES // 4 + 3),
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    with Checkpoints(tmp_path, ALONE, 2, "stop") as checkpoints:
        checkpoints.save(1, {}, tensors)
    assert tensors == {}  # handed back
    saved = newest(tmp_path)
    assert saved
    others = safetensors.torch.load_file(saved.folder / "rank-00000-of-00001.safetensors")
    assert set(saved.tensors) == set(others) == set(expected)
    for name, tensor in expected.items():
        for found in (saved.tensors[name], others[name]):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_what_was_loaded_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, ALONE, 2, "stop") as checkpoints:
        checkpoints.save(1, {"step": 1}, share(1, 0))
        saved = checkpoints.newest()
    assert saved
    saved.tensors["weights/0"].add_(5)
    assert_whole(newest(tmp_path), 1, 1)


def test_what_is_trained_after_save_has_returned_is_not_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    live, state = torch.nn.Linear(50, 50), {"step": 1, "inner": [1]}
    before = {name: tensor.detach().clone() for name, tensor in live.state_dict().items()}
    with Checkpoints(tmp_path, ALONE, 2, "stop") as checkpoints:
        checkpoints.save(1, state, {name: tensor.clone() for name, tensor in live.state_dict().items()})
        assert not checkpoints.ended  # it has returned, and nothing is written yet
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.add_(1)
        state["inner"].append(2)  # type: ignore[attr-defined]
        held.go.set()
        checkpoints.wait()
        assert checkpoints.ended
        assert checkpoints.last_committed == 1
    saved = newest(tmp_path)
    assert saved
    assert saved.state == {"step": 1, "inner": [1]}
    assert all(saved.tensors[name].equal(tensor) for name, tensor in before.items())


def test_an_error_in_training_does_not_lose_what_is_being_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    checkpoints = Checkpoints(tmp_path, ALONE, 2, "stop")
    checkpoints.__enter__()
    checkpoints.save(1, {"step": 1}, share(1, 0))
    held.go.set()
    checkpoints.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert_whole(newest(tmp_path), 1, 1)


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, ALONE, 2, "stop") as checkpoints:
        for step in (9, 10, 11, 11):
            checkpoints.save(step, {"step": step}, share(step, 0))
        checkpoints.wait()
        assert sorted(os.listdir(tmp_path)) == ["step-0000010", "step-0000011"]
    with Checkpoints(tmp_path, ALONE, 1, "stop") as checkpoints:
        assert_whole(checkpoints.newest(), 11, 1)
        checkpoints.save(11, {"step": 0}, share(0, 0))  # where the run goes on from
        checkpoints.wait()
        assert_whole(checkpoints.newest(), 11, 1)


def test_those_that_may_be_damaged_are_removed_before_those_that_verified(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    for step in (1, 2, 3, 4):
        shelf.path(step).mkdir()
    shelf.purge(keep=3, trusted={1, 3})
    assert shelf.steps() == [4, 3, 1]
    shelf.purge(keep=1, trusted={1})
    assert shelf.steps() == [1]


def test_an_old_one_that_cannot_be_removed_is_told_and_the_new_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "old")

    monkeypatch.setattr(Shelf, "purge", refuse)
    with Checkpoints(tmp_path, ALONE, 1, "stop") as checkpoints:
        checkpoints.save(1, {"step": 1}, share(1, 0))
        checkpoints.wait()
        saved, note = checkpoints.take_news()
        assert (saved[:2], note) == (
            (1, tmp_path / "step-0000001"),
            "an older checkpoint could not be removed: Permission denied (old)",
        )
        assert not checkpoints.take_news()
    assert_whole(newest(tmp_path), 1, 1)


@pytest.mark.parametrize("place", ["mkdir", "fsync", "rename"])
def test_a_disk_that_is_full_at_any_place_fails_one_saving_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, ALONE, 2, "continue") as checkpoints:
        checkpoints.save(1, {"step": 1}, share(1, 0))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(*{"mkdir": (Path, "mkdir"), "fsync": (os, "fsync"), "rename": (Path, "rename")}[place], full)
            checkpoints.save(2, {"step": 2}, share(2, 0))
            checkpoints.wait()
        _, failure = checkpoints.take_news()  # after step 1
        assert "step 2 was not saved: " in failure
        assert "No space left on device" in failure
        assert os.listdir(tmp_path) == ["step-0000001"]
        checkpoints.save(3, {"step": 3}, share(3, 0))
        checkpoints.wait()
        assert checkpoints.last_committed == 3


def test_a_failed_saving_stops_the_run_where_that_is_wished(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, ALONE, 2, "stop") as checkpoints:
        checkpoints.save(1, {}, {"of a kind that is never trained": torch.zeros(1, dtype=torch.complex64)})
        with pytest.raises(StorageError, match=r"step 1 was not saved.*complex"):
            checkpoints.wait()
    assert os.listdir(tmp_path) == []

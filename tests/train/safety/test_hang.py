"""Real ranks that hang in each way there is (T9 of the catalogue)."""

import ctypes
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.errors import HangError
from cromss_dist.train.safety.failure import error_path, read_error, set_aside_errors, write_error
from cromss_dist.train.safety.hang import HangWatch
from cromss_dist.train.safety.hang_watcher import HANG_FILE
from cromss_dist.world import World
from tests.ranks import OWN_FOLDER, Ranks, run_ranks

TIMEOUT_S = 2.0


def stop_oneself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)  # until the watcher wakes it, and ends it


def hold_the_lock_of_the_interpreter() -> None:
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # waits for itself


def leave_the_others_alone_in_a_collective() -> None:
    time.sleep(600)


HANGS = (stop_oneself, hold_the_lock_of_the_interpreter, leave_the_others_alone_in_a_collective)


def hang(world: World, folder: Path, how: int) -> None:
    with HangWatch(folder, world.rank, TIMEOUT_S) as watch:
        for step in range(3):
            watch.beat(f"step {step}")
            world.barrier()
        if world.rank == 1:
            HANGS[how]()
        watch.beat("wait")
        world.barrier()


def content_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize("how", range(len(HANGS)), ids=[function.__name__ for function in HANGS])
def test_a_hang_ends_every_rank_with_its_stacks_on_disk(tmp_path: Path, how: int) -> None:
    with Ranks(hang, 2, tmp_path, how, timeout_s=40) as ranks:
        codes = ranks.wait()
    cannot_run_python = HANGS[how] is hold_the_lock_of_the_interpreter
    assert codes == [76, -signal.SIGKILL if cannot_run_python else 76]
    # Of the rank that hangs, and of the one that waits for it.
    assert f"in {HANGS[how].__name__}" in (tmp_path / "stacks-rank00001.txt").read_text()
    assert "in barrier" in (tmp_path / "stacks-rank00000.txt").read_text()
    for rank, place in enumerate(("wait", "step 2")):
        content = content_of(error_path(tmp_path, rank))
        assert (content["type"], content["rank"], content["place"]) == ("HangError", rank, place)
    assert TIMEOUT_S <= content_of(tmp_path / HANG_FILE)["silent_s"] <= 1.2 * TIMEOUT_S
    error = read_error(tmp_path)
    assert isinstance(error, HangError)
    assert re.search(r"gave no sign of life for 2\.\d s after", str(error))
    # Nobody else says it where a rank is its own launcher.
    assert f"HangError: {error} It goes on with: --resume {tmp_path}\n" in ranks.output(0) + ranks.output(1)


def live(world: World, folder: Path, seconds: float, timeout_s: float) -> None:
    end_s = time.monotonic() + seconds
    with HangWatch(folder, world.rank, timeout_s) as watch:
        (folder / f"watcher-{world.rank}").write_text(str(watch.watcher_pid))
        while time.monotonic() < end_s:
            watch.beat("step")
            time.sleep(0.05)


def test_a_rank_that_gives_signs_of_life_runs_to_its_end_and_leaves_nothing(tmp_path: Path) -> None:
    assert run_ranks(live, 1, tmp_path, 1.5 * TIMEOUT_S, TIMEOUT_S) == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [OWN_FOLDER, "watcher-0"]
    assert not runs(int((tmp_path / "watcher-0").read_text()))


def test_time_in_which_all_processes_were_stopped_is_no_hang(tmp_path: Path) -> None:
    with Ranks(live, 1, tmp_path, 2.5 * TIMEOUT_S, TIMEOUT_S) as ranks:
        watcher = wait_for_watcher(tmp_path)
        for number in (signal.SIGSTOP, signal.SIGCONT):  # as Ctrl-Z and fg do
            ranks.kill(0, number)
            os.kill(watcher, number)
            time.sleep(1.5 * TIMEOUT_S if number == signal.SIGSTOP else 0)
        assert ranks.wait() == [0]


def test_the_watcher_ends_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    with Ranks(live, 1, tmp_path, 600.0, TIMEOUT_S) as ranks:
        watcher = wait_for_watcher(tmp_path)
        ranks.kill(0, signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL]
    while runs(watcher):
        time.sleep(0.02)
    assert not (tmp_path / HANG_FILE).exists()


def wait_for_watcher(folder: Path) -> int:
    path = folder / "watcher-0"
    while not path.exists() or not path.read_text():
        time.sleep(0.02)
    return int(path.read_text())


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_hang_of_an_earlier_run_ends_no_later_one(tmp_path: Path) -> None:
    (tmp_path / HANG_FILE).write_text("{}")
    assert run_ranks(live, 1, tmp_path, 0.5, 1.0) == [0]


def test_an_error_passes_through_and_ends_the_watch(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), HangWatch(tmp_path, 0, 60) as watch:
        raise KeyError("mine")
    assert not runs(watch.watcher_pid)


def test_errors_of_an_attempt_are_set_aside_in_a_folder_of_their_own(tmp_path: Path) -> None:
    assert set_aside_errors(tmp_path) is None
    for number in (1, 2):
        write_error(tmp_path, 0, HangError(f"attempt {number}"))
        (tmp_path / "stacks-rank00000.txt").write_text("Thread 1")
        (tmp_path / "stacks-rank00001.txt").touch()  # of a rank that was killed
        assert str(read_error(tmp_path)) == f"attempt {number}"
        folder = set_aside_errors(tmp_path)
        assert folder == tmp_path / f"failure-{number}"
        assert sorted(path.name for path in folder.iterdir()) == ["error-rank0.json", "stacks-rank00000.txt"]
        assert read_error(tmp_path) is None

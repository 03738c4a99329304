"""Ranks of an earlier start and those of the present one: never both in a run's folder."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cromss_dist.errors import OutputExistsError
from cromss_dist.train.run.folder import working_in
from cromss_dist.train.safety import fence
from cromss_dist.train.safety.failure import read_error
from cromss_dist.train.safety.fence import admitted, new_ticket
from cromss_dist.train.safety.hang import HangWatch
from tests.forkserver import FORKSERVER


def work(folder: Path, ticket: str, pipe: Connection) -> None:
    with admitted(folder, ticket):
        pipe.send(os.getpid())
        pipe.recv()


def test_a_folder_is_not_taken_over_while_a_rank_of_a_killed_launcher_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = FORKSERVER.Pipe()
    ticket = new_ticket(tmp_path)
    rank = FORKSERVER.Process(target=work, args=(tmp_path, ticket, theirs))
    rank.start()
    pid = ours.recv()
    with admitted(tmp_path, ticket):
        pass  # another rank of the same start
    (tmp_path / "stop").touch()
    monkeypatch.setattr(fence, "ENDING_S", 0.2)
    with (
        pytest.raises(OutputExistsError, match="Workers of an earlier start"),
        working_in(tmp_path, "cromss pretrain", fresh=True),
    ):
        pass
    assert (tmp_path / "stop").exists(), "nothing was touched"
    monkeypatch.setattr(fence, "ENDING_S", 60)
    os.kill(pid, signal.SIGKILL)
    with working_in(tmp_path, "cromss pretrain", fresh=True):
        pass
    rank.join()


def hang(folder: Path, ticket: str, pipe: Connection) -> None:
    with admitted(folder, ticket), HangWatch(folder, 0, 600):
        pipe.send(os.getpid())
        pipe.recv()


def test_a_rank_that_hangs_is_ended_by_the_next_start_and_leaves_no_error(tmp_path: Path) -> None:
    ours, theirs = FORKSERVER.Pipe()
    rank = FORKSERVER.Process(target=hang, args=(tmp_path, new_ticket(tmp_path), theirs))
    rank.start()
    ours.recv()
    new_ticket(tmp_path)
    rank.join()
    assert rank.exitcode == -signal.SIGKILL
    assert read_error(tmp_path) is None


def test_a_rank_that_comes_late_is_not_let_in(tmp_path: Path) -> None:
    ticket = new_ticket(tmp_path)
    assert new_ticket(tmp_path) != ticket
    with pytest.raises(OutputExistsError, match="of an earlier start"), admitted(tmp_path, ticket):
        pass
    new_ticket(tmp_path)  # it holds nothing

"""What the launcher makes of workers that die, hang, stop or fail; the last test with Ray's, the others without."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from cromss_dist.config import EngineConfig, LaunchConfig, RunConfig
from cromss_dist.errors import (
    CheckpointError,
    ConfigError,
    CromssError,
    DivergenceError,
    HangError,
    LoaderError,
    OutputExistsError,
    PreemptedError,
    ShardError,
    TrainingError,
)
from cromss_dist.tracking.run.spool import read_events
from cromss_dist.train.run.folder import working_in
from cromss_dist.train.safety.failure import write_error
from cromss_dist.train.safety.stop import RESIZE_FILE, STOP_FILE, request_resize, request_stop, stop_requested
from launch import driver
from launch.elastic import Node
from tests.launch.conftest import ROOT, environment
from tests.launch.stub import finish

Attempt = Callable[[Path], None]
HERE = Node("a", "127.0.0.1", 1, 2, 0, 2, 0)  # nothing listens on port 1
CONFIG = RunConfig(launch=LaunchConfig(workers=2, max_restarts=2), engine=EngineConfig(device="cpu"))


def die(run_dir: Path) -> None:
    raise RuntimeError("Ray says much.\nThe actor died.")


def fails_with(error: CromssError) -> Attempt:
    def attempt(run_dir: Path) -> None:
        write_error(run_dir, 1, error)
        raise RuntimeError("Ray says much.")

    return attempt


HANG = fails_with(HangError("Rank 1 gave no sign of life."))


def is_told_to_stop_and(then: Attempt) -> Attempt:
    def attempt(run_dir: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested(run_dir)
        then(run_dir)

    return attempt


def saves(step: int, then: Attempt) -> Attempt:
    def attempt(run_dir: Path) -> None:
        (run_dir / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
        then(run_dir)

    return attempt


def is_resized(run_dir: Path) -> None:
    request_resize(run_dir, "there is room for 2 workers, 1 were running")
    fails_with(PreemptedError("It is saved up to step 7."))(run_dir)


@dataclass
class Told:
    """What a launcher did, beside the run's events."""

    worlds: list[int] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def run_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told) -> Callable[..., None]:
    """Runs the launcher on workers that go as the attempts say, one at first and two from then on."""

    @contextmanager
    def no_cluster(*_: object, **__: object) -> Iterator[str]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray takes it
        yield "/logs"

    def run(*attempts: Attempt) -> None:
        def run_workers(run: Any, places: list[Node]) -> None:
            assert not list(tmp_path.glob("error-*")), "what an earlier attempt left"
            assert not (tmp_path / RESIZE_FILE).exists()
            assert run.profile
            told.worlds.append(len(places))
            attempts[len(told.worlds) - 1](tmp_path)

        monkeypatch.setattr(driver, "_run_workers", run_workers)
        try:
            driver.drive(CONFIG, tmp_path, profile=True)
        finally:
            assert len(told.worlds) == len(attempts)

    monkeypatch.setattr(driver, "ray_cluster", no_cluster)
    monkeypatch.setattr(driver, "resizing", lambda *_: nullcontext())
    monkeypatch.setattr(driver, "wait_for_room", lambda *_, is_first: (HERE,) * (1 if is_first else 2))
    monkeypatch.setattr(driver._Run, "_pause", lambda _, seconds: told.pauses.append(seconds))
    return run


Run = Callable[..., None]


def texts(run_dir: Path) -> list[str]:
    return [event["text"] for event in read_events(run_dir)]


def test_workers_that_die_or_hang_start_again_and_the_run_goes_on(run_attempts: Run, tmp_path: Path, told: Told) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    run_attempts(die, HANG, finish)
    died, size, hung = texts(tmp_path)
    assert died.startswith(
        "127.0.0.1 answers no more. Ray says: The actor died. Ray's logs are in /logs. The workers start again; restarts that "
        "are left after this one, unless a checkpoint is saved: 1."
    )
    assert size == "2 workers in place of 1."
    assert hung.startswith(f"Rank 1 gave no sign of life. What it left is in {tmp_path / 'failure-1'}. The workers start again;")
    assert hung.endswith("unless a checkpoint is saved: 0.")
    assert (tmp_path / "failure-1" / "error-rank1.json").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert told.pauses == [1, 2]


def test_a_run_that_fails_again_and_again_ends_with_all_causes(run_attempts: Run, tmp_path: Path, told: Told) -> None:
    with pytest.raises(TrainingError) as error:
        run_attempts(die, HANG, die)
    died = "127.0.0.1 answers no more. Ray says: The actor died. Ray's logs are in /logs."
    assert str(error.value) == (
        f"{died} So it went 3 times in a row without a new checkpoint; before: 1. {died}; 2. Rank 1 gave no sign of life."
    )
    assert told.pauses == [1, 2]


def test_a_checkpoint_between_losses_gives_the_restarts_back(run_attempts: Run, told: Told) -> None:
    run_attempts(die, die, saves(5, die), die, saves(10, die), finish)
    assert told.pauses == [1, 2, 1, 2, 1]


def test_a_checkpoint_that_is_lost_and_made_again_gives_none_back(run_attempts: Run, tmp_path: Path, told: Told) -> None:
    def loses(run_dir: Path) -> None:
        (run_dir / "checkpoints" / "step-0000010").rmdir()  # it did not verify
        die(run_dir)

    with pytest.raises(TrainingError, match="3 times in a row without a new checkpoint"):
        run_attempts(saves(10, die), loses, saves(10, die))


def test_an_error_that_ray_hands_on_counts_where_its_file_is_not_seen(run_attempts: Run) -> None:
    def fails(run_dir: Path) -> None:
        raise WorkerGroupError("Ray says much.", {1: UserExceptionWithTraceback(ShardError("bad tar"), "Trace"), 0: OSError("x")})

    with pytest.raises(ShardError, match="bad tar"):
        run_attempts(fails)


def test_an_error_without_words_is_a_loss_like_another(run_attempts: Run, tmp_path: Path) -> None:
    def silent(run_dir: Path) -> None:
        raise TimeoutError

    run_attempts(silent, finish)
    assert "Ray says: TimeoutError" in texts(tmp_path)[0]


def test_a_resize_is_no_loss(run_attempts: Run, tmp_path: Path, told: Told) -> None:
    run_attempts(is_resized, is_resized, die, is_resized, is_resized, die, finish)
    assert told.worlds == [1, 2, 2, 2, 2, 2, 2]
    assert told.pauses == [1, 2]
    assert texts(tmp_path)[0] == "there is room for 2 workers, 1 were running. It is saved up to step 7. The workers start again."
    assert not list(tmp_path.glob("failure-*"))


def test_a_stop_goes_before_a_resize(run_attempts: Run, tmp_path: Path) -> None:
    def both(run_dir: Path) -> None:
        request_stop(run_dir)
        is_resized(run_dir)

    with pytest.raises(PreemptedError, match=r"It is saved up to step 7\."):
        run_attempts(both)


@pytest.mark.parametrize(
    ("attempts", "error", "message"),
    [
        ((die, HANG, die), TrainingError, "Ray says: The actor died"),
        ((die, die, HANG), HangError, "Rank 1 gave no sign of life"),
        ((fails_with(DivergenceError("5 bad steps.")),), DivergenceError, r"5 bad steps\."),
        ((die, fails_with(PreemptedError("Saved at step 7."))), PreemptedError, r"Saved at step 7\."),
        ((is_told_to_stop_and(die),), PreemptedError, "asked to stop, and ended before it was saved again: 127.0.0.1 answers"),
        ((is_told_to_stop_and(HANG),), PreemptedError, "asked to stop, and ended before it was saved again: Rank 1"),
    ],
    ids=["dies too often", "hangs too often", "diverges", "stops", "dies while it stops", "hangs while it stops"],
)
def test_other_errors_and_the_last_attempt_s_are_raised_as_they_are(
    run_attempts: Run, attempts: tuple[Attempt, ...], error: type[CromssError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_attempts(*attempts)


def test_a_run_that_ends_although_it_was_told_to_stop_has_ended(run_attempts: Run) -> None:
    run_attempts(is_told_to_stop_and(finish))


def test_a_run_that_ends_although_it_was_to_be_resized_has_ended(run_attempts: Run, tmp_path: Path) -> None:
    def both(run_dir: Path) -> None:
        request_resize(run_dir, "too late")
        finish(run_dir)

    run_attempts(both)
    assert not (tmp_path / RESIZE_FILE).exists()


def test_a_loss_while_the_run_is_resized_is_a_loss(run_attempts: Run, told: Told) -> None:
    def both(run_dir: Path) -> None:
        request_resize(run_dir, "127.0.0.1 will be taken back")
        die(run_dir)

    run_attempts(both, both, finish)
    assert told.pauses == [1, 2]


def test_who_works_in_a_folder_clears_it_and_keeps_others_out(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    write_error(tmp_path, 0, HangError("earlier"))
    with working_in(tmp_path, "cromss pretrain"):
        assert not stop_requested(tmp_path)
        assert (tmp_path / "failure-1" / "error-rank0.json").exists()
        with pytest.raises(OutputExistsError, match="Another process runs"), working_in(tmp_path, "cromss pretrain"):
            pass
    with working_in(tmp_path, "cromss pretrain"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        *(PreemptedError("x"), HangError("x"), DivergenceError("x"), ShardError("x"), LoaderError("x"), OSError("x")),
        *(KeyboardInterrupt(), ConfigError("x"), CheckpointError("x")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_after_which_a_run_can_go_on_says_how(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    with pytest.raises(type(error)) as caught, working_in(folder, "cromss pretrain"):
        raise error
    notes = [] if isinstance(error, (ConfigError, CheckpointError)) else [f"It goes on with: cromss pretrain --resume '{folder}'"]
    assert getattr(caught.value, "__notes__", []) == notes, "what has to change first, ConfigError and CheckpointError say"


@pytest.mark.slow
def test_ray_s_workers_start_again_and_stop_when_all_processes_get_sigterm(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.stub", str(tmp_path), "die.hang.wait"],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    attempts = [tmp_path / f"attempts-{rank}" for rank in range(2)]
    try:
        while not all(path.exists() and len(path.read_text().splitlines()) == 3 for path in attempts):
            assert driver.poll() is None, driver.communicate()[1]
            time.sleep(0.1)
        os.killpg(driver.pid, signal.SIGTERM)  # as Slurm does
        error = driver.communicate(timeout=120)[1]
    finally:
        driver.kill()  # Ray's processes end with it
    assert driver.returncode == PreemptedError.exit_code, error
    assert error.startswith("PreemptedError: The run was asked to stop at step 7 and is saved. It goes on with: python launch/")
    assert {"hang.json", "error-rank0.json", "stacks-rank00000.txt"} <= {p.name for p in (tmp_path / "failure-1").iterdir()}
    died, hung = (event["text"] for event in read_events(tmp_path))
    assert died.startswith("A worker died")
    assert "gave no sign of life" in hung

"""Jobs in processes, whose results stay."""

import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from benchmarks.method.jobs import Job, result_of, run_jobs
from cromss_dist.errors import ConfigError, WorkerError


def work_on(marks: Path, name: str, console: Console) -> dict[str, Any]:
    """Leaves a mark each time it runs; one that is asked to fail does so as long as there is no cure."""
    with (marks / name).open("a") as file:
        file.write("x")
    console.print(f"working on {name}")
    if name == "bad" and not (marks / "cure").exists():
        raise ConfigError("bad is bad.")
    return {"name": name}


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def test_after_a_failure_no_other_begins_and_only_the_rest_is_run_again(tmp_path: Path, marks: Path) -> None:
    jobs = [Job(f"stage/{name}", work_on, (marks, name)) for name in ("good", "bad", "later")]
    told: list[str] = []
    with pytest.raises(ConfigError, match="bad is bad") as caught:
        run_jobs(tmp_path, jobs, 1, told.append)
    assert "bad.log" in str(caught.value.__notes__)
    assert not (marks / "later").exists()

    (marks / "cure").touch()
    run_jobs(tmp_path, jobs, 2, told.append)
    assert {name: (marks / name).read_text() for name in ("good", "bad", "later")} == {"good": "x", "bad": "xx", "later": "x"}
    assert result_of(tmp_path, "stage/later")["name"] == "later"
    assert (tmp_path / "logs/stage/bad.log").read_text() == "working on bad\n" * 2
    assert told[0].startswith("1 of 3: stage/good, ")
    assert len(told) == 3


def die(console: Console) -> dict[str, Any]:
    os._exit(9)


def sleep(pid_file: Path, console: Console) -> dict[str, Any]:
    pid_file.write_text(str(os.getpid()))
    time.sleep(100)
    return {}


def run_sleeper(work: Path) -> None:
    run_jobs(work, [Job("sleeper", sleep, (work / "pid",))], 1, print)


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    main = get_context("spawn").Process(target=run_sleeper, args=(tmp_path,))
    main.start()
    deadline = time.monotonic() + 100
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    main.kill()
    main.join()
    assert psutil.wait_procs([worker], timeout=60)[0]


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_that_says_what_ran(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="while stage/first ran"):
        run_jobs(tmp_path, [Job("stage/first", die, ())], 1, print)

"""The runner in processes: results, errors, and what a killed process becomes."""

import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import run_here
from cromss_dist.errors import ConfigError, ShardError, WorkerError
from cromss_dist.noise.observatory import Observatory, observe
from cromss_dist.noise.processes import process_runner
from cromss_dist.noise.segmenter import Segmenter
from tests.noise.jobs import add, run_sleepers

ROOT = Path(__file__).resolve().parents[2]


def test_one_worker_is_this_process_and_less_is_refused() -> None:
    assert process_runner(1) is run_here
    with pytest.raises(ConfigError, match="--workers 0"):
        process_runner(0)
    assert list(process_runner(2)(add, 1, [])) == []


def test_results_come_from_other_processes_and_errors_as_they_are() -> None:
    assert sorted(process_runner(2)(add, 10, [1, 2, 3])) == [11, 12, 13]
    with pytest.raises(ShardError, match="job -1 is damaged"):
        list(process_runner(2)(add, 10, [-1, 1]))


def test_a_killed_process_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(WorkerError, match="give fewer --workers"):
        list(process_runner(2)(add, 10, [0, 1]))


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    main = get_context("spawn").Process(target=run_sleepers, args=(tmp_path,))
    main.start()
    deadline = time.monotonic() + 100
    while not all((tmp_path / str(job)).exists() for job in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [psutil.Process(int((tmp_path / str(job)).read_text())) for job in (0, 1)]
    main.kill()
    main.join()
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.slow
def test_the_cube_is_the_same_by_two_processes(
    dataset: StoredArchive, segmenter: Segmenter, observations: StoredArchive, tmp_path: Path
) -> None:
    observe(Observatory(dataset, segmenter), tmp_path / "cube", run=process_runner(2))
    assert_same(tmp_path / "cube", observations)


@pytest.mark.slow
def test_the_cube_is_the_same_on_ray(
    dataset: StoredArchive, segmenter: Segmenter, observations: StoredArchive, tmp_path: Path
) -> None:
    config = segmenter.weights.with_name("config.yaml")
    model = ["--weights", str(segmenter.weights), "--config", str(config)]
    place = ["--manifest", dataset.location, "--out", str(tmp_path / "cube"), "--workers", "2", "--panels", "1"]
    done = subprocess.run([sys.executable, "launch/noise.py", *model, *place], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "What the model thinks of the labels" in done.stdout
    assert_same(tmp_path / "cube", observations)


def assert_same(folder: Path, observations: StoredArchive) -> None:
    for path in Path(observations.location).rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(observations.location)).read_bytes() == path.read_bytes(), path

"""The runner in processes: results, errors, and what a killed process becomes."""

from pathlib import Path

import pytest

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import run_here
from cromss_dist.errors import ConfigError, ShardError, WorkerError
from cromss_dist.noise.observatory import Observatory, observe
from cromss_dist.noise.processes import process_runner
from cromss_dist.noise.segmenter import Segmenter
from tests.noise.jobs import add


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
@pytest.mark.parametrize("ray", [False, True])
def test_the_cube_is_the_same_by_two_processes(
    ray: bool, dataset: StoredArchive, segmenter: Segmenter, observations: StoredArchive, tmp_path: Path
) -> None:
    from launch.parallel import ray_runner

    run = ray_runner(2) if ray else process_runner(2)
    observe(Observatory(dataset, segmenter), tmp_path / "cube", run=run)
    for path in Path(observations.location).rglob("*"):
        if path.is_file():
            assert (tmp_path / "cube" / path.relative_to(observations.location)).read_bytes() == path.read_bytes(), path

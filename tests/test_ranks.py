"""The harness of tests that need ranks."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cromss_dist.errors import PreemptedError
from cromss_dist.world import World
from tests.ranks import Ranks, run_ranks


def add(world: World, folder: Path, number: int) -> None:
    total = world.reduce_sum(torch.tensor([number + world.rank]))
    flags = world.any(False), world.any(world.rank == 1), world.any(True)
    (folder / f"sum-{world.rank}").write_text(f"{int(total)} {flags} {os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")


def fail(world: World, folder: Path) -> None:
    if world.rank == 1:
        raise PreemptedError("asked to stop")
    print("rank 0 is well")


def sleep(world: World, folder: Path) -> None:
    dist.barrier()
    (folder / f"ready-{world.rank}").touch()
    time.sleep(60)


def test_ranks_form_one_group(tmp_path: Path) -> None:
    assert run_ranks(add, 2, tmp_path, 5) == [0, 0]
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)] == ["11 (False, True, True) 2 1"] * 2


def test_the_exit_code_of_an_error_and_the_output_reach_the_test(tmp_path: Path) -> None:
    with Ranks(fail, 2, tmp_path) as ranks:
        assert ranks.wait() == [0, PreemptedError.exit_code]
        assert "rank 0 is well" in ranks.output(0)
        assert "asked to stop" in ranks.output(1)


def test_a_killed_rank_tells_its_signal_and_none_outlives_the_block(tmp_path: Path) -> None:
    with Ranks(sleep, 2, tmp_path) as ranks:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        ranks.kill(1, signal.SIGKILL)
        pids = ranks.pids
    assert ranks.wait() == [-signal.SIGKILL] * 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_rank_that_never_ends_shows_its_stacks(tmp_path: Path) -> None:
    with Ranks(sleep, 1, tmp_path, timeout_s=2) as ranks:
        assert ranks.wait() == [1]
        assert "in sleep" in ranks.output(0)

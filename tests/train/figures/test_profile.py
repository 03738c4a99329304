"""The trace of a run: which steps it holds, what its table adds up, and what there is without one."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cromss_dist.train.figures.meter import Meter
from cromss_dist.train.figures.profile import PROFILE_FOLDER, SKIPPED_STEPS, Profile
from cromss_dist.world import World
from tests.ranks import run_ranks

UNTRACED = SKIPPED_STEPS + 1


def run(profile: Profile, num_steps: int) -> None:
    """Steps of one matrix product each, in a phase of the meter."""
    meter, square = Meter(torch.device("cpu"), 1, lambda _: {}), torch.ones(64, 64)
    with profile:
        for _ in range(num_steps):
            with meter.phase("forward"):
                square @ square
            with meter.phase("loss"):
                square.sum()
            profile.step()


def test_a_trace_holds_the_steps_after_the_first_ones_and_their_phases(tmp_path: Path) -> None:
    run(Profile(tmp_path, rank=3, active_steps=2), UNTRACED + 2 + 5)
    folder = tmp_path / PROFILE_FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["rank00003.json.gz", "rank00003.txt"]
    trace = json.loads(gzip.decompress((folder / "rank00003.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    for name in ("cromss::forward", "cromss::loss", "aten::mm"):
        assert names.count(name) == 2, name
    assert {name for name in names if name.startswith("ProfilerStep")} == {
        f"ProfilerStep#{UNTRACED}",
        f"ProfilerStep#{UNTRACED + 1}",
    }


def test_its_table_names_ranges_and_operations_by_their_cost(tmp_path: Path) -> None:
    run(Profile(tmp_path, rank=0, active_steps=3), UNTRACED + 3)
    ranges, operations = (tmp_path / PROFILE_FOLDER / "rank00000.txt").read_text().split("operation, on the CPU")
    assert ranges.startswith("3 steps, ")
    shares = dict(re.findall(r"^(\w[\w, ]*?) +[\d.]+ +([\d.]+)%$", ranges, re.MULTILINE))
    assert set(shares) == {"forward", "loss", "collectives, within these"}
    assert sum(map(float, shares.values())) <= 100.1
    rows = re.findall(r"^(\S+) +(\d+) +([\d.]+) +[\d.]+%$", operations, re.MULTILINE)
    assert ("aten::mm", "3") in [row[:2] for row in rows]
    times = [float(row[2]) for row in rows]
    assert len(times) <= 20
    assert times == sorted(times, reverse=True)
    assert "cromss::" not in operations


@pytest.mark.parametrize("num_steps", [0, UNTRACED])
def test_a_run_too_short_to_be_traced_says_so(tmp_path: Path, num_steps: int) -> None:
    run(Profile(tmp_path, rank=0), num_steps)
    (only,) = (tmp_path / PROFILE_FOLDER).iterdir()
    assert f"No step was traced: the run took {num_steps}," in only.read_text()


def test_a_run_that_ends_within_the_trace_leaves_what_there_is(tmp_path: Path) -> None:
    run(Profile(tmp_path, rank=0, active_steps=50), UNTRACED + 2)
    assert (tmp_path / PROFILE_FOLDER / "rank00000.json.gz").exists()
    assert "steps, " in (tmp_path / PROFILE_FOLDER / "rank00000.txt").read_text()


def test_an_error_of_the_run_is_not_hidden(tmp_path: Path) -> None:
    def fail_within_the_trace() -> None:
        with Profile(tmp_path, rank=0) as profile:
            for _ in range(UNTRACED + 1):
                profile.step()
            shutil.rmtree(tmp_path / PROFILE_FOLDER)  # so that nothing could be written
            raise ValueError("of the run")

    with pytest.raises(ValueError, match="of the run"):
        fail_within_the_trace()


def rank_sums(world: World, folder: Path) -> None:
    """Steps of nothing but a sum over ranks."""
    with Profile(folder, world.rank, active_steps=2) as profile:
        for _ in range(UNTRACED + 2):
            world.reduce_sum(torch.ones(2**20))
            profile.step()


def test_each_rank_leaves_its_own_trace_with_its_collectives(tmp_path: Path) -> None:
    assert run_ranks(rank_sums, 2, tmp_path) == [0, 0]
    for rank in range(2):
        table = (tmp_path / PROFILE_FOLDER / f"rank{rank:05d}.txt").read_text()
        collectives = re.search(r"^collectives, within these +([\d.]+)", table, re.MULTILINE)
        assert collectives
        assert float(collectives[1]) > 0


def test_nothing_is_done_where_none_is_asked_for(tmp_path: Path) -> None:
    run(Profile(None, rank=0), 10)
    assert not list(tmp_path.iterdir())

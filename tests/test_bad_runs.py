"""Whole runs on two ranks in which steps go wrong, and the replay of these steps in one process."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cromss_dist.pretrain.task
from cromss_dist.config import FaultConfig, LossConfig, RunConfig
from cromss_dist.data.loading.augment import train_example
from cromss_dist.errors import DivergenceError
from cromss_dist.replay import replay
from cromss_dist.schema import Example
from cromss_dist.tracking.run.spool import read_events
from cromss_dist.train.checkpoint import writer
from cromss_dist.world import World
from tests.ranks import Ranks, run_ranks
from tests.whole_runs import of_steps, small_run, start_folder, trace_of, traced_run

STEPS = 8


@pytest.fixture
def config(synthetic_shards: Path, store_uri: str) -> RunConfig:
    """Eight steps of 2 ranks x 2 micro batches x 1 sample, with the loss of the global batch."""
    config = of_steps(small_run(synthetic_shards, store_uri), STEPS)
    return replace(config, engine=replace(config.engine, accumulation_steps=2))


def run_with_bad_pixels(world: World, run_dir: Path, config: dict[str, Any], first: int, last: int) -> None:
    """A rank of a run in which an image of rank 1 has a pixel that is no number, in the steps `first` to `last`."""
    num_prepared = 0

    def spoil(*arguments: Any) -> Example:
        nonlocal num_prepared
        num_prepared += 1
        example = train_example(*arguments)
        if world.rank == 1 and first <= (num_prepared + 1) // 2 <= last:  # two micro batches a step
            example.images["s2"][0, 3, 5, 5] = float("nan")
        return example

    vars(cromss_dist.pretrain.task)["train_example"] = spoil
    traced_run(world, run_dir, config)


def run_that_ends_while_it_is_saved(world: World, run_dir: Path, config: dict[str, Any]) -> None:
    """The same, bad from step 4 on, where the disk of rank 1 takes longer for step 3 than the bad steps do."""
    write_share = writer.write_share

    def write_late(*arguments: Any) -> Any:
        time.sleep(2 * world.rank)
        return write_share(*arguments)

    vars(writer)["write_share"] = write_late
    run_with_bad_pixels(world, run_dir, config, 4, 99)


def test_a_run_that_diverges_while_it_is_saved_names_that_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, faults=FaultConfig(max_bad_steps=1, bundles=0))
    run_dir = tmp_path / "run"
    with Ranks(run_that_ends_while_it_is_saved, 2, run_dir, start_folder(run_dir, config)) as ranks:
        assert ranks.wait() == [DivergenceError.exit_code] * 2
        assert "of step 3" in ranks.output(1)
    assert [event["step"] for event in events_of(run_dir, "checkpoint")] == [3]


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["event"] == kind]


def test_a_bad_pixel_costs_one_step_and_its_bundle_tells_that_the_data_are_good(config: RunConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_ranks(run_with_bad_pixels, 2, run_dir, start_folder(run_dir, config), 4, 4) == [0, 0]
    (told,) = events_of(run_dir, "bad_step")
    assert (told["step"], told["reason"]) == (4, "loss is nan")
    losses = trace_of(run_dir).losses
    assert [step for step, loss in losses.items() if loss != loss] == [4]
    assert len(losses) == STEPS
    bundle, found = replay(Path(told["bundle"]))
    assert bundle.samples.sample_ids == tuple(place[1] for place in trace_of(run_dir).ids[4])
    assert found.verdict(bundle).startswith("finite here: a fault of a machine or of arithmetic (recorded on 2 x cpu, fp32;")


def test_bad_steps_in_a_row_end_the_run_with_a_checkpoint_from_before_them(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, faults=FaultConfig(max_bad_steps=3, bundles=2))
    run_dir = tmp_path / "run"
    content = start_folder(run_dir, config)
    assert run_ranks(run_with_bad_pixels, 2, run_dir, content, 5, 99) == [DivergenceError.exit_code] * 2
    assert [event["step"] for event in events_of(run_dir, "bad_step")] == [5, 6, 7]
    assert sorted(path.name for path in (run_dir / "replay").iterdir()) == ["step-0000005", "step-0000006"]
    assert run_ranks(traced_run, 2, run_dir, content) == [0, 0]  # without the fault: from step 3 on, to the end
    assert all(loss == loss for loss in trace_of(run_dir).losses.values())


def test_a_replay_in_one_process_has_the_loss_that_two_ranks_recorded(config: RunConfig, tmp_path: Path) -> None:
    # With weights that stand still, and any loss above the last ones for a spike.
    faults = FaultConfig(spike="skip", spike_factor=1.00001, spike_window=2)
    config = replace(config, faults=faults, train=replace(config.train, lr=1e-9), loss=LossConfig(ramp="none"))
    run_dir = tmp_path / "run"
    assert run_ranks(traced_run, 2, run_dir, start_folder(run_dir, config)) == [0, 0]
    spikes = events_of(run_dir, "spike")
    assert spikes, "no loss has risen, so nothing was shown"
    bundle, found = replay(Path(spikes[0]["bundle"]))
    assert bundle.weights_of == "before"
    assert found.loss == pytest.approx(bundle.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(bundle.grad_norm, rel=1e-4)
    assert found.verdict(bundle).startswith("reproduces: spike: loss is ")

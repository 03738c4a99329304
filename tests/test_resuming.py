"""Runs that are cut, anywhere, and go on: on as many ranks to the bit, on others in the same order with the same loss."""

import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cromss_dist.config import EngineConfig, LossConfig, ModelConfig, ReadingConfig, RunConfig
from cromss_dist.errors import CheckpointError
from cromss_dist.parse import CONFIG_FILE, parse_run
from cromss_dist.schema import MODALITIES
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.run.spool import read_events
from cromss_dist.tracking.store import connect
from cromss_dist.train.run.continuation import changes_of
from cromss_dist.train.run.folder import read_summary, working_in
from cromss_dist.world import World
from tests.ranks import run_ranks
from tests.whole_runs import (
    Trace,
    mlflow_run,
    mlflow_steps,
    of_steps,
    run_and_kill,
    run_until,
    small_run,
    start_folder,
    trace_of,
    traced_run,
)


@pytest.fixture
def config(synthetic_shards: Path, store_uri: str) -> RunConfig:
    """A run of steps of 4 samples, saved every third step, of networks that are as small as they can be."""
    return small_run(synthetic_shards, store_uri)


def uninterrupted(folder: Path, config: RunConfig, world: int) -> tuple[Trace, bytes]:
    content = start_folder(folder, config)
    assert run_ranks(traced_run, world, folder, content) == [0] * world
    return trace_of(folder), (folder / "model.safetensors").read_bytes()


def check_kills(config: RunConfig, steps: int, folder: Path, kills: int, steps_between: int, seed: int) -> None:
    config = of_steps(config, steps)
    whole, weights = uninterrupted(folder / "whole", config, 2)
    assert sorted(whole.losses) == list(range(1, steps + 1))
    draws = random.Random(seed)
    content = start_folder(folder / "cut", config)
    for kill in range(kills):
        assert run_and_kill(folder / "cut", content, 2, draws.randint(1, steps_between), draws), f"ended before kill {kill}"
    assert run_ranks(traced_run, 2, folder / "cut", content) == [0, 0]
    cut = trace_of(folder / "cut")
    assert cut.num_computed > steps, "no kill cost a step, so nothing was shown"
    assert cut.losses == whole.losses
    assert cut.ids == whole.ids
    assert (folder / "cut" / "model.safetensors").read_bytes() == weights


def test_a_run_killed_three_times_ends_with_the_weights_of_one_that_was_not(config: RunConfig, tmp_path: Path) -> None:
    check_kills(config, 30, tmp_path, kills=3, steps_between=8, seed=0)


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_with_the_weights_of_one_that_was_not(config: RunConfig, tmp_path: Path) -> None:
    check_kills(config, 240, tmp_path, kills=30, steps_between=10, seed=1)


def stopped_after(folder: Path, config: RunConfig, world: int, steps: int) -> None:
    """Runs on `world` ranks until `steps` steps are done, and has the run stop itself there."""
    codes = run_ranks(run_until, world, folder, config.to_dict(), steps)
    assert codes == [75] * world


def test_a_stop_at_any_step_does_not_show_in_local_batch_norms(config: RunConfig, tmp_path: Path) -> None:
    config = of_steps(replace(config, engine=replace(config.engine, batch_norm="local")), 5)
    _, weights = uninterrupted(tmp_path / "whole", config, 2)
    folder = tmp_path / "cut"
    content = start_folder(folder, config)
    stopped_after(folder, config, world=2, steps=2)
    assert run_ranks(traced_run, 2, folder, content) == [0, 0]
    assert (folder / "model.safetensors").read_bytes() == weights, "with their running statistics"


def test_a_run_on_two_then_one_then_two_ranks_sees_the_same_samples_and_losses(config: RunConfig, tmp_path: Path) -> None:
    config = of_steps(config, 21)
    whole, _ = uninterrupted(tmp_path / "whole", config, 2)
    folder = tmp_path / "moved"
    start_folder(folder, config)
    stopped_after(folder, config, world=2, steps=7)
    stopped_after(folder, config, world=1, steps=14)
    assert run_ranks(traced_run, 2, folder, config.to_dict()) == [0, 0]
    moved = trace_of(folder)
    assert moved.num_computed == 21, "a stop costs no step"
    assert {step: sorted(ids) for step, ids in moved.ids.items()} == {step: sorted(ids) for step, ids in whole.ids.items()}
    losses = np.array([[trace.losses[step] for step in range(1, 22)] for trace in (whole, moved)])
    assert np.array_equal(losses[0, :7], losses[1, :7])
    np.testing.assert_allclose(losses[1, :9], losses[0, :9], rtol=1e-5)
    # Each step on another number of ranks rounds otherwise, and later ones build on that: docs/numerics.md.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_checkpoint_goes_on_alike_on_any_number_of_ranks_and_at_any_zero_stage(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start_folder(folder, config)
    stopped_after(folder, config, world=2, steps=8)
    losses = {}
    for world, zero_stage in ((2, 0), (2, 1), (1, 2), (4, 3)):
        copy = Path(shutil.copytree(folder, tmp_path / f"{world}-{zero_stage}"))
        content = replace(config, engine=replace(config.engine, zero_stage=zero_stage)).to_dict()
        assert run_ranks(run_until, world, copy, content, 11) == [75] * world
        losses[world, zero_stage] = [trace_of(copy).losses[step] for step in (9, 10, 11)]
        (resumed,) = [event for event in read_events(copy) if event["event"] == "resumed"]
        assert resumed["step"] == 8
        assert resumed["differences"] == ([f"engine.zero_stage 0 -> {zero_stage}"] if zero_stage else [])
    for told in losses.values():
        np.testing.assert_allclose(told, losses[2, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 4))}, r"model.decoder_channels was"),
        ({"seed": 1}, r"seed was 0 and is 1"),
        ({"loss": LossConfig(ramp_epochs=11)}, r"loss.ramp_epochs was 10.0 and is 11"),
        ({"engine": EngineConfig(global_batch=8, device="cpu")}, r"engine.global_batch was 4 and is 8"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(config: RunConfig, change: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        changes_of(config.to_dict(), replace(config, **change))


def test_what_a_run_may_change_is_told(config: RunConfig) -> None:
    changed = replace(
        config,
        output="elsewhere",
        train=replace(config.train, lr=1e-4),
        engine=replace(config.engine, zero_stage=2),
        data=replace(config.data, shards="moved", reading=ReadingConfig(threads=3)),
    )
    assert changes_of(config.to_dict(), config) == []
    assert changes_of(config.to_dict(), changed) == [
        "train.lr 0.001 -> 0.0001",
        "engine.zero_stage 0 -> 2",
        "data.reading.threads 2 -> 3",
    ]


def test_a_config_that_is_refused_leaves_the_run_as_it_was(config: RunConfig, tmp_path: Path) -> None:
    config = of_steps(config, 6)
    folder = tmp_path / "run"
    start_folder(folder, config)
    stopped_after(folder, config, world=1, steps=3)
    before = (folder / CONFIG_FILE).read_bytes()
    wider = replace(config, model=replace(config.model, decoder_channels=(16, 8, 8)))
    assert run_ranks(traced_run, 1, folder, wider.to_dict()) == [CheckpointError.exit_code]
    assert (folder / CONFIG_FILE).read_bytes() == before, "so that --resume alone still goes on"
    slower = replace(config, train=replace(config.train, lr=1e-4))
    assert run_ranks(traced_run, 1, folder, slower.to_dict()) == [0]
    assert trace_of(folder).num_computed == 6
    assert parse_run(["--resume", str(folder)]).config == slower


def run_cut_in_export(world: World, run_dir: Path, config: dict[str, Any]) -> None:
    """A rank of a run that is killed when it has registered one of its two encoders."""
    register, times = Registry.register, iter(range(2))

    def once(*arguments: Any, **more: Any) -> Any:
        if next(times) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return register(*arguments, **more)

    Registry.register = once  # type: ignore[method-assign]
    traced_run(world, run_dir, config)


def test_a_finished_run_is_not_repeated_and_goes_on_if_it_is_made_longer(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, tracking=replace(config.tracking, register=True))

    def num_registered() -> list[int]:
        client = connect(str(config.tracking_uri))
        return [len(client.search_model_versions(f"name='cromss-resnet18-{modality}'")) for modality in MODALITIES]

    folder = tmp_path / "run"
    start_folder(folder, config)
    short, long = of_steps(config, 3).to_dict(), of_steps(config, 8).to_dict()
    assert run_ranks(traced_run, 1, folder, short) == [0]
    saved = (folder / "checkpoints").rename(tmp_path / "elsewhere")  # what is finished needs none
    assert run_ranks(traced_run, 1, folder, short) == [0]
    assert trace_of(folder).num_computed == 3
    assert "--train.epochs makes it longer" in list(read_events(folder))[-1]["text"]
    assert num_registered() == [1, 1]
    shutil.rmtree(folder / "checkpoints")
    saved.rename(folder / "checkpoints")
    assert run_ranks(run_cut_in_export, 1, folder, long) == [-signal.SIGKILL]
    assert num_registered() == [2, 1]
    assert read_summary(folder) is None, "of three steps, whose encoders are no more"
    assert run_ranks(traced_run, 1, folder, long) == [0]
    assert num_registered() == [2, 2]
    whole, _ = uninterrupted(tmp_path / "whole", of_steps(config, 8), 1)
    assert trace_of(folder).num_computed == 8
    assert trace_of(folder).losses == whole.losses


def test_a_run_that_starts_over_has_nothing_of_what_it_was(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for steps, fresh in ((4, False), (2, True), (3, True)):
        config = of_steps(config, steps)
        content = config.to_dict() if fresh else start_folder(folder, config)
        with working_in(folder, "cromss pretrain", fresh):
            assert run_ranks(traced_run, 1, folder, content) == [0]
        assert trace_of(folder).num_computed == steps
        assert mlflow_steps(folder, config.tracking_uri) == list(range(1, steps + 1))
    assert trace_of(folder / "before-1").num_computed == 4
    assert trace_of(folder / "before-2").num_computed == 2
    assert (folder / "before-2" / "checkpoints" / "step-0000002").is_dir()


def test_a_run_goes_on_without_its_mlflow_store_and_ends_where_it_is_if_made_shorter(
    config: RunConfig, template_store: Path, tmp_path: Path
) -> None:
    config = of_steps(config, 8)
    folder = tmp_path / "run"
    start_folder(folder, config)
    stopped_after(folder, config, world=1, steps=5)
    elsewhere = replace(of_steps(config, 4), tracking=replace(config.tracking, uri=f"sqlite:///{tmp_path / 'other.db'}"))
    shutil.copyfile(template_store, tmp_path / "other.db")
    assert run_ranks(traced_run, 1, folder, elsewhere.to_dict()) == [0]
    assert mlflow_steps(folder, elsewhere.tracking_uri) == [1, 2, 3, 4, 5], "the step at which it stopped, too"
    summary = read_summary(folder)
    assert summary
    assert summary.samples == 20
    assert summary.after["val/loss/total"] != summary.before["val/loss/total"]
    assert trace_of(folder).num_computed == 5


def test_figures_of_a_run_that_was_cut_have_each_step_once(config: RunConfig, tmp_path: Path) -> None:
    config = of_steps(config, 12)
    folder = tmp_path / "run"
    content = start_folder(folder, config)
    run_and_kill(folder, content, 1, 5, random.Random(0))
    assert run_ranks(traced_run, 1, folder, content) == [0]
    assert mlflow_steps(folder, config.tracking_uri) == list(range(1, 13))
    run = mlflow_run(folder, config.tracking_uri)
    assert run.info.status == "FINISHED"
    assert run.data.tags["attempts"] == "2"

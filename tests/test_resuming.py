"""Runs that are cut, anywhere, and go on: on as many ranks to the bit, on others in the same order with the same loss."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cromss_dist.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from cromss_dist.errors import CheckpointError
from cromss_dist.tracking.store import connect
from tests.ranks import run_ranks
from tests.whole_runs import Trace, run_and_kill, start_folder, trace_of, traced_run

STEPS = 40


@pytest.fixture
def config(synthetic_shards: Path, store_uri: str) -> RunConfig:
    """A run of 40 steps of 4 samples, saved every third step, of networks that are as small as they can be."""
    epoch_steps = 9 / 4
    return RunConfig(
        data=DataConfig(shards=str(synthetic_shards), crop_px=32, val_fraction=0.25, val_seasons=(0,)),
        model=ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8)),
        loss=LossConfig(ramp_epochs=10),
        train=TrainConfig(
            epochs=STEPS / epoch_steps, lr=1e-3, validate_every_epochs=20 / epoch_steps, log_every_steps=1, panel_samples=1
        ),
        engine=EngineConfig(global_batch=4, device="cpu"),
        checkpoint=CheckpointConfig(every_epochs=3 / epoch_steps),
        tracking=TrackingConfig(uri=store_uri, register=False),
    )


def uninterrupted(folder: Path, config: RunConfig, world: int) -> tuple[Trace, bytes]:
    content = start_folder(folder, config)
    assert run_ranks(traced_run, world, folder, content) == [0] * world
    return trace_of(folder), (folder / "model.safetensors").read_bytes()


def check_kills(config: RunConfig, folder: Path, kills: int, steps_between: int, seed: int) -> None:
    whole, weights = uninterrupted(folder / "whole", config, 2)
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    draws = random.Random(seed)
    content = start_folder(folder / "cut", config)
    for _ in range(kills):
        run_and_kill(folder / "cut", content, 2, draws.randint(1, steps_between), draws)
    assert run_ranks(traced_run, 2, folder / "cut", content) == [0, 0]
    cut = trace_of(folder / "cut")
    assert cut.num_computed > STEPS, "no kill cost a step, so nothing was shown"
    assert cut.losses == whole.losses
    assert cut.ids == whole.ids
    assert (folder / "cut" / "model.safetensors").read_bytes() == weights


def test_a_run_killed_three_times_ends_with_the_weights_of_one_that_was_not(config: RunConfig, tmp_path: Path) -> None:
    check_kills(config, tmp_path, kills=3, steps_between=12, seed=0)


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_with_the_weights_of_one_that_was_not(config: RunConfig, tmp_path: Path) -> None:
    check_kills(config, tmp_path, kills=30, steps_between=6, seed=1)

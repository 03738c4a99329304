"""Replay bundles: exact, whole or not there, and damaged ones refused."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cromss_dist.config import BatchPlan, DataConfig, RunConfig
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.errors import CheckpointError, StorageError
from cromss_dist.parse import parse_run
from cromss_dist.train.safety.bundle import Bundle, Samples, has_room, read_bundle, write_bundle
from cromss_dist.world import World
from tests.ranks import run_ranks

CONFIG = RunConfig(seed=7)
WEIGHTS = {"conv.weight": torch.tensor([[1 / 3, math.nan], [-0.0, 1e-42]]), "norm.num_batches_tracked": torch.tensor(5)}
BUNDLE = Bundle(
    reason="loss is nan",
    step=123,
    samples_seen=976,
    progress_epochs=1 / 3,
    loss=math.nan,
    grad_norm=math.inf,
    weights_of="before",
    precision="bf16",
    device="some GPU",
    plan=BatchPlan(8, 2, 2, 2),
    datasets=("a" * 64,),
    samples=Samples(("one", "two"), (1, 2), (0, 1), (3, 2), (1.0, 0.0)),
)


def test_a_bundle_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, BUNDLE, CONFIG, WEIGHTS)
    assert folder == tmp_path / "replay" / "step-0000123"
    bundle, weights = read_bundle(folder)
    assert repr(bundle) == repr(BUNDLE)  # nan is not equal to itself
    assert {name: value.numpy().tobytes() for name, value in weights.items()} == {
        name: value.numpy().tobytes() for name, value in WEIGHTS.items()
    }
    assert parse_run(["--config", str(folder / "config.yaml")]).config == CONFIG
    json.loads((folder / "bundle.json").read_text(), parse_constant=pytest.fail)  # strict JSON


@pytest.mark.parametrize(("micro_batch", "accumulation_steps", "world_size"), [(8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 8, 1)])
@pytest.mark.parametrize("samples", [0, 8, 24])
def test_the_samples_of_a_step_are_those_of_all_ranks_rank_by_rank(
    synthetic_shards: Path, samples: int, micro_batch: int, accumulation_steps: int, world_size: int
) -> None:
    data = RunData.open(DataConfig(shards=str(synthetic_shards), window=4), seed=3)
    plan = BatchPlan(8, micro_batch, accumulation_steps, world_size)
    ids, seasons, epochs = [], [], []
    for rank in range(world_size):
        requests = data.train_plan(plan, rank).starting_at(samples).requests()
        for request in (next(requests) for _ in range(accumulation_steps)):
            ids += request.sample_ids.tolist()
            seasons += request.seasons.tolist()
            epochs += request.epochs.tolist()
    found = Samples.of(data.train_plan, plan, samples)
    assert (found.sample_ids, found.seasons, found.epochs) == (tuple(ids), tuple(seasons), tuple(epochs))
    assert found.keys == tuple(data.dataset.locations[i] for i in ids)
    assert found.weights == (1.0,) * 8


def test_a_bundle_of_the_same_step_is_replaced_and_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "replay" / ".step-0000123"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_text("half of it")
    for value in (1.0, 2.0):
        folder = write_bundle(tmp_path, BUNDLE, CONFIG, {"w": torch.tensor([value])})
    assert read_bundle(folder)[1]["w"].tolist() == [2.0]
    assert os.listdir(folder.parent) == [folder.name]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("name", ["bundle.json", "config.yaml", "weights.safetensors"])
@pytest.mark.parametrize("damage", [_flip, _truncate, _link, Path.unlink])
def test_a_damaged_bundle_is_refused(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = write_bundle(tmp_path, BUNDLE, CONFIG, WEIGHTS)
    damage(folder / name)
    with pytest.raises(CheckpointError, match=name):
        read_bundle(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '{"sha256": "", "content": {}}'])
def test_a_record_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_bundle(tmp_path, BUNDLE, CONFIG, WEIGHTS)
    (folder / "bundle.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"bundle\.json"):
        read_bundle(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_no_bundle_and_says_that_none_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(StorageError, match=r"No space left on device.*the run needs no bundle"):
        write_bundle(tmp_path, BUNDLE, CONFIG, WEIGHTS)
    assert os.listdir(tmp_path / "replay") == []


def ask_for_room(world: World, folder: Path) -> None:
    own = folder / f"seen-by-{world.rank}"  # a folder that only rank 0 fills, as on nodes that do not share it
    told = [has_room(own, 2, world)]
    for step in range(2):
        if world.is_main:
            (own / "replay" / f"step-{step}").mkdir(parents=True)
            (own / "replay" / f".step-{step}").mkdir(parents=True)
        told.append(has_room(own, 2, world))
    assert told == [True, True, False]


def test_all_ranks_agree_on_whether_there_is_room_for_a_bundle(tmp_path: Path) -> None:
    assert run_ranks(ask_for_room, 2, tmp_path) == [0, 0]

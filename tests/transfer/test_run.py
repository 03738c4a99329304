"""Whole transfer runs on real ranks: what they leave, that they go on to the bit, and what real tiles give."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import CheckpointError
from cromss_dist.models.downstream import DownstreamNetwork, EncoderSpec
from cromss_dist.parse import CONFIG_FILE, from_dict, write_yaml
from cromss_dist.schema import LABEL_ARRAY
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.run.spool import read_events
from cromss_dist.train.run.folder import WEIGHTS_FILE, write_weights
from cromss_dist.transfer.network import load_encoders, pin_encoders
from cromss_dist.transfer.results import SCORES_FILE, TILES_FILE, read_result, read_tiles
from cromss_dist.transfer.run import transfer
from cromss_dist.transfer.trained import EncoderOfRun, NetworkOfRun, load_transferred
from cromss_dist.world import World
from tests.ranks import run_ranks
from tests.tracking.registry.conftest import NAME, copy_registry
from tests.transfer.conftest import MakeTransfer, smallest_run
from tests.whole_runs import mlflow_run

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dw_real_mini"
BANDS = ("B2", "B3", "B4", "B8")  # all of one stored array, at 10 m
NETWORK = NetworkOfRun({"s2": EncoderOfRun("resnet18", 3, BANDS)}, "light", (8,), tuple("abcdefghi"))


def run_rank(world: World, run_dir: Path, config: dict[str, Any]) -> None:
    """A rank of a run."""
    transfer(from_dict(config, TransferConfig), run_dir)


def run_to_the_end(config: TransferConfig, folder: Path, world: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(config, folder / CONFIG_FILE)
    assert run_ranks(run_rank, world, folder, config.to_dict()) == [0] * world
    return folder


@pytest.fixture(scope="module")
def finished(
    template_registry: tuple[Path, str], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TransferConfig]:
    """The folder of a run of an encoder from a registry, with evidence, and its config."""
    folder = tmp_path_factory.mktemp("transfer")
    registry = copy_registry(template_registry, folder / "store")
    arguments = f"--encoder.s2 {NAME}@candidate --encoder.s2_bands [{','.join(BANDS)}] --task mine --evidence true"
    config = smallest_run(synthetic_shards, synthetic_shards, folder, *arguments.split(), "--tracking.uri", registry.uri)
    return run_to_the_end(pin_encoders(config), folder / "run"), pin_encoders(config)


def predictions_of(config: TransferConfig, weights: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of all test pixels, without loader, engine and evaluation."""
    dataset = open_dataset(config.data.test)
    network = DownstreamNetwork({"s2": EncoderSpec("resnet18", 3, len(BANDS))}, "light", 9, (8,)).eval()
    network.load_state_dict(load_file(weights))
    labels, predictions = [], []
    for sample_id in range(len(dataset.locations)):
        for season in range(4):
            arrays = {name: np.empty(dataset.shape(name), np.uint8) for name in ("s2_10m", LABEL_ARRAY)}
            dataset.read_into(sample_id, season, arrays)
            with torch.no_grad():
                (logits,) = network(torch.from_numpy(arrays["s2_10m"]).float()[None] / 255)
            labels.append(arrays[LABEL_ARRAY][season])
            predictions.append(logits[0].argmax(0).numpy())
    return np.stack(labels).ravel(), np.stack(predictions).ravel()


def test_scores_are_those_of_the_trained_network_as_scikit_learn_counts_them(finished: tuple[Path, TransferConfig]) -> None:
    run_dir, config = finished
    label, prediction = predictions_of(config, run_dir / WEIGHTS_FILE)
    result = read_result(run_dir)
    expected = confusion_matrix(label[label != 255], prediction[label != 255], labels=range(9))
    difference = np.abs(result.matrix - expected)
    assert difference.sum() <= 1e-4 * expected.sum()  # batches of another size round otherwise; ties may fall the other way
    assert read_tiles(result).total == result.confusion
    assert (result.steps, result.samples, result.tiles, result.labels.tiles) == (6, 24, 12, 12)
    assert (result.encoders["s2"].version, result.encoders["s2"].bands) == (f"{NAME}/1", BANDS)


def test_the_frozen_encoder_ends_as_it_began(finished: tuple[Path, TransferConfig]) -> None:
    run_dir, config = finished
    before = load_encoders(config)["s2"].spec.weights
    after = load_file(run_dir / WEIGHTS_FILE)
    assert before is not None
    assert all(torch.equal(after[f"encoders.s2.{name}"], value) for name, value in before.items())
    assert any(name.startswith("decoder.") for name in after)


def test_what_is_loaded_again_is_the_network_that_was_scored(finished: tuple[Path, TransferConfig], tmp_path: Path) -> None:
    run_dir = finished[0]
    copied = tmp_path / "anywhere.safetensors"
    shutil.copy(run_dir / WEIGHTS_FILE, copied)
    by_hand = DownstreamNetwork({"s2": EncoderSpec("resnet18", 3, len(BANDS))}, "light", 9, (8,)).eval()
    by_hand.load_state_dict(load_file(copied))
    images = torch.rand(2, len(BANDS), 32, 32)
    for place in (run_dir, copied):
        loaded = load_transferred(place)
        assert (loaded.bands, loaded.multiple, loaded.class_names) == ({"s2": BANDS}, 8, read_result(run_dir).class_names)
        assert not loaded.network.training
        with torch.no_grad():
            assert torch.equal(loaded.network(images)[0], by_hand(images)[0])


def test_what_is_no_network_of_a_transfer_run_is_refused(finished: tuple[Path, TransferConfig], tmp_path: Path) -> None:
    weights, told = load_file(finished[0] / WEIGHTS_FILE), json.dumps(asdict(NETWORK))
    with pytest.raises(CheckpointError, match=r"cannot be read: .* Give the folder of a transfer run"):
        load_transferred(tmp_path)
    for network, message in (
        ("", "is not of a transfer run"),
        ("[1", "Expecting"),
        (told.replace('"light"', '"heavy"'), "decoder='heavy' is not allowed"),
        (told.replace("resnet18", "resnet81"), "'resnet81' is unknown"),
        (told.replace("[8]", "[16]"), r"is \(8, 64, 1, 1\), expected \(16, 64, 1, 1\)"),
        (json.dumps(asdict(replace(NETWORK, encoders={}))), "equally many stages"),
    ):
        write_weights(tmp_path, weights, network)
        with pytest.raises(CheckpointError, match=message):
            load_transferred(tmp_path)
    write_weights(tmp_path, {name: value for name, value in weights.items() if "head" not in name}, told)
    with pytest.raises(CheckpointError, match=r"missing .*head"):
        load_transferred(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_transferred(tmp_path)


def test_figures_files_and_evidence_are_where_others_look(finished: tuple[Path, TransferConfig]) -> None:
    run_dir, config = finished
    result = read_result(run_dir)
    data = mlflow_run(run_dir, config.tracking.uri).data
    assert data.metrics["test/miou"] == result.scores.mean_iou
    assert {"train/loss/ce", "train/loss/dice", "train/loss/total", "train/accuracy"} <= data.metrics.keys()
    assert (run_dir / "panels" / "test.png").stat().st_size > 1000
    measured = Evidence.from_json((run_dir / "evidence.json").read_text())
    assert (measured.key, measured.value, measured.samples) == ("mine.frozen.miou", result.scores.mean_iou, 12)
    assert measured.low < measured.value < measured.high
    assert Registry(config.tracking.uri).resolve(f"{NAME}/1").evidence == {measured.key: measured}


def test_a_run_that_was_cut_ends_to_the_bit_as_if_it_had_not_been(finished: tuple[Path, TransferConfig], tmp_path: Path) -> None:
    whole, config = finished
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (last,) = (cut / "checkpoints").glob("*6")
    shutil.rmtree(last)
    for name in ("summary.json", SCORES_FILE, TILES_FILE, WEIGHTS_FILE):
        (cut / name).unlink()
    run_to_the_end(config, cut)
    assert (cut / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    assert read_tiles(read_result(cut)).confusion.tolist() == read_tiles(read_result(whole)).confusion.tolist()


def losses_of(run_dir: Path) -> list[float]:
    return [event["metrics"]["train/loss/total"] for event in read_events(run_dir, "progress")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_two_ranks_train_and_score_as_one(mode: str, make_transfer: MakeTransfer, tmp_path: Path) -> None:
    one, two = (run_to_the_end(make_transfer("--mode", mode), tmp_path / str(world), world) for world in (1, 2))
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-4)
    matrices = [read_result(run_dir).matrix for run_dir in (one, two)]
    assert np.abs(matrices[1] - matrices[0]).sum() <= 1e-2 * matrices[0].sum()
    assert read_tiles(read_result(two)).keys == read_tiles(read_result(one)).keys


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"real tiles are not at {REAL}")
def test_real_tiles_of_dynamic_world_give_a_result(encoder_package: Path, tmp_path: Path) -> None:
    train, test = (convert(open_archive(REAL, f"dw_{part}"), tmp_path / part).folder for part in ("train", "test"))
    arguments = ("--encoder.s2", str(encoder_package), "--task", "dw", "--engine.global_batch", "2", "--data.crop_px", "64")
    config = smallest_run(train, test, tmp_path, *arguments)
    result = read_result(run_to_the_end(config, tmp_path / "run"))
    label = np.empty((1, 512, 512), np.uint8)
    open_dataset(str(test)).read_into(0, 0, {LABEL_ARRAY: label})
    counts = np.bincount(label[label != 255], minlength=9)
    assert result.matrix.sum(1).tolist() == counts.tolist()  # every labelled pixel of a tile of 512 px, once
    assert (result.task, result.tiles, result.labels.tiles) == ("dw", 1, 2)
    assert not (tmp_path / "run" / "evidence.json").exists()  # one tile has no interval

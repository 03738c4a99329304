"""`cromss noise` and its verbs, as they are typed."""

import json
from pathlib import Path

import pytest

from cromss_dist.cli import main
from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.manifest import read_manifest
from cromss_dist.noise.segmenter import Segmenter
from tests.noise.conftest import Some, write_network


@pytest.fixture(scope="module")
def shards(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    some = Some(*vars(StoredArchive.of(synthetic_shards)).values())
    return convert(some, tmp_path_factory.mktemp("commands") / "shards").folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return write_network(tmp_path_factory.mktemp("network") / "run")


def test_labels_are_looked_at_summed_up_again_and_cleaned(
    shards: Path, network: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cube, cleaned = tmp_path / "noise", tmp_path / "cleaned"
    config = network.weights.with_name("config.yaml")
    given = ["--manifest", str(shards), "--workers", "1"]
    arguments = ["noise", "--weights", str(network.weights), "--config", str(config), *given, "--out", str(cube), "--panels", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "What the model thinks of the labels" in shown
    assert "How well wrong labels are found" in shown
    names = {path.name for path in cube.iterdir()}
    assert {"cube.zarr", "manifest.json", "summary.json", "classes.csv", "regions.csv", "worst.png"} <= names

    rule = ["--doubt-below", "0.3", "--drop"]
    assert main(["noise", "summary", str(cube), *given, *rule, "--panels", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not (cube / "worst.png").exists()
    assert told["rule"] == {"doubt_below": 0.3, "replace_above": 0.6, "drop": True}
    assert told == json.loads((cube / "summary.json").read_text())

    manifest = f"{shards}/manifest.json"
    assert main(["noise", "relabel", str(cube), "--manifest", manifest, "--out", str(cleaned), "--workers", "1", *rule]) == 0
    assert "3 of 3 locations have other labels" in capsys.readouterr().out
    assert read_manifest(cleaned)["origin"]["rule"] == told["rule"]
    dropped = read_manifest(cleaned)["class_counts"][0]["ignored"]
    assert dropped > 0
    assert main(["noise", "relabel", str(cube), *given, "--out", str(cleaned)]) == 4
    capsys.readouterr()
    assert main(["noise", "summary", str(cube), "--manifest", str(cleaned)]) == 2
    assert "give the dataset that the observatory looked at" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_trained_again_on_the_labels_that_it_cleaned(synthetic_shards: Path, tmp_path: Path) -> None:
    def pretrain(shards: Path, output: Path) -> Path:
        keys: dict[str, object] = {
            **{"output": output, "data.shards": shards, "data.crop_px": 64, "data.val_fraction": 0.25, "tracking.uri": "offline"},
            **{"model.encoder": "resnet18", "model.encoder_depth": 3, "model.decoder_channels": "[32,16,8]"},
            **{"engine.device": "cpu", "engine.global_batch": 4, "train.epochs": 1, "train.warmup_epochs": 0},
        }
        assert main(["pretrain", *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]) == 0
        (folder,) = output.glob("*/summary.json")
        return folder.parent

    first = pretrain(synthetic_shards, tmp_path / "first")
    cube, cleaned, given = tmp_path / "noise", tmp_path / "cleaned", ["--manifest", str(synthetic_shards), "--workers", "1"]
    assert main(["noise", "--run", str(first), *given, "--out", str(cube)]) == 0
    assert main(["noise", "relabel", str(cube), *given, "--out", str(cleaned), "--doubt-below", "0.1", "--drop"]) == 0
    before, after = (read_manifest(folder) for folder in (synthetic_shards, cleaned))
    assert after["num_samples"] == before["num_samples"]
    assert after["class_counts"][0]["ignored"] > before["class_counts"][0]["ignored"]

    second = pretrain(cleaned, tmp_path / "second")
    cards = [json.loads(card.read_text()) for card in second.glob("encoders/*/card.json")]
    assert len(cards) == 2
    assert all(read_manifest(cleaned)["digest"] in json.dumps(card) for card in cards)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --manifest DIR, --out DIR, and either --run RUN_DIR or --weights FILE"),
        (["--manifest", "x", "--out", "y", "--run", "r", "--weights", "w"], "either --run RUN_DIR or --weights FILE"),
        (["--manifest", "x", "--out", "y", "--weights", "w"], "--weights and --config belong together"),
        (["--manifest", "x", "--out", "y", "--run", "nowhere"], "has come to its end"),
        (["summary", "cube", "--manifest", "x", "--panels", "101"], "--panels 101 is not allowed"),
    ],
)
def test_wrong_arguments_end_with_2_and_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["noise", *arguments]) == 2
    assert message in capsys.readouterr().err

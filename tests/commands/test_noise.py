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

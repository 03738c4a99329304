"""`cromss plan` and `cromss probe` as they are typed."""

import json
from pathlib import Path

import pytest

from cromss_dist.cli import main
from tests.plan.machines import MACHINE, machine

SMALL = [
    "--model.encoder",
    "resnet18",
    "--model.encoder_depth",
    "3",
    "--model.decoder_channels",
    "[64,32,16]",
    "--data.crop_px",
    "64",
    "--engine.global_batch",
    "64",
]


@pytest.fixture
def profile(tmp_path: Path) -> list[str]:
    MACHINE.write(tmp_path / "profile.json")
    return ["--machine", str(tmp_path / "profile.json")]


def test_plan_prints_what_a_run_takes(profile: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", *SMALL, *profile, "--locations", "1280", "--nodes", "2", "--gpus", "4", "--price", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for words in (
        "2 nodes x 4 = 8",
        "64 = micro batch 8 x accumulation 1 x world 8",
        "square-root",
        "sums: batch norms",
        "cost",
        "!",
    ):
        assert words in printed


def test_plan_prints_json_of_data_that_is_here(
    profile: list[str], synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SMALL, "--data.shards", str(synthetic_shards), "--engine.global_batch", "4", "--launch.workers", "2"]
    assert main(["plan", *small, *profile, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["batch"] == {"global_batch": 4, "micro_batch": 2, "accumulation_steps": 1, "world_size": 2}
    assert told["steps_per_epoch"] == pytest.approx(11 / 4)
    assert told["num_shards"] == 1
    assert told["step_s"]["low"] < told["step_s"]["value"] < told["step_s"]["high"]
    assert [flag for flag in told["flags"] if "2.75 steps an epoch" in flag]


def test_plan_takes_the_nodes_of_a_cluster_and_a_network(profile: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ["--cluster.kind", "slurm", "--cluster.nodes", "4", "--cluster.gpus_per_node", "2", "--locations", "1280", "--json"]
    told = []
    for network in ([], ["--network-gbit", "80", "--network-us", "1"]):
        assert main(["plan", *SMALL, *profile, *cluster, *network]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert (told[0]["nodes"], told[0]["per_node"]) == (4, 2)
    assert told[1]["sums_s"]["gradients"] < told[0]["sums_s"]["gradients"]


def test_scaling_keeps_the_batch_or_that_of_a_rank(profile: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", *SMALL, *profile, "--locations", "1280", "--scaling", "8", "--json"]
    batches = []
    for way in ([], ["--weak", "16"]):
        assert main([*command, *way]) == 0
        plans = json.loads(capsys.readouterr().out)
        assert [plan["batch"]["world_size"] for plan in plans] == [1, 2, 4, 8]
        batches.append([plan["batch"]["global_batch"] for plan in plans])
    assert batches == [[64] * 4, [16, 32, 64, 128]]
    assert main(command[:-1]) == 0
    assert "device hours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--machine", "abacus"], "--machine=abacus is no profile"),
        (["--nodes", "0"], "--nodes=0"),
        (["--network-gbit", "1"], "go together"),
        (["--network-gbit", "0", "--network-us", "1"], "--network-gbit=0"),
        (["--engine.global_bach", "1"], "did you mean engine.global_batch"),
        (["--nodes", "3"], "divides over 1, 2, 4"),
    ],
)
def test_what_is_wrong_is_one_paragraph(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--locations", "100", *arguments]) in (2, 6)
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_probe_writes_the_profile_that_plan_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cromss_dist.plan.command.probe", lambda *_: machine(name="probed"))
    out = tmp_path / "profile.json"
    assert main(["probe", "--out", str(out), "--folder", str(tmp_path)]) == 0
    assert f"cromss plan --machine {out}" in capsys.readouterr().out
    assert main(["plan", *SMALL, "--machine", str(out), "--locations", "100"]) == 0
    assert "probed" in capsys.readouterr().out
    assert main(["probe", "--folder", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err

"""Whole runs through launch/pretrain.py: real Ray workers, DeepSpeed, MLflow and registry on a small synthetic archive."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cromss_dist import load_encoder
from cromss_dist.config import EngineConfig, LaunchConfig, RunConfig
from cromss_dist.data.store.index import open_shards
from cromss_dist.errors import BandError, ConfigError, main_guard
from cromss_dist.parse import parse_run
from cromss_dist.schema import NORMALISATION
from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.run.spool import read_events, run_id_of
from cromss_dist.tracking.store import connect
from launch import pretrain
from launch.elastic import num_workers
from tests.launch.conftest import ROOT, SMALL, Run, environment
from tests.ranks import run_ranks
from tests.whole_runs import start_folder, traced_run


@pytest.fixture(scope="session")
def finished(launch: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two Ray workers."""
    output = tmp_path_factory.mktemp("two workers")  # a path with a space
    done = launch(output)
    assert done.returncode == 0, done.stderr + done.stdout
    (summary,) = output.glob("*/summary.json")
    return summary.parent


def summary_of(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["event"] == kind]


def test_a_run_learns(finished: Path) -> None:
    summary = summary_of(finished)
    losses = [event["metrics"]["train/loss/total"] for event in events_of(finished, "progress")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2
    for key in ("val/reference_miou_s2", "val/miou_s2"):
        assert summary["after"][key] > summary["before"][key]


def test_the_mlflow_run_holds_params_metrics_data_and_pictures(finished: Path, synthetic_shards: Path) -> None:
    summary = summary_of(finished)
    client = connect(summary["tracking_uri"])
    run = client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.ramp_epochs"] == "5.0"
    assert run.data.tags["config_digest"] == parse_run([f"--config={finished / 'config.yaml'}"]).config.digest
    assert open_shards(synthetic_shards).digest in run.data.tags.values()
    assert run.inputs is not None
    assert run.inputs.dataset_inputs[0].dataset.digest == open_shards(synthetic_shards).digest[:36]
    progress = events_of(finished, "progress")
    for key in ("train/loss/total", "train/loss/segmentation_s1", "train/kept_s2", "perf/samples_per_s", "perf/data_wait_s"):
        history = client.get_metric_history(summary["run_id"], key)
        assert [point.step for point in history] == [event["step"] for event in progress]
        assert [point.value for point in history] == pytest.approx([event["metrics"][key] for event in progress])
    assert {"val/iou_s1/water", "val/miou_s2", "val/loss/total"} <= run.data.metrics.keys()
    names = {item.path for item in client.list_artifacts(summary["run_id"], "panels")}
    assert names == {f"panels/{path.name}" for path in (finished / "panels").glob("*.png")}
    assert len(names) >= 2


def test_both_encoders_are_registered_and_look_up_bit_equal(finished: Path, synthetic_shards: Path) -> None:
    summary = summary_of(finished)
    assert summary["registered"] == {"cromss-resnet18-s1": 1, "cromss-resnet18-s2": 1}
    weights = load_file(finished / "model.safetensors")
    for modality in ("s1", "s2"):
        encoder = load_encoder(f"cromss-resnet18-{modality}@candidate", tracking_uri=summary["tracking_uri"])
        state = encoder.encoder.state_dict()
        trained = {
            k.removeprefix(f"encoders.{modality}."): v for k, v in weights.items() if k.startswith(f"encoders.{modality}.")
        }
        assert state.keys() == trained.keys()
        assert all(torch.equal(state[key], value) for key, value in trained.items())
        assert encoder.card.normalisation == NORMALISATION[encoder.card.modality]
        assert encoder.card.run_id == run_id_of(finished)
        assert encoder.card.metrics[f"val/miou_{modality}"] == summary["after"][f"val/miou_{modality}"]
    assert not [value for value in encoder.card.recipe.values() if str(finished.parent) in value], "no folder of this machine"
    assert encoder.card.recipe["loss.ramp_epochs"] == "5.0"
    card, digest = encoder.card, open_shards(synthetic_shards).digest
    assert (card.method, card.dataset, card.origin, card.evidence) == ("cromss", synthetic_shards.name, {}, ())
    assert (card.manifest_digest, card.archive[f"{digest}.inputs"]) == (digest, "12")
    assert card.patch_px % card.input_multiple == 0
    with pytest.raises(BandError, match=r"takes 13 s2 bands, B1, B2"):
        load_encoder("cromss-resnet18-s2@candidate", bands=("VV", "VH"), tracking_uri=summary["tracking_uri"])


def test_ranks_that_ray_did_not_start_give_the_same_numbers(finished: Path, store_uri: str, tmp_path: Path) -> None:
    config = parse_run([f"--config={finished / 'config.yaml'}"]).config
    config = replace(config, tracking=replace(config.tracking, uri=store_uri, register=False))
    folder = tmp_path / "run"
    assert run_ranks(traced_run, 2, folder, start_folder(folder, config)) == [0, 0]
    curves, weights = [], []
    for run_dir in (finished, folder):
        steps = events_of(run_dir, "progress") + events_of(run_dir, "validation")
        curves.append([{k: v for k, v in e["metrics"].items() if not k.startswith("perf/")} for e in steps])
        weights.append(load_file(run_dir / "model.safetensors"))
    assert len(curves[0]) > 8
    assert curves[0] == curves[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_more_workers_than_gpus_are_refused_and_none_given_means_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert num_workers(RunConfig()) == 2
    assert num_workers(RunConfig(launch=LaunchConfig(workers=1))) == 1
    with pytest.raises(ConfigError, match=r"launch.workers=3 needs a GPU each, and this machine has 2"):
        num_workers(RunConfig(launch=LaunchConfig(workers=3)))
    assert num_workers(RunConfig(launch=LaunchConfig(workers=3), engine=EngineConfig(device="cpu"))) == 3


def processes_of(session: int) -> list[str]:
    """Command lines of the living processes that a launcher's process group and Ray's daemons belong to."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if f"CROMSS_TEST_SESSION={session}".encode() in variables and state != "Z":
            found.append((path / "cmdline").read_text().replace("\0", " "))
    return found


def test_ctrl_c_leaves_no_process_behind(synthetic_shards: Path, tmp_path: Path) -> None:
    mark = os.getpid()
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *SMALL, "--output", str(tmp_path)]
    command += ["--data.shards", str(synthetic_shards), "--train.epochs", "100000"]
    process = subprocess.Popen(
        command,
        env=environment() | {"CROMSS_TEST_SESSION": str(mark)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: any(events_of(path.parent, "progress") for path in tmp_path.glob("*/events.jsonl")), 240)
        assert len(processes_of(mark)) > 3, "driver, Ray and workers"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, out + err
        assert "Traceback" not in out + err
        wait_for(lambda: not processes_of(mark), 30)
        (events,) = tmp_path.glob("*/events.jsonl")
        assert events_of(events.parent, "end")[-1]["status"] == "KILLED"
        delivery = deliver(events.parent, f"sqlite:///{tmp_path}/mlflow.db")  # a slow machine did not get so far in 30 s
        assert connect(f"sqlite:///{tmp_path}/mlflow.db").get_run(str(delivery.run_id)).info.status == "KILLED"
    finally:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"CROMSS_TEST_SESSION={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    os.kill(int(path.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--engine.globl_batch", "4"], 2, "Unknown config key 'engine.globl_batch'; did you mean engine.global_batch"),
        (["--engine.global_batch", "15"], 6, "engine.global_batch=15 does not divide by accumulation 1 x world 2 = 2"),
        (["--data.shards", "/nowhere"], 15, "/nowhere is neither a folder nor a URL"),
        (["--data.crop_px", "128"], 2, "data.crop_px=128 is larger than the 96 px patches"),
        (["--model.encoder", "resnet19"], 2, "resnet1"),
        (["--engine.device", "cuda"], 2, "torch finds no GPU"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(
    synthetic_shards: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so engine.device=cuda is right here")
    fixed = [*SMALL, "--output", str(tmp_path / "runs"), "--data.shards", str(synthetic_shards)]
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", *fixed, *arguments])
    assert main_guard(pretrain.main) == code
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists(), "nothing half-written"


@pytest.mark.parametrize(
    "how",
    [("--launch.ray", "false", "--launch.workers", "1"), pytest.param((), marks=pytest.mark.slow)],
    ids=["in process", "Ray"],
)
def test_a_damaged_shard_ends_a_run_with_its_own_error(
    synthetic_shards: Path, tmp_path: Path, launch: Run, how: tuple[str, ...]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in synthetic_shards.iterdir():
        (shards / path.name).write_bytes(path.read_bytes())
    tar = next(shards.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    for place in range(len(content) // 4, len(content), 4096):  # sizes stay, so only reading finds it
        content[place] ^= 1
    tar.chmod(stat.S_IRUSR | stat.S_IWUSR)
    tar.write_bytes(content)
    done = launch(tmp_path / "runs", "--data.shards", str(shards), *how)
    assert done.returncode == 15, done.stderr
    assert "do not match their CRC-32C" in done.stderr
    (events,) = (tmp_path / "runs").glob("*/events.jsonl")
    delivery = deliver(events.parent, f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert connect(f"sqlite:///{tmp_path}/runs/mlflow.db").get_run(str(delivery.run_id)).info.status == "FAILED"
    assert "Traceback" not in done.stderr

"""Sweeps from their command: what is run, what is skipped, what failures cost, what is told."""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.errors import ConfigError, PreemptedError, main_guard
from cromss_dist.parse import ParsedRun, from_dict, parse_run_of
from cromss_dist.tracking.run.spool import Spool, read_events
from cromss_dist.train.safety.stop import request_stop
from cromss_dist.transfer.results import find_results, write_result
from launch import sweep as sweep_module
from launch import transfer
from launch.sweep import SweepConfig, cells_of
from tests.transfer.made_results import made_result, made_tiles

ROOT = Path(__file__).resolve().parents[2]
Typed = Callable[..., int]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of two random encoders and two seeds on an invented task."""
    keys = {
        "output": str(tmp_path / "sweep"),
        "tasks": {"mine": {"train": "a", "test": "b", "config": str(ROOT / "configs" / "transfer" / "dw.yaml")}},
        "encoders": {v: [{"init": "random", "name": "resnet18", "s2_bands": ["B4"]}] for v in ("one", "two")},
        "seeds": [0, 1],
        "against": "two",
        "workers": 0,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.fixture
def typed(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """The command on the sweep, with further arguments: its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["launch/transfer.py", f"--config={sweep}", *arguments])
        return main_guard(transfer.main)

    return run


class Stub:
    """Stands for the transfer runs."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.tiles = 12

    def __call__(self, parsed: ParsedRun[TransferConfig], console: Console) -> None:
        config, run_dir = parsed.config, parsed.resume
        assert run_dir is not None
        assert from_dict(yaml.safe_load((run_dir / "config.yaml").read_text()), TransferConfig) == config
        self.begun.append(config.name)
        if config.name in self.broken:
            raise self.broken[config.name]
        tiles = made_tiles(0.8 if config.variant == "one" else 0.6, number=self.tiles)
        steps = len(self.begun) if self.tiles == 1 else 400
        write_result(run_dir, made_result(tiles, seed=config.seed, variant=config.variant, task=config.task, steps=steps), tiles)
        (run_dir / "summary.json").touch()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(sweep_module, "run_in_process", made)
    return made


def test_a_sweep_runs_all_and_ends_with_figures_and_paired_differences(
    typed: Typed, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed() == 0
    assert stub.begun == [f"mine-{v}-frozen-all-s{s}" for s in (0, 1) for v in ("one", "two")]
    told = capsys.readouterr().out
    assert "4 runs in" in told
    assert "[4/4] mine-two-frozen-all-s1: mIoU " in told
    assert "one minus two, in points (mine, s2, frozen" in told
    assert "2 / 0 of 2" in told


def test_what_cannot_be_compared_is_told_and_the_sweep_is_done_all_the_same(
    typed: Typed, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.tiles = 1
    assert typed() == 0
    told = capsys.readouterr().out
    assert "there is one test tile, so that nothing can be said of others" in told
    assert "steps is 1 in one and 2 in the other" in told


def test_a_run_that_fails_stops_no_other_and_alone_runs_again(
    typed: Typed, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.broken = {"mine-one-frozen-all-s0": ConfigError("no such layer."), "mine-two-frozen-all-s1": ValueError("a bug")}
    assert typed() == 70
    told = capsys.readouterr()
    assert "[1/4] mine-one-frozen-all-s0: ConfigError: no such layer." in told.out
    assert "TrainingError: 2 of 4 runs failed: mine-one-frozen-all-s0: ConfigError: no such layer.; mine-two-" in told.err
    assert "The same command goes on" in told.err
    assert "no run of one side has the label seed" in told.out, "what failed leaves no pair"
    assert len(find_results([tmp_path / "sweep"])) == 2
    stub.broken, stub.begun = {}, []
    assert typed("--dry-run") == 0
    assert stub.begun == []
    assert Counter(re.findall(r"begun|done|waiting", capsys.readouterr().out)) == {"begun": 2, "done": 2}
    assert typed() == 0
    assert stub.begun == ["mine-one-frozen-all-s0", "mine-two-frozen-all-s1"]
    assert typed() == 0, "there is nothing to do, and the table again"
    assert len(stub.begun) == 2


def test_a_signal_to_a_run_stops_the_sweep_and_the_same_command_goes_on(
    typed: Typed, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.broken = {"mine-two-frozen-all-s0": PreemptedError("The run was asked to stop, and is saved.")}
    assert typed() == 75
    assert stub.begun == ["mine-one-frozen-all-s0", "mine-two-frozen-all-s0"]
    assert "3 of 4 runs are not done. The same command goes on" in capsys.readouterr().err
    stub.broken = {}
    assert typed() == 0
    assert stub.begun[2:] == ["mine-two-frozen-all-s0", "mine-one-frozen-all-s1", "mine-two-frozen-all-s1"]


def test_a_stop_file_in_the_folder_of_the_sweep_begins_no_further_run(
    typed: Typed, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_and_ask(parsed: ParsedRun[TransferConfig], console: Console) -> None:
        stub(parsed, console)
        request_stop(tmp_path / "sweep")

    monkeypatch.setattr(sweep_module, "run_in_process", run_and_ask)
    assert typed() == 75
    assert stub.begun == ["mine-one-frozen-all-s0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume", "somewhere"), "is no folder of a run"),
        (("--profile",), "--profile has no meaning for a sweep"),
        (("--cluster.kind", "slurm"), "cluster.kind='slurm' takes no sweep from here"),
        (
            ("--cluster.kind", "ray", "--cluster.ray.address", "http://127.0.0.1:8265"),
            "takes no sweep from here; give a Ray cluster",
        ),
        (("--cluster.kind", "ray"), "workers=0 runs in this process"),
        (("--seed", "3"), "Unknown config key 'seed'; did you mean seeds"),
    ],
)
def test_what_has_no_meaning_for_a_sweep_is_refused(
    typed: Typed, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(*arguments) == 2
    assert message in capsys.readouterr().err


def test_the_board_shows_what_runs_and_how_far_it_is(sweep: Path) -> None:
    cells = cells_of(parse_run_of(SweepConfig, [f"--config={sweep}"]).config)
    board = transfer.Board(cells)
    for cell in cells[:2]:
        cell.run_dir.mkdir(parents=True)
        (cell.run_dir / "config.yaml").touch()
    with Spool(cells[1].run_dir) as spool:
        spool.append("start", total_samples=200)
        spool.append("progress", step=1, samples=50, metrics={})
    table = board.table()
    assert [list(column.cells) for column in table.columns] == [[cells[0].name, cells[1].name], ["0%", "25%"]]
    assert table.caption == "2 begun, 2 waiting"


QUICK = """
tasks: {mine: {train: SHARDS, test: SHARDS, seasons: [0], config: QUICK_TASK}}
encoders:
  small: [{init: random, name: resnet18, depth: 3, s1_bands: [VV, VH]}]
  wrong: [{init: random, name: resnet99, depth: 3, s1_bands: [VV, VH]}]
modes: [linear, frozen]
"""
QUICK_TASK = """
decoder: light
decoder_channels: [8]
data: {crop_px: 32}
train: {epochs: 1, decay_epochs: 1, log_every_steps: 1, panel_samples: 1}
engine: {global_batch: 4, device: cpu}
tracking: {uri: offline}
"""


@pytest.mark.slow
def test_two_workers_of_ray_compute_what_one_process_does_and_survive_a_run_that_fails(
    synthetic_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "task.yaml").write_text(QUICK_TASK)
    path = tmp_path / "sweep.yaml"
    path.write_text(QUICK.replace("QUICK_TASK", str(tmp_path / "task.yaml")).replace("SHARDS", str(synthetic_shards)))
    found = {}
    for workers in ("0", "2"):
        command = [sys.executable, str(ROOT / "launch" / "transfer.py"), f"--config={path}", f"--workers={workers}"]
        ended = subprocess.run(
            [*command, "--output", str(tmp_path / workers)], capture_output=True, text=True, timeout=600, check=False
        )
        assert ended.returncode == 70, ended.stderr
        assert "2 of 4 runs failed" in ended.stderr
        assert "resnet99' is unknown" in ended.stdout
        found[workers] = [(r.mode, r.confusion) for r in find_results([tmp_path / workers])]
    assert len(found["0"]) == 2
    assert found["0"] == found["2"]


@pytest.mark.slow
def test_a_signal_to_a_sweep_on_ray_saves_what_runs_and_the_same_command_goes_on(synthetic_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(QUICK_TASK.replace("epochs: 1,", "epochs: 200,"))
    path, output = tmp_path / "sweep.yaml", tmp_path / "sweep"
    path.write_text(QUICK.replace("QUICK_TASK", str(tmp_path / "task.yaml")).replace("SHARDS", str(synthetic_shards)))
    command = [sys.executable, str(ROOT / "launch" / "transfer.py"), f"--config={path}", f"--output={output}"]
    command += ["--workers=1", "--modes=[frozen]", "--seeds=[0,1]"]
    run_dir = output / "mine-small-frozen-all-s0"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sweep:
        while not (run_dir / "events.jsonl").exists() or not list(read_events(run_dir, "progress")):
            assert sweep.poll() is None
            time.sleep(0.2)
        sweep.send_signal(signal.SIGTERM)
        _, errors = sweep.communicate(timeout=300)
    assert sweep.returncode == 75, errors
    assert "The sweep was asked to stop; 4 of 4 runs are not done." in errors
    assert [folder.name for folder in output.iterdir() if folder.is_dir()] == [run_dir.name]
    (saved,) = read_events(run_dir, "stopping")
    again = subprocess.run(
        [*command, "--encoders={small: [{init: random, name: resnet18, depth: 3, s1_bands: [VV, VH]}]}", "--seeds=[0]"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    (resumed,) = read_events(run_dir, "resumed")
    assert resumed["step"] == saved["step"]

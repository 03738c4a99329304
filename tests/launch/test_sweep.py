"""The grid of a sweep: which runs it is made of, and how far each is."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cromss_dist.config.transfer import EncoderConfig, TransferConfig
from cromss_dist.errors import ConfigError
from cromss_dist.parse import from_dict, parse_run_of, write_yaml
from cromss_dist.transfer.results import SCORES_FILE
from launch import sweep as sweep_module
from launch.sweep import Cell, SweepConfig, cells_of

ROOT = Path(__file__).resolve().parents[2]


def sweep_of(output: Path, **keys: Any) -> SweepConfig:
    """Two random encoders on one task."""
    values: dict[str, Any] = {
        "output": str(output),
        "tasks": {"dw": {"train": "a", "test": "b"}},
        "encoders": {name: [{"init": "random", "name": name, "s2_bands": ["B4"]}] for name in ("resnet18", "resnet34")},
    }
    return from_dict(values | keys, SweepConfig)


def test_a_sweep_is_every_combination_once_with_all_labels_drawn_once(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path, modes=["frozen", "linear"], fractions=[1.0, 0.1], per_class=[5], label_seeds=[0, 1, 2], seeds=[0, 7]
    )
    cells = cells_of(sweep)
    labels = Counter((c.config.labels.fraction, c.config.labels.per_class, c.config.labels.seed) for c in cells)
    assert labels == dict.fromkeys([(1.0, None, 0), *((0.1, None, s) for s in range(3)), *((1.0, 5, s) for s in range(3))], 8)
    assert Counter((c.config.variant, c.config.mode, c.config.seed) for c in cells) == dict.fromkeys(
        [(v, m, s) for v in ("resnet18", "resnet34") for m in ("frozen", "linear") for s in (0, 7)], 7
    )
    assert len({c.name for c in cells}) == len(cells) == 56
    assert cells[0].name == "dw-resnet18-frozen-all-s0"
    assert cells[1].name == "dw-resnet34-frozen-all-s0", "what is compared runs one after another"


def test_a_cell_is_the_tasks_config_with_the_changes_of_the_sweep(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, changes={"train.epochs": 3, "data.crop_px": 64, "tracking.uri": "offline"}, cpus=2)
    config = cells_of(sweep)[1].config
    of_task = parse_run_of(
        TransferConfig,
        [
            f"--config={ROOT / 'configs/transfer/dw.yaml'}",
            "--encoder.init=random",
            "--encoder.name=resnet34",
            "--encoder.s2_bands=[B4]",
        ],
    ).config
    assert config.decoder == of_task.decoder
    assert config.data == replace(of_task.data, train=str(Path("a").absolute()), test=str(Path("b").absolute()), crop_px=64)
    assert config.encoder == of_task.encoder
    assert (config.task, config.variant, config.train.epochs, config.launch.cpus_per_worker) == ("dw", "resnet34", 3.0, 2)


def test_replicates_are_told_apart(tmp_path: Path) -> None:
    encoder = {"init": "random", "name": "resnet18", "s2_bands": ["B4"]}
    cells = cells_of(sweep_of(tmp_path, encoders={"one": [encoder, encoder]}))
    assert [(c.name, c.config.replicate) for c in cells] == [("dw-one-frozen-all-s0-r0", 0), ("dw-one-frozen-all-s0-r1", 1)]


def test_all_runs_of_an_encoder_have_the_version_that_its_alias_means_when_the_sweep_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[EncoderConfig] = []

    def pin(config: TransferConfig) -> TransferConfig:
        asked.append(config.encoder)
        return replace(config, encoder=replace(config.encoder, s2=f"mine/{len(asked)}"))

    monkeypatch.setattr(sweep_module, "pin_encoders", pin)
    cells = cells_of(
        sweep_of(tmp_path, encoders={"a": [{"s2": "mine@best"}], "b": [{"s2": "mine@best", "init": "random"}]}, seeds=[0, 1])
    )
    assert [c.config.encoder.s2 for c in cells] == ["mine/1", "mine/2"] * 2


def test_how_far_a_run_is_is_seen_from_its_folder(tmp_path: Path) -> None:
    cell = cells_of(sweep_of(tmp_path))[0]
    assert str(cell.state) == "waiting"
    cell.check()
    cell.run_dir.mkdir()
    write_yaml(cell.config, cell.run_dir / "config.yaml")
    assert str(cell.state) == "begun"
    (cell.run_dir / SCORES_FILE).touch()
    assert str(cell.state) == "begun", "without the summary its store may lack something"
    (cell.run_dir / "summary.json").touch()
    assert str(cell.state) == "done"
    cell.check()
    Cell(replace(cell.config, tracking=replace(cell.config.tracking, uri="offline"))).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "unet"}, "decoder was deeplabv3plus and is unet"),
        ({"train.epochs": 3}, r"trained otherwise.*train.epochs 50\.0 -> 3\.0"),
    ],
    ids=["another run", "another length"],
)
def test_a_folder_of_another_sweep_is_not_taken_for_a_cell(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before, now = (cells_of(sweep_of(tmp_path, changes=of))[0] for of in ({}, changes))
    before.run_dir.mkdir()
    write_yaml(before.config, before.run_dir / "config.yaml")
    with pytest.raises(ConfigError, match=f"{message}.*(Give another output|remove the folder)"):
        now.check()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modes": []}, "modes=\\(\\) is not allowed; give one or more"),
        ({"seeds": [1, 1]}, "seeds=\\(1, 1\\) is not allowed"),
        ({"fractions": []}, "fractions=\\(\\) is not allowed; give one or more, or per_class"),
        ({"encoders": {"a-b": [{}]}}, "encoders='a-b' is not allowed; name each with letters"),
        ({"encoders": {"a": []}}, "encoders.a=\\(\\) is not allowed"),
        ({"against": "nobody"}, "against='nobody' is not allowed; give one of the encoders"),
        ({"changes": {"seed": 3}}, "changes.seed is what the sweep itself sets"),
        ({"changes": {"data.train": "x"}}, "changes.data.train is what the sweep itself sets"),
        ({"changes": {"train.epoch": 3}}, "Unknown config key 'train.epoch'; did you mean train.epochs"),
        ({"tasks": {"mine": {"train": "a", "test": "b"}}}, "tasks.mine.config: .*mine.yaml is not there"),
        ({"gpus": -1}, "gpus=-1.0 is not allowed"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells_of(sweep_of(tmp_path, **keys))


def test_the_shipped_sweep_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "pin_encoders", lambda config: config)
    path = ROOT / "configs" / "sweep.yaml"
    cells = cells_of(parse_run_of(SweepConfig, [f"--config={path}"]).config)
    assert len(cells) == 2 * 2 * (1 + 3)
    assert {c.config.decoder for c in cells} == {"deeplabv3plus"}
    assert yaml.safe_load(path.read_text())["against"] in {c.config.variant for c in cells}

"""What of a config makes another run, for every kind of run."""

from dataclasses import replace
from pathlib import Path

import pytest

from cromss_dist.config import BaseRunConfig, RunConfig
from cromss_dist.config.transfer import EncoderConfig, TransferConfig
from cromss_dist.errors import CheckpointError
from cromss_dist.train.run.continuation import changes_of
from cromss_dist.train.run.folder import SUMMARY_FILE, read_summary

PRETRAINING = RunConfig()
TRANSFER = TransferConfig(encoder=EncoderConfig(s2="resnet@candidate"))


@pytest.mark.parametrize("config", [PRETRAINING, TRANSFER], ids=["pretraining", "transfer"])
def test_length_and_place_may_change(config: BaseRunConfig) -> None:
    longer = replace(
        config, name="longer", train=replace(config.train, epochs=300.0), engine=replace(config.engine, zero_stage=2)
    )
    assert changes_of(config.to_dict(), config) == []
    assert set(changes_of(config.to_dict(), longer)) == {
        f"train.epochs {config.train.epochs} -> 300.0",
        "engine.zero_stage 0 -> 2",
    }


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        (PRETRAINING, replace(PRETRAINING, seed=1), "seed"),
        (TRANSFER, replace(TRANSFER, seed=1), "seed"),
        (PRETRAINING, replace(PRETRAINING, model=replace(PRETRAINING.model, fusion="late")), "model.fusion"),
        (PRETRAINING, replace(PRETRAINING, data=replace(PRETRAINING.data, crop_px=64)), "data.crop_px"),
        (TRANSFER, replace(TRANSFER, data=replace(TRANSFER.data, crop_px=64)), "data.crop_px"),
        (TRANSFER, replace(TRANSFER, decoder="fpn"), "decoder"),
        (TRANSFER, replace(TRANSFER, labels=replace(TRANSFER.labels, fraction=0.5)), "labels.fraction"),
    ],
)
def test_what_decides_networks_samples_and_loss_may_not(old: BaseRunConfig, new: BaseRunConfig, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"of another config: {key} was"):
        changes_of(old.to_dict(), new)


def test_data_may_have_moved() -> None:
    moved = replace(TRANSFER, data=replace(TRANSFER.data, train="/elsewhere"))
    assert changes_of(TRANSFER.to_dict(), moved) == ["data.train train -> /elsewhere"]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"run_dir": 1, "new": 2}'])
def test_what_a_finished_run_left_is_whole_or_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / SUMMARY_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"summary\.json was damaged .* Remove it"):
        read_summary(tmp_path)

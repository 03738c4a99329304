"""The proof as a whole, at the size of a minute; its detectors; what differs between its runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.method.__main__ import check_work, main
from benchmarks.method.detection import suspicion
from benchmarks.method.findings import common_classes
from benchmarks.method.plan import RANDOM, SETTINGS, SIZES, VARIANTS, Transfer, pretraining_of
from benchmarks.method.pretraining import config_of as pretraining_config
from benchmarks.method.transfer import config_of as transfer_config
from cromss_dist.errors import ConfigError
from cromss_dist.schema import CLASS_NAMES

FULL = SIZES["full"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pretrainings_of_a_seed_differ_in_loss_and_labels_alone(variant: str, tmp_path: Path) -> None:
    ours, other = (pretraining_config(tmp_path, FULL, pretraining_of(name, 1)) for name in (variant, "cromss"))
    same = replace(ours, name=other.name, loss=other.loss, data=replace(ours.data, shards=other.data.shards))
    assert same == other
    assert Path(str(ours.data.shards)).name == ("clean" if variant == "clean" else "default")
    assert ours.loss.ramp_epochs == pytest.approx(0.4 * ours.train.epochs)


def test_transfers_of_a_setting_differ_in_the_encoder_alone(tmp_path: Path) -> None:
    of = [transfer_config(tmp_path, FULL, Transfer(variant, 1, SETTINGS[0], 2)) for variant in ("cromss", "plain", RANDOM)]
    first = of[0]
    assert all(replace(config, name=first.name, variant=first.variant, encoder=first.encoder) == first for config in of)
    assert (first.seed, first.labels.seed, first.labels.fraction * FULL.labelled_places) == (1, 2, 8)
    assert first.encoder.s2 == str(tmp_path / "pretraining" / "cromss-1" / "encoders" / "s2")
    assert of[2].encoder.init == "random"


def test_suspicion_is_what_is_left_of_the_confidence_in_the_label() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.1, 0.9]])[:, None, :, None, None]  # two branches, one season, two classes, one pixel
    label = np.ones((1, 1, 1), np.uint8)
    told = {name: float(score.item()) for name, score in suspicion(probs, label).items()}
    agreed = 0.4 * 0.9
    expected = {"s1": 0.6, "s2": 0.1, "refined_s1": 1 - (0.4 + agreed) / 2, "refined_s2": 1 - (0.9 + agreed) / 2, "both": 0.35}
    assert told == pytest.approx(expected)


def test_common_classes_are_frequent_wherever_they_are_learnt_or_scored() -> None:
    many, few = dict.fromkeys(CLASS_NAMES, 0.1), dict.fromkeys(CLASS_NAMES, 0.1) | {"snow": 0.039}
    assert set(CLASS_NAMES) - set(common_classes([many, few])) == {"snow"}


def test_a_folder_is_of_one_size(tmp_path: Path) -> None:
    check_work(tmp_path, FULL)
    check_work(tmp_path, FULL)
    with pytest.raises(ConfigError, match="another size"):
        check_work(tmp_path, replace(FULL, steps=1))


@pytest.mark.slow
def test_the_smoke_size_runs_whole_and_its_exit_code_is_that_of_its_gates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(tmp_path / "work"), "--size", "smoke", "--out", str(tmp_path / "out")])
    (written,) = (tmp_path / "out").glob("method-smoke-*.json")
    told = json.loads(written.read_text())
    assert code == (0 if all(gate["holds"] for gate in told["gates"]) else 1)
    # Such short runs rank nothing, but a segmenter knows more of a label than chance does.
    found = told["detection"]["cromss-0"]["refined_s2"]["overall"]
    assert found["average_precision"] > found["base_rate"] + 0.1
    dropped = told["relabelling"]["cromss-0"]["drop"]
    assert dropped["noise_after"] < dropped["noise_before"] == pytest.approx(found["base_rate"])
    assert len(told["transfer"]) == len(SIZES["smoke"].settings)
    assert "## Paired differences" in written.with_suffix(".md").read_text()
    assert written.with_suffix(".png").stat().st_size > 10_000

    capsys.readouterr()
    assert main([str(tmp_path / "work"), "--size", "smoke"]) == code
    assert " of " not in capsys.readouterr().err  # nothing was run again

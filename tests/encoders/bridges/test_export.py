"""`cromss registry export`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cromss_dist.cli import main
from cromss_dist.encoders.load import load_encoder


def test_a_file_for_chosen_bands_has_the_weights_of_these(
    encoder_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rgb.safetensors"
    assert main(["registry", "export", str(encoder_package), str(file), "--to", "timm", "--bands", "B4,B3,B2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["file"], said["to"], said["bands"]) == (str(file), "timm", ["B4", "B3", "B2"])
    whole = load_encoder(encoder_package).encoder.state_dict()["conv1.weight"]
    assert torch.equal(load_file(file)["conv1.weight"], whole[:, [3, 2, 1]])


def test_the_verb_reaches_every_form(
    encoder_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []
    record: Callable[..., None] = lambda encoder, *rest: asked.append((encoder.bands[0], *rest))  # noqa: E731
    monkeypatch.setattr("cromss_dist.encoders.bridges.onnx.export_onnx", record)
    monkeypatch.setattr("cromss_dist.encoders.bridges.plain.write_state_dict", record)
    for form in ("onnx", "state_dict", "torchvision"):
        assert main(["registry", "export", str(encoder_package), str(tmp_path / form), "--to", form]) == 0
    assert asked == [
        ("B1", tmp_path / "onnx"),
        ("B1", tmp_path / "state_dict", "state_dict"),
        ("B1", tmp_path / "torchvision", "torchvision"),
    ]
    assert "it takes B1, B2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--to", "torchvision"), 2, "no twin in torchvision"),
        (("--to", "timm", "--bands", "B4,B99"), 21, "B99"),
        (("--to", "state_dict"), 4, "exists already"),
    ],
)
def test_refusals_have_codes_of_their_own(
    arguments: tuple[str, ...], code: int, said: str, encoder_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "there"
    if code == 4:
        target.touch()
    assert main(["registry", "export", str(encoder_package), str(target), *arguments]) == code
    assert said in capsys.readouterr().err
    assert not target.exists() or not target.read_bytes()

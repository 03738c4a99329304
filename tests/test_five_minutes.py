"""The page for who wants an encoder: every block of it runs, in its order."""

import contextlib
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cromss_dist.cli import main
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.models.encoder import build_encoder
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.registry.registry import Registry
from tests.conftest import MakeCard
from tests.tracking.registry.conftest import new_run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "five-minutes.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
MODEL = "land-s2-rgbn"
RGBN = ("B2", "B3", "B4", "B8")


def registered(registry: Registry, folder: Path, name: str, card: EncoderCard, alias: str, miou: float) -> None:
    """An encoder of random weights, with a figure of its own."""
    figure = Evidence("dw", "miou", "frozen", miou, miou - 0.01, miou + 0.01, "made up", runs=3, manifest_digest="f" * 64)
    package_encoder(folder, build_encoder("resnet18", 4, card.in_channels), replace(card, evidence=(figure,)))
    registry.register(folder, name, new_run(registry.uri), alias=alias)


def test_every_block_of_the_page_runs_as_it_is_written(
    store_uri: str, make_card: MakeCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(store_uri)
    s1, s2 = make_card("resnet18", 4, "s1"), make_card("resnet18", 4)
    rgbn = replace(s2, bands=RGBN, in_channels=4, normalisation=s2.normalisation.select(RGBN))
    registered(registry, tmp_path / "a", MODEL, rgbn, "champion", 0.55)
    registered(registry, tmp_path / "b", MODEL, rgbn, "candidate", 0.61)
    registered(registry, tmp_path / "c", "land-s1", s1, "champion", 0.44)
    monkeypatch.setenv("CROMSS_TRACKING_URI", store_uri)
    monkeypatch.setenv("CROMSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    told = ""
    for language, block in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            if language == "python":
                exec(compile(block, str(PAGE), "exec"), names)
            else:
                for command in block.strip().splitlines():
                    program, *arguments = shlex.split(command)
                    assert program == "cromss"
                    assert main(arguments) == 0, command
        told += output.getvalue()

    # What the page says came true.
    assert names["encoder"].card.evidence[0].value == 0.55
    assert [tuple(m.shape[-2:]) for m in names["maps"]] == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert names["rgb"].bands == ("B4", "B3", "B2")
    assert torch.equal(names["trunk"].eval()(names["x"])[-1], names["maps"][-1])
    assert (tmp_path / "encoder.onnx").is_file()
    assert (tmp_path / "encoder_weights.safetensors").is_file()
    assert registry.resolve(f"{MODEL}@champion").version == 1, "promoted, then rolled back"
    assert "three seeds, same test set" in told


def test_the_page_has_blocks_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    assert len(BLOCKS) > 8

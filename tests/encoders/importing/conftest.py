"""States that the look-alikes are made of, and a way to save them."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cromss_dist.encoders.importing import import_encoder
from cromss_dist.models.encoder import build_encoder
from tests.encoders.importing.look_alikes import State, resnet_state

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def s1_state() -> State:
    return resnet_state(2, seed=1)


@pytest.fixture(scope="session")
def s2_state() -> State:
    return resnet_state(13, seed=2)


_built = cache(build_encoder)


@pytest.fixture(autouse=True)
def _each_encoder_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing random weights that the import replaces takes longer than the import."""

    def build(name: str, depth: int, in_channels: int) -> nn.Module:
        return copy.deepcopy(_built(name, depth, in_channels))

    monkeypatch.setattr(import_encoder, "build_encoder", build)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a checkpoint as PyTorch does, and returns its path."""

    def write(content: Any, name: str = "checkpoint.pth") -> Path:
        path = tmp_path / name
        torch.save(content, path)
        return path

    return write

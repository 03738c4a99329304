"""States that the look-alikes are made of, and a way to save them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoders.importing.look_alikes import State, resnet_state

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def s1_state() -> State:
    return resnet_state(2, seed=1)


@pytest.fixture(scope="session")
def s2_state() -> State:
    return resnet_state(13, seed=2)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a checkpoint as PyTorch does, and returns its path."""

    def write(content: Any, name: str = "checkpoint.pth") -> Path:
        path = tmp_path / name
        torch.save(content, path)
        return path

    return write

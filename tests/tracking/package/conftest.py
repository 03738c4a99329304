"""A package whose tensors are a few bytes: what is checked without a network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import Package, write_package

STATE = {"conv.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "norm.count": torch.tensor(7)}
GOLDEN = {"input": torch.arange(4, dtype=torch.uint8), "stage_1": torch.tensor([0.5])}


@pytest.fixture
def package(tmp_path: Path, make_card: Callable[..., EncoderCard]) -> Path:
    """The folder of such a package, the test's own."""
    write_package(tmp_path / "package", Package(make_card(), STATE, GOLDEN))
    return tmp_path / "package"

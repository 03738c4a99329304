"""A package whose tensors are a few bytes: what is checked without a network."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import Package, write_package

STATE = {"conv.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "norm.count": torch.tensor(7)}
GOLDEN = {"input": torch.arange(4, dtype=torch.uint8), "stage_1": torch.tensor([0.5])}


@pytest.fixture(scope="session")
def _written(tmp_path_factory: pytest.TempPathFactory, make_card: Callable[..., EncoderCard]) -> Path:
    folder = tmp_path_factory.mktemp("small") / "package"
    write_package(folder, Package(make_card(), STATE, GOLDEN))
    return folder


@pytest.fixture
def package(_written: Path, tmp_path: Path) -> Path:
    """The folder of such a package, the test's own."""
    return shutil.copytree(_written, tmp_path / "package")

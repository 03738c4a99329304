"""An encoder that every route takes, and its features as `PretrainedEncoder` gives them."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cromss_dist.encoders.golden import package_encoder
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.models.encoder import build_encoder
from cromss_dist.tracking.package.card import EncoderCard
from tests.encoders.bridges.clean import Reference


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory, make_card: Callable[..., EncoderCard]) -> Path:
    """A resnet18 of all five stages on 13 bands, with statistics of BatchNorm that are not the first ones. Read only."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 5, 13)
    encoder(torch.rand(2, 13, 64, 64))  # in training mode
    folder = tmp_path_factory.mktemp("bridges") / "s2"
    package_encoder(folder, encoder, make_card("resnet18", 5))
    return folder


@pytest.fixture(scope="session")
def _loaded(package: Path) -> PretrainedEncoder:
    return load_encoder(package)


@pytest.fixture
def encoder(_loaded: PretrainedEncoder) -> PretrainedEncoder:
    """The encoder of `package`."""
    return copy.deepcopy(_loaded)  # loading computes golden patches


@pytest.fixture(scope="session")
def reference(_loaded: PretrainedEncoder, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Features of `package` on one thread, as the clean processes compute them."""
    image = torch.rand(2, 13, 64, 64, generator=torch.Generator().manual_seed(1))
    file = tmp_path_factory.mktemp("image") / "image.npy"
    np.save(file, image.numpy())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        maps = copy.deepcopy(_loaded).eval()(image)
    torch.set_num_threads(threads)
    return Reference(image, maps, file)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of a convolution may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

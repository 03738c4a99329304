"""A random network, and what the observatory sees with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cromss_dist.config import DataConfig, ModelConfig, RunConfig
from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.shards import sample_bytes
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.noise.observatory import Observatory, observe, open_observations
from cromss_dist.noise.segmenter import Segmenter
from cromss_dist.parse import write_yaml

MODEL = ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8))  # 96 px divides by 8
NUM_LOCATIONS = 3
S2 = ("B4", "B3", "B2", "B8", "B11")


class Some(StoredArchive):
    """The first locations of a dataset."""

    @property
    def keys(self) -> tuple[str, ...]:
        return super().keys[:NUM_LOCATIONS]


def write_network(folder: Path, seed: int = 0, model: ModelConfig = MODEL) -> Segmenter:
    """Random weights, sharpened so that they are sure of something, and their config."""
    torch.manual_seed(seed)
    network = TwoBranchUNet(model, 2, len(S2))
    for head in network.heads.values():
        for parameter in head.parameters():
            parameter.data *= 30
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    write_yaml(RunConfig(data=DataConfig(s2_bands=S2, crop_px=64), model=model), folder / "config.yaml")
    return Segmenter.of_file(folder / "model.safetensors", folder / "config.yaml")


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return write_network(tmp_path_factory.mktemp("network") / "run")


@pytest.fixture(scope="session")
def dataset(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredArchive:
    """Three synthetic locations with truth, in two shards. Read only."""
    some = Some(*vars(StoredArchive.of(synthetic_shards)).values())
    size_mib = 2.5 * sample_bytes(some.spec) / 2**20
    return StoredArchive.of(convert(some, tmp_path_factory.mktemp("dataset") / "shards", shard_size_mib=size_mib).folder)


@pytest.fixture(scope="session")
def observations(dataset: StoredArchive, segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> StoredArchive:
    """The cube of them. Read only."""
    out = tmp_path_factory.mktemp("noise") / "cube"
    observe(Observatory(dataset, segmenter), out)
    return open_observations(out)

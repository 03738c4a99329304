import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cromss_dist.encoders.bridges.torchgeo import torchgeo_weights
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.errors import ConfigError
from tests.encoders.bridges.clean import SAVE, TORCHVISION, Reference, run_clean

OF_A_USER = (
    TORCHVISION
    + SAVE
    + """
import torchgeo.models
from cromss_dist import load_encoder
from cromss_dist.encoders.bridges.torchgeo import torchgeo_weights

weights = torchgeo_weights(load_encoder(sys.argv[1]))
model = torchgeo.models.resnet18(weights=weights, features_only=True)
save(model.eval()(image()))
whole = torchgeo.models.resnet18(weights=weights, num_classes=9)
assert whole(weights.transforms(1000 * image())).shape == (2, 9)

from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask
for task in (
    SemanticSegmentationTask("unet", "resnet18", weights=weights, in_channels=13, task="multiclass", num_classes=9),
    ClassificationTask("resnet18", weights=weights, in_channels=13, task="multiclass", num_classes=9),
):
    own = weights.get_state_dict()
    held = getattr(task.model, "encoder", task.model).state_dict()
    assert all(torch.equal(held[key], tensor) for key, tensor in own.items())
"""
)


@pytest.mark.slow
def test_torchgeos_own_models_and_trainers_take_the_weights(package: Path, reference: Reference, tmp_path: Path) -> None:
    run_clean(OF_A_USER, package, reference.image_file, tmp_path / "maps.npz")
    assert reference.equals(tmp_path / "maps.npz")


def test_an_entry_says_what_torchgeos_entries_say(encoder: PretrainedEncoder) -> None:
    weights = torchgeo_weights(encoder)
    assert weights.name == "RESNET18_SENTINEL2_13B_CROMSS"
    assert {"dataset", "in_chans", "model", "publication", "repo", "ssl_method", "bands"} <= weights.meta.keys()
    assert (weights.meta["in_chans"], weights.meta["bands"]) == (13, list(encoder.bands))
    assert weights.url.startswith("urn:")  # nothing can fetch it
    values = np.random.default_rng(0).uniform(0, 9_000, (2, 13, 8, 8)).astype(np.float32)
    assert torch.equal(weights.transforms(torch.from_numpy(values)), encoder.normalise(values))


def test_each_reading_gives_a_dictionary_of_its_own_with_the_weights_as_they_were(encoder: PretrainedEncoder) -> None:
    weights = torchgeo_weights(encoder)
    weights.get_state_dict(progress=True).clear()
    before = encoder.encoder.get_parameter("conv1.weight").detach().clone()
    encoder.encoder.get_parameter("conv1.weight").data.zero_()  # it trains on
    assert weights.get_state_dict().keys() == encoder.encoder.state_dict().keys()
    assert torch.equal(weights.get_state_dict()["conv1.weight"], before)


def test_what_torchgeo_has_not_is_said(
    encoder_package: Path, encoder: PretrainedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="depth 3 has no twin in torchvision or TorchGeo"):
        torchgeo_weights(load_encoder(encoder_package))
    monkeypatch.setitem(sys.modules, "torchgeo", None)
    with pytest.raises(ConfigError, match=r"torchgeo not found.*pip install 'cromss-dist\[torchgeo\]'"):
        torchgeo_weights(encoder)

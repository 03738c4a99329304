import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor  # type: ignore[import-untyped]

from cromss_dist.encoders.bridges.torchvision import RESNETS, to_torchvision
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.errors import ConfigError
from tests.encoders.bridges.clean import Reference

LARGE = [name for name in RESNETS if "101" in name or "152" in name]
NODES = {"relu": "0", "layer1": "1", "layer2": "2", "layer3": "3", "layer4": "4"}


def test_features_of_torchvisions_model_are_bit_equal(encoder: PretrainedEncoder, reference: Reference) -> None:
    model = to_torchvision(encoder)
    assert model.training  # as any new module
    with torch.no_grad():
        maps = create_feature_extractor(model.eval(), NODES)(reference.image)
        assert all(torch.equal(a, b) for a, b in zip(maps.values(), reference.maps, strict=True))
        assert torch.equal(model(reference.image), reference.maps[-1].mean((2, 3), keepdim=True).flatten(1))


def test_a_classifier_of_it_trains(encoder: PretrainedEncoder, reference: Reference) -> None:
    model = to_torchvision(encoder, classes=9)
    logits = model(reference.image)
    assert logits.shape == (2, 9)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.conv1.weight.data_ptr() != encoder.encoder.get_submodule("conv1").get_parameter("weight").data_ptr()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in RESNETS])
def test_each_named_encoder_is_torchvisions_layer_by_layer(name: str) -> None:
    from segmentation_models_pytorch.encoders import get_encoder  # type: ignore[import-untyped]
    from torchvision.models import get_model  # type: ignore[import-untyped]

    with torch.device("meta"):
        theirs: nn.Module = get_model(name, weights=None)
        ours: nn.Module = get_encoder(name, depth=5, weights=None)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items() if not key.startswith("fc.")}
    assert shapes == {key: tensor.shape for key, tensor in ours.state_dict().items()}
    # Not all of a layer shows in its shapes: stride, dilation, groups.
    assert str(theirs.get_submodule("layer3")) == str(ours.get_submodule("layer3"))


def test_an_encoder_with_fewer_stages_is_refused(encoder_package: object) -> None:
    with pytest.raises(ConfigError, match=r"'resnet18' of depth 3 has no twin in torchvision.*of depth 5 have.*to_timm"):
        to_torchvision(load_encoder(str(encoder_package)))

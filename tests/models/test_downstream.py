"""Encoders under smp's decoders: what stays as it was, what is drawn, what is refused."""

import copy
from typing import get_args

import pytest
import segmentation_models_pytorch as smp  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from cromss_dist.errors import ConfigError, PackageError
from cromss_dist.models.downstream import DecoderName, DownstreamNetwork, EncoderSpec, Freeze, input_multiple
from cromss_dist.models.encoder import build_encoder

DECODERS: tuple[DecoderName, ...] = get_args(DecoderName)
SMP = {"unet": "unet", "fpn": "fpn", "deeplabv3plus": "deeplabv3plus", "pspnet": "pspnet"}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """An encoder that could have been trained: its batch norms have statistics."""
    torch.manual_seed(7)
    encoder = build_encoder("resnet18", 5, 3)
    with torch.no_grad():
        encoder(torch.rand(4, 3, 64, 64))
    return encoder.eval()


def network(decoder: DecoderName, weights: dict[str, Tensor] | None, freeze: Freeze = "none", seed: int = 0) -> DownstreamNetwork:
    torch.manual_seed(seed)
    return DownstreamNetwork({"s2": EncoderSpec("resnet18", 5, 3, weights)}, decoder, 4, freeze=freeze)


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_are_of_the_inputs_size_down_to_the_smallest_multiple(decoder: DecoderName) -> None:
    for depth in (3, 5):
        multiple = input_multiple(decoder, depth)
        assert multiple == {"deeplabv3plus": min(16, 2**depth), "pspnet": 8}.get(decoder, 2**depth)
        model = DownstreamNetwork({"s1": EncoderSpec("resnet18", depth, 2)}, decoder, 4).eval()
        (logits,) = model(torch.rand(1, 2, 3 * multiple, 2 * multiple))
        assert logits.shape == (1, 4, 3 * multiple, 2 * multiple)


@pytest.mark.parametrize("decoder", SMP)
def test_a_network_computes_what_smps_does(decoder: DecoderName, trained: nn.Module) -> None:
    ours = network(decoder, trained.state_dict()).eval()
    theirs = smp.create_model(SMP[decoder], "resnet18", encoder_weights=None, in_channels=3, classes=4).eval()
    state = {f"encoder.{key}": value for key, value in ours.encoders["s2"].state_dict().items()}
    state |= {f"decoder.{key}": value for key, value in ours.decoder.state_dict().items()}
    state |= {f"segmentation_head.{key}": value for key, value in ours.head.state_dict().items()}
    unknown = theirs.load_state_dict(state, strict=False).unexpected_keys
    assert not unknown
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)[0], theirs(images), rtol=0, atol=0)


def train_a_step(model: DownstreamNetwork) -> None:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model.train()
    (logits,) = model(torch.rand(2, 3, 64, 64))
    logits.square().mean().backward()
    optimizer.step()


def test_what_is_frozen_stays_to_the_bit(trained: nn.Module) -> None:
    before = copy.deepcopy(trained.state_dict())
    stays: dict[Freeze, tuple[bool, bool]] = {"all": (True, True), "weights": (True, False), "none": (False, False)}
    for freeze, (weights_stay, statistics_stay) in stays.items():
        model = network("light", trained.state_dict(), freeze)
        train_a_step(model)
        after = model.encoders["s2"].state_dict()
        weights = [name for name, _ in trained.named_parameters()]
        statistics = [name for name in before if name.endswith("running_mean")]
        assert all(torch.equal(before[name], after[name]) for name in weights) == weights_stay
        assert all(torch.equal(before[name], after[name]) for name in statistics) == statistics_stay
        assert {module.training for module in model.encoders.modules()} == {freeze != "all"} | (
            {True} if freeze == "none" else set()
        )
        assert model.decoder.training


def test_decoders_of_one_seed_are_equal_whatever_the_encoder(trained: nn.Module) -> None:
    pretrained, random = network("light", trained.state_dict()), network("light", None)
    for part in ("decoder", "head"):
        first, second = (getattr(model, part).state_dict() for model in (pretrained, random))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(next(network("light", None, seed=1).decoder.parameters()), next(random.decoder.parameters()))


def test_dilated_stages_have_the_weights_that_they_were_trained_with(trained: nn.Module) -> None:
    dilated = network("deeplabv3plus", trained.state_dict()).encoders["s2"].state_dict()
    assert all(torch.equal(dilated[name], value) for name, value in trained.state_dict().items())
    shallow = network("pspnet", trained.state_dict()).encoders["s2"].state_dict()
    assert not any(name.startswith(("layer3", "layer4")) for name in shallow)


def test_of_two_encoders_the_decoder_sees_both() -> None:
    torch.manual_seed(0)
    specs = {"s2": EncoderSpec("resnet18", 3, 4), "s1": EncoderSpec("resnet18", 3, 2)}
    model = DownstreamNetwork(specs, "light", 4).eval()  # type: ignore[arg-type]
    assert model.modalities == ("s1", "s2")
    s1, s2 = torch.rand(1, 2, 32, 32), torch.rand(1, 4, 32, 32)
    with torch.no_grad():
        (both,) = model(s1, s2)
        assert not torch.equal(both, model(s1 + 1, s2)[0])
        assert not torch.equal(both, model(s1, s2 + 1)[0])
    counts = model.parameter_counts()
    assert list(counts) == ["s1", "s2", "decoder"]
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_what_cannot_be_built_is_refused() -> None:
    s2 = EncoderSpec("resnet18", 3, 4)
    with pytest.raises(ConfigError, match=r"equally many stages; resnet18 of s1 has 4, resnet18 of s2 has 3"):
        DownstreamNetwork({"s1": EncoderSpec("resnet18", 4, 2), "s2": s2}, "unet", 4)
    with pytest.raises(ConfigError, match=r"decoder_channels=\(8,\) does not fit decoder 'unet'; give 3 numbers"):
        DownstreamNetwork({"s2": s2}, "unet", 4, (8,))
    with pytest.raises(ConfigError, match="decoder='fpn' takes four stages"):
        DownstreamNetwork({"s2": EncoderSpec("tu-convnext_atto", 4, 4)}, "fpn", 4)
    with pytest.raises(PackageError, match="weights do not fit"):
        DownstreamNetwork({"s2": EncoderSpec("resnet18", 3, 4, {})}, "unet", 4)

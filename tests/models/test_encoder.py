from dataclasses import dataclass

import pytest
import segmentation_models_pytorch as smp  # type: ignore[import-untyped]
import torch
from segmentation_models_pytorch.encoders import get_encoder  # type: ignore[import-untyped]
from torch import Tensor, nn

from cromss_dist.errors import ConfigError, PackageError
from cromss_dist.models.encoder import build_encoder, load_strictly, stage_channels, stage_features, to_smp, to_timm

ENCODERS = [
    ("resnet18", 3),
    ("resnet50", 5),
    ("tu-convnext_atto", 4),
    ("tu-resnet18", 5),
    ("efficientnet-b0", 3),
    ("efficientnet-b0", 5),
]


@dataclass
class Pair:
    """An encoder as smp builds it, and ours from the same seed."""

    whole: nn.Module
    cut: nn.Module
    random_state: tuple[Tensor, Tensor]  # of torch's generator after building each


@pytest.fixture(scope="module", params=ENCODERS, ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request: pytest.FixtureRequest) -> Pair:
    name, depth = request.param
    torch.manual_seed(0)
    whole = get_encoder(name, in_channels=13, depth=depth, weights=None)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    cut = build_encoder(name, depth, 13)
    assert cut.training
    return Pair(whole.eval(), cut.eval(), (state, torch.get_rng_state()))


def test_every_parameter_of_an_encoder_gets_a_gradient(pair: Pair) -> None:
    total = torch.stack([feature.sum() for feature in stage_features(pair.cut, torch.rand(1, 13, 64, 64))]).sum()
    gradients = torch.autograd.grad(total, list(pair.cut.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def test_cutting_changes_no_feature_and_draws_no_random_number(pair: Pair) -> None:
    assert torch.equal(*pair.random_state)
    own = pair.whole.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in pair.cut.state_dict().items())  # statistics of BatchNorm included
    x = torch.rand(2, 13, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(pair.whole(x), pair.cut(x), strict=True))


def test_channels_and_strides_describe_the_feature_maps(pair: Pair) -> None:
    channels, strides = stage_channels(pair.cut)
    with torch.no_grad():
        maps = stage_features(pair.cut, torch.rand(1, 13, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // s, 64 // s) for c, s in zip(channels, strides, strict=True)]


def test_unused_stages_of_resnet18_are_gone() -> None:
    # By hand: conv1 13*64*49 + bn1 128 + layer1 4 convs 64*64*9 + 4 norms 128
    # + layer2: 64*128*9 + 3 * 128*128*9 + 64*128 + 5 norms 256.
    expected = 13 * 64 * 49 + 128 + 4 * 64 * 64 * 9 + 4 * 128 + 64 * 128 * 9 + 3 * 128 * 128 * 9 + 64 * 128 + 5 * 256
    encoder = build_encoder("resnet18", 3, 13)
    assert sum(p.numel() for p in encoder.parameters()) == expected
    assert {key.split(".")[0] for key in encoder.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}


@pytest.mark.parametrize(("name", "depth"), [("resnet18", 3), ("resnet50", 5), ("tu-convnext_atto", 4)])
def test_timm_features_are_bit_equal(name: str, depth: int) -> None:
    encoder = build_encoder(name, depth, 13).eval()
    twin = to_timm(name, depth, 13, encoder.state_dict()).eval()
    x = torch.rand(2, 13, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(twin(x), stage_features(encoder, x), strict=True))


def test_an_encoder_without_a_twin_in_timm_says_what_to_do() -> None:
    state = build_encoder("efficientnet-b0", 3, 2).state_dict()
    with pytest.raises(ConfigError, match=r"efficientnet-b0.*no twin in timm.*to_smp"):
        to_timm("efficientnet-b0", 3, 2, state)


@pytest.mark.parametrize(
    ("decoder", "options"), [("Unet", {"decoder_channels": (32, 16, 16, 8, 8)}), ("FPN", {}), ("PSPNet", {"encoder_depth": 3})]
)
def test_smp_features_are_bit_equal(decoder: str, options: dict[str, object]) -> None:
    encoder = build_encoder("resnet18", 5, 13).eval()
    model = to_smp("resnet18", 5, 13, encoder.state_dict(), decoder, 4, **options).eval()
    x = torch.rand(2, 13, 64, 64)
    with torch.no_grad():
        got = stage_features(model.get_submodule("encoder"), x)
        assert all(torch.equal(a, b) for a, b in zip(got, stage_features(encoder, x)[: len(got)], strict=True))
        assert model(x).shape == (2, 4, 64, 64)
    assert len(got) == options.get("encoder_depth", 5)


@pytest.mark.parametrize("decoder", ["Unet", "UnetPlusPlus", "Linknet", "MAnet"])
def test_smp_decoders_take_encoders_of_fewer_stages(decoder: str) -> None:
    state = build_encoder("resnet18", 4, 2).state_dict()
    with torch.no_grad():
        assert to_smp("resnet18", 4, 2, state, decoder, 3).eval()(torch.rand(1, 2, 64, 64)).shape == (1, 3, 64, 64)


def test_a_dilated_smp_encoder_keeps_the_weights() -> None:
    encoder = build_encoder("resnet18", 5, 2).eval()
    model = to_smp("resnet18", 5, 2, encoder.state_dict(), "DeepLabV3Plus", 9).eval()
    reference = smp.DeepLabV3Plus("resnet18", encoder_weights=None, in_channels=2, classes=9).eval()
    reference.load_state_dict(model.state_dict())
    reference.encoder.load_state_dict(encoder.state_dict())
    x = torch.rand(1, 2, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))


def test_smp_conversion_refuses_what_it_cannot_give() -> None:
    state = build_encoder("resnet18", 3, 2).state_dict()
    with pytest.raises(ConfigError, match=r"encoder_depth=5 exceeds the 3 stages"):
        to_smp("resnet18", 3, 2, state, "Unet", 2, encoder_depth=5)
    with pytest.raises(ConfigError, match=r"decoder='Unett'"):
        to_smp("resnet18", 3, 2, state, "Unett", 2)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet5", "resnet50"), ("tu-convnext_attoo", "tu-convnext_atto"), ("timm-regnetx_002", "tu-")]
)
def test_an_unknown_encoder_gets_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near) as caught:
        build_encoder(name, 5, 2)
    assert repr(name) in str(caught.value)


def test_an_encoder_that_needs_a_fixed_input_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be built with depth 4.*Choose another encoder or depth"):
        build_encoder("tu-swin_tiny_patch4_window7_224", 4, 2)


def test_an_encoder_that_needs_its_unused_stages_is_refused_before_it_trains() -> None:
    with pytest.raises(ConfigError, match="does not work without the stages that its depth leaves unused"):
        build_encoder("tu-hrnet_w18_small", 3, 2)  # adds up maps of all resolutions


def test_loading_names_keys_and_shapes_that_do_not_fit() -> None:
    encoder = build_encoder("resnet18", 3, 2)
    state = encoder.state_dict()
    with pytest.raises(PackageError, match=r"1 missing \['bn1.bias'\]"):
        load_strictly(encoder, {key: tensor for key, tensor in state.items() if key != "bn1.bias"})
    with pytest.raises(PackageError, match=r"1 unknown \['fc.bias'\]"):  # smp's own loader drops this key in silence
        load_strictly(encoder, state | {"fc.bias": torch.zeros(1)})
    with pytest.raises(PackageError, match=r"conv1.weight is \(64, 13, 7, 7\), expected \(64, 2, 7, 7\)"):
        load_strictly(encoder, build_encoder("resnet18", 3, 13).state_dict())

import pytest
import segmentation_models_pytorch as smp  # type: ignore[import-untyped]
import torch
from torch import nn

from cromss_dist.config import ModelConfig
from cromss_dist.errors import ConfigError
from cromss_dist.models.two_branch import TwoBranchUNet

SMALL = (16, 8, 8)


def build(fusion: str, encoder: str = "resnet18", depth: int = 3) -> TwoBranchUNet:
    return TwoBranchUNet(ModelConfig(fusion, encoder, depth, SMALL if depth == 3 else (32, 16, 16, 8, 8)[:depth]), 2, 13)  # type: ignore[arg-type]


def gradients(model: nn.Module, loss: torch.Tensor) -> set[str]:
    """Names of the parameters that a gradient reaches."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {n for n, g in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True) if g is not None}


@pytest.mark.parametrize("fusion", ["middle", "late"])
@pytest.mark.parametrize(("encoder", "depth"), [("resnet18", 3), ("tu-convnext_atto", 4), ("efficientnet-b0", 5)])
def test_logits_have_the_input_size_and_every_parameter_a_gradient(fusion: str, encoder: str, depth: int) -> None:
    model = build(fusion, encoder, depth)
    logits_s1, logits_s2 = model(torch.rand(2, 2, 64, 96), torch.rand(2, 13, 64, 96))
    assert logits_s1.shape == logits_s2.shape == (2, 9, 64, 96)
    assert gradients(model, logits_s1.sum() + logits_s2.square().sum()) == {name for name, _ in model.named_parameters()}


def test_middle_fusion_shares_decoder_and_head_and_nothing_else() -> None:
    model = build("middle")
    images = torch.rand(1, 2, 32, 32), torch.rand(1, 13, 32, 32)
    by_s1 = gradients(model, model(*images)[0].sum())
    by_s2 = gradients(model, model(*images)[1].sum())
    shared = {name for name, _ in model.named_parameters() if name.startswith(("decoders.shared.", "heads.shared."))}
    assert by_s1 & by_s2 == shared
    assert all(name.startswith("encoders.s1.") for name in by_s1 - shared)
    assert all(name.startswith("encoders.s2.") for name in by_s2 - shared)


def test_late_fusion_shares_nothing() -> None:
    model = build("late")
    images = torch.rand(1, 2, 32, 32), torch.rand(1, 13, 32, 32)
    by_s1 = gradients(model, model(*images)[0].sum())
    by_s2 = gradients(model, model(*images)[1].sum())
    assert not by_s1 & by_s2
    assert len({p.data_ptr() for p in model.parameters()}) == len(by_s1) + len(by_s2)


@pytest.mark.parametrize("fusion", ["middle", "late"])
def test_each_branch_is_smps_unet_bit_for_bit(fusion: str) -> None:
    model = build(fusion).eval()
    images = {"s1": torch.rand(2, 2, 64, 64), "s2": torch.rand(2, 13, 64, 64)}
    logits = dict(zip(("s1", "s2"), model(**images), strict=True))
    for modality, x in images.items():
        unet = smp.Unet("resnet18", 3, None, decoder_channels=SMALL, in_channels=x.shape[1], classes=9).eval()
        name = "shared" if fusion == "middle" else modality
        left = unet.encoder.load_state_dict(model.encoders[modality].state_dict(), strict=False)
        unet.decoder.load_state_dict(model.decoders[name].state_dict())
        unet.segmentation_head.load_state_dict(model.heads[name].state_dict())
        assert left is None or not left.unexpected_keys
        assert torch.equal(unet(x), logits[modality])


def test_no_parameter_has_two_names() -> None:
    for fusion in ("middle", "late"):
        state = build(fusion).state_dict()
        assert len({tensor.data_ptr() for tensor in state.values() if tensor.numel() > 1}) == sum(
            t.numel() > 1 for t in state.values()
        )


def test_counts_add_up() -> None:
    middle, late = build("middle"), build("late")
    for model in (middle, late):
        counts = model.parameter_counts()
        assert counts.total == sum(p.numel() for p in model.parameters())
        assert counts.encoder_s2 - counts.encoder_s1 == (13 - 2) * 64 * 7 * 7  # they differ in the first convolution
    assert 2 * middle.parameter_counts().decoder == late.parameter_counts().decoder


@pytest.mark.parametrize(("height", "width"), [(60, 64), (64, 60)])
def test_a_side_that_does_not_divide_is_refused(height: int, width: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"{height} x {width} px does not divide by 2 \*\* model.encoder_depth = 8; set data.crop_px"
    ):
        build("late")(torch.rand(1, 2, height, width), torch.rand(1, 13, height, width))

"""The golden patch: a fixed input whose features travel with the weights, so that loading proves the encoder right.

Hashes say that the bytes arrived; the golden patch says that this build of the network, on this machine, computes what
the trained one did. B batch, C bands, H rows, W columns.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from cromss_dist.errors import PackageError
from cromss_dist.models.encoder import PROBE_PX, stage_channels, stage_features
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import Package, write_package

INPUT = "input"
# Of a stage's largest magnitude. Other thread counts and kernels of a CPU change features by less than 1e-5 of it
# (docs/registry.md); a wrong weight, band order or layer by more than 1e-2.
TOLERANCE = 1e-4


def golden_patch(in_channels: int) -> Tensor:
    """The golden patch of encoders of so many bands.

    Args:
        in_channels: C.

    Returns:
        uint8 (1, C, 64, 64): ((c + 1) (31 y + 17 x) + x y) mod 256, another pattern in each band.
    """
    band_C11, y_H1, x_W = torch.arange(in_channels)[:, None, None], torch.arange(PROBE_PX)[:, None], torch.arange(PROBE_PX)
    return (((band_C11 + 1) * (31 * y_H1 + 17 * x_W) + x_W * y_H1) % 256).to(torch.uint8)[None]


def golden_features(encoder: nn.Module) -> dict[str, Tensor]:
    """What the golden patch becomes: computed in float32, in evaluation mode, on the CPU.

    Args:
        encoder: From `build_encoder`, float32, on the CPU; its mode is as before afterwards.

    Returns:
        `input` as in `golden_patch`, and `stage_1`, ...: float32 (1, channels, 64 / stride, 64 / stride).
    """
    training = {module: module.training for module in encoder.modules()}
    patch = golden_patch(_in_channels(encoder))
    # What surrounds the call must not change the figures: mixed precision, above all.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        features = stage_features(encoder.eval(), patch.float() / 255)
    for module, mode in training.items():
        module.training = mode
    return {INPUT: patch} | {f"stage_{k}": feature for k, feature in enumerate(features, 1)}


def check_golden(encoder: nn.Module, golden: dict[str, Tensor]) -> None:
    """Raises PackageError unless the encoder makes of the golden patch what its package says.

    Args:
        encoder: With the package's weights, float32, on the CPU.
        golden: Of the package.
    """
    own = golden_features(encoder)
    stated, built = ({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} for tensors in (golden, own))
    if stated != built:
        raise PackageError(f"The golden features are {_said(golden)}, this encoder has {_said(own)}. Fetch the package again.")
    if not torch.equal(golden[INPUT], own[INPUT]):
        raise PackageError("The golden patch is not the one that packages have; it was changed. Fetch the package again.")
    for name in sorted(own.keys() - {INPUT}):
        if not torch.isfinite(golden[name]).all():  # of infinity, any difference is a small part
            raise PackageError(f"The golden features are not finite: {name}; they were changed. Fetch the package again.")
        largest = float(golden[name].abs().max())
        difference = float((own[name] - golden[name]).abs().max())
        if not difference <= TOLERANCE * largest:  # NaN, too
            raise PackageError(
                f"The encoder does not compute what it did when it was packaged: on the golden patch, {name} differs by "
                f"{difference:.3g}; allowed are {TOLERANCE:g} of its largest value, {largest:.3g}. The weights are not this "
                "encoder's, or this version of torch, timm or segmentation-models-pytorch builds another network; compare "
                "with `versions` on the card."
            )


def package_encoder(folder: Path, encoder: nn.Module, card: EncoderCard) -> EncoderCard:
    """Writes the package of an encoder: its weights, its card, and what it makes of the golden patch.

    Args:
        folder: Must not exist; appears whole or not at all.
        encoder: From `build_encoder`, float32, on the CPU.
        card: About it; `files` and `tensors_sha256` are filled in here.

    Returns:
        The card as written.

    Raises:
        OutputExistsError: `folder` is there already.
        PackageError: the card is of another encoder, or the features are not finite.
    """
    check_stages(encoder, card)
    golden = golden_features(encoder)
    for name, tensor in golden.items():
        if not torch.isfinite(tensor).all():
            raise PackageError(f"The encoder's features are not finite: {name} of the golden patch. It is of no use to anyone.")
    return write_package(folder, Package(card, encoder.state_dict(), golden))


def check_stages(encoder: nn.Module, card: EncoderCard) -> None:
    """Raises PackageError unless bands, channels and strides of an encoder are those on its card."""
    built = (_in_channels(encoder), *stage_channels(encoder))
    if built != (card.in_channels, card.out_channels, card.strides):
        raise PackageError(
            f"The card states bands, channels and strides {(card.in_channels, card.out_channels, card.strides)}, the encoder "
            f"has {built}."
        )


def _in_channels(encoder: nn.Module) -> int:
    return int(encoder._in_channels)  # type: ignore[arg-type]  # smp has no other name; `out_channels[0]` of a VGG is a map's


def _said(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in sorted(tensors.items()))

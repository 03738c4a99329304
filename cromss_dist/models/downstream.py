"""A network for a downstream task: one encoder or two under a new decoder.

B batch, K classes, H rows, W columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import SegmentationHead  # type: ignore[import-untyped]
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head  # type: ignore[import-untyped]
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder  # type: ignore[import-untyped]
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder  # type: ignore[import-untyped]
from segmentation_models_pytorch.decoders.pspnet.decoder import PSPDecoder  # type: ignore[import-untyped]
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder  # type: ignore[import-untyped]
from torch import Tensor, nn

from cromss_dist.errors import ConfigError
from cromss_dist.models.encoder import build_encoder, load_strictly
from cromss_dist.schema import MODALITIES, Modality

DecoderName: TypeAlias = Literal["deeplabv3plus", "fpn", "pspnet", "unet", "light"]
Freeze: TypeAlias = Literal["none", "all", "weights"]

# smp's defaults, which the published experiments took: widths of the decoders, dropout, dilation of DeepLabv3+.
_DEFAULT_CHANNELS: dict[DecoderName, tuple[int, ...]] = {
    "deeplabv3plus": (256,),
    "fpn": (256, 128),
    "pspnet": (512,),
    "unet": (256, 128, 64, 32, 16),
    "light": (128,),
}
_PSP_DEPTH = 3
_DEEPLAB_STRIDE = 16


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder as a downstream network takes it.

    Args:
        name: Encoder name of segmentation-models-pytorch, `tu-<timm name>` included.
        depth: Stages that it has.
        in_channels: Number of input bands.
        weights: Its state; None leaves it random.
    """

    name: str
    depth: int
    in_channels: int
    weights: Mapping[str, Tensor] | None = None


class DownstreamNetwork(nn.Module):
    """Encoders under one decoder of segmentation-models-pytorch and a head; the decoder is new, whatever the encoders are.

    Of two encoders the feature maps of equal stride are put side by side, S1 before S2, so that the decoder is that of one
    encoder with as many channels as both. `light` is 1 x 1 convolutions alone: each stage is brought to one width, upsampled
    and added up, so that the encoder has to carry the result.

    The random numbers that are drawn do not depend on whether encoders have weights: with one seed all get the same decoder.

    Args:
        encoders: By modality; at least one.
        decoder: Which one.
        num_classes: K.
        channels: Widths: of 'unet' a block each stage, of 'fpn' pyramid and segmentation, of the others one; None is smp's.
        freeze: 'all' keeps the encoders as they are, batch norms included, which stay in evaluation mode for ever; 'weights'
            keeps their weights alone, while batch norms go on normalising by the batch and moving their statistics.

    Raises:
        ConfigError: an encoder is unknown or cannot be had under this decoder, two do not go together, or the widths do not fit.

    Reference: CromSS, section V-A: DeepLabv3+, FPN and PSPNet on frozen and fine-tuned encoders of one modality.
    Departs: 'all' is what frozen means; the published code does 'weights' (see `transfer/evaluate.py`).
    """

    def __init__(
        self,
        encoders: Mapping[Modality, EncoderSpec],
        decoder: DecoderName,
        num_classes: int,
        channels: tuple[int, ...] | None = None,
        freeze: Freeze = "none",
    ) -> None:
        super().__init__()
        self.modalities: tuple[Modality, ...] = tuple(m for m in MODALITIES if m in encoders)
        depths = {_used_depth(decoder, encoders[m].depth) for m in self.modalities}
        if len(depths) != 1:
            told = ", ".join(f"{encoders[m].name} of {m} has {encoders[m].depth}" for m in self.modalities)
            raise ConfigError(f"Encoders under one decoder need equally many stages; {told}. Choose two of the same depth.")
        (self.depth,) = depths
        self.freeze = freeze
        self.encoders = nn.ModuleDict({m: _built(encoders[m], decoder, self.depth) for m in self.modalities})
        per_encoder: list[tuple[int, ...]] = [tuple(self.encoders[m].out_channels) for m in self.modalities]  # type: ignore[arg-type]
        stages = [sum(of_stage) for of_stage in zip(*per_encoder, strict=True)]
        if freeze != "none":
            self.encoders.requires_grad_(False)
        vgg = any(encoders[m].name.startswith("vgg") for m in self.modalities)
        self.decoder, self.head = _decoder_and_head(decoder, stages, channels, num_classes, vgg)
        initialize_decoder(self.decoder)
        initialize_head(self.head)
        self.train()

    def train(self, mode: bool = True) -> "DownstreamNetwork":
        """As torch's; encoders that are frozen as a whole stay in evaluation mode."""
        super().train(mode)
        if self.freeze == "all":
            self.encoders.eval()
        return self

    def forward(self, *images: Tensor) -> tuple[Tensor]:
        """Logits.

        Args:
            images: Float (B, bands, H, W) in [0, 1], one of each of `modalities`; H and W are multiples of `input_multiple`.

        Returns:
            One float (B, K, H, W).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.freeze == "none"):
            features = [self.encoders[m](image) for m, image in zip(self.modalities, images, strict=True)]
        stages = [torch.cat(of_stage, 1) for of_stage in zip(*features, strict=True)] if len(features) > 1 else features[0]
        logits_BKHW: Tensor = self.head(self.decoder(stages))
        return (logits_BKHW,)

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters of each encoder, by modality, and of the `decoder` with its head."""
        counts: dict[str, int] = {m: _count(self.encoders[m]) for m in self.modalities}
        return counts | {"decoder": _count(self.decoder) + _count(self.head)}


class LightDecoder(nn.Module):
    """The sum of all stages, each brought to one width by a 1 x 1 convolution and upsampled to the finest, and a ReLU.

    Args:
        encoder_channels: Of the input and of each stage, as smp's decoders take them; stages of 0 channels are left out.
        width: Channels of the result.
    """

    def __init__(self, encoder_channels: list[int], width: int) -> None:
        super().__init__()
        self.stages = [stage for stage, channels in enumerate(encoder_channels) if stage and channels]
        self.laterals = nn.ModuleList(
            # The norm is what makes stages, whose features differ in size, equally loud.
            nn.Sequential(nn.Conv2d(encoder_channels[stage], width, kernel_size=1, bias=False), nn.BatchNorm2d(width))
            for stage in self.stages
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Float (B, width, H / s, W / s) of the stages' maps, s the stride of the finest of them."""
        finest, *coarser = (lateral(features[stage]) for stage, lateral in zip(self.stages, self.laterals, strict=True))
        summed: Tensor = finest
        for stage in coarser:
            summed = summed + F.interpolate(stage, size=summed.shape[-2:], mode="bilinear", align_corners=False)
        return summed.relu()


def input_multiple(decoder: DecoderName, depth: int) -> int:
    """Of what H and W of the input are multiples, px: the largest stride under a decoder of an encoder with `depth` stages."""
    stride = int(2 ** _used_depth(decoder, depth))
    return min(stride, _DEEPLAB_STRIDE) if decoder == "deeplabv3plus" else stride


def _used_depth(decoder: DecoderName, depth: int) -> int:
    """Stages that a decoder takes of an encoder that has `depth`."""
    return min(depth, _PSP_DEPTH) if decoder == "pspnet" else depth


def _built(spec: EncoderSpec, decoder: DecoderName, depth: int) -> nn.Module:
    stride = input_multiple(decoder, spec.depth)
    encoder = build_encoder(spec.name, depth, spec.in_channels, stride if stride < 2**depth else None)
    if spec.weights is not None:
        load_strictly(encoder, spec.weights, subset=depth < spec.depth)
    return encoder


def _decoder_and_head(
    decoder: DecoderName, stages: list[int], channels: tuple[int, ...] | None, num_classes: int, vgg: bool
) -> tuple[nn.Module, nn.Module]:
    """A decoder for feature maps of these channels, the input's first, and the head that brings it to the input's size."""
    depth = len(stages) - 1
    needed = depth if decoder == "unet" else len(_DEFAULT_CHANNELS[decoder])
    widths = _DEFAULT_CHANNELS[decoder][:needed] if channels is None else channels
    if len(widths) != needed:
        raise ConfigError(f"decoder_channels={widths} does not fit decoder {decoder!r}; give {needed} numbers, or null.")
    kernel, upsampling = 1, 4
    made: nn.Module
    match decoder:
        case "unet":
            made = UnetDecoder(encoder_channels=stages, decoder_channels=widths, n_blocks=depth, add_center_block=vgg)
            kernel, upsampling = 3, 1
        case "fpn":
            if not all(stages[-4:]):
                raise ConfigError(f"decoder='fpn' takes four stages, and the encoder has channels {stages[1:]}; choose another.")
            made = FPNDecoder(
                encoder_channels=stages, encoder_depth=depth, pyramid_channels=widths[0], segmentation_channels=widths[1]
            )
            upsampling = 2 ** (depth - 3)
        case "deeplabv3plus":
            made = DeepLabV3PlusDecoder(
                encoder_channels=stages, encoder_depth=depth, out_channels=widths[0], atrous_rates=(12, 24, 36),
                output_stride=min(_DEEPLAB_STRIDE, 2**depth), aspp_separable=True, aspp_dropout=0.5,
            )  # fmt: skip
        case "pspnet":
            made = PSPDecoder(encoder_channels=stages, out_channels=widths[0])
            kernel, upsampling = 3, 2**depth
        case "light":
            light = LightDecoder(stages, widths[0])
            made, upsampling = light, 2 ** light.stages[0]
    return made, SegmentationHead(widths[-1], num_classes, kernel_size=kernel, upsampling=upsampling)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

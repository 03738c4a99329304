"""A pretrained encoder as a module: its weights, its card, and the forms that other libraries take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cromss_dist.encoders.golden import check_golden, check_stages
from cromss_dist.errors import BandError
from cromss_dist.models.encoder import build_encoder, load_strictly, stage_features, to_smp, to_timm
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import Package, read_package

MissingRule: TypeAlias = Literal["zeros", "mean"]


@dataclass(frozen=True)
class Adaptation:
    """How an encoder's bands differ from those it was trained with.

    Args:
        trained: The bands it was trained with, in order.
        missing: Of the bands it takes now, those it was not trained with.
        rule: How these got their weights; None where there are none.
    """

    trained: tuple[str, ...]
    missing: tuple[str, ...]
    rule: MissingRule | None


class PretrainedEncoder(nn.Module):
    """An encoder with its card; its forward pass gives feature maps, coarser and coarser.

    It is trainable and in training mode, as any new module; call `.eval()` or freeze it as you need.

    Args:
        card: What `encoder` is. Of an adapted encoder: without figures, digests of files and what else was true of the
            package only.
        encoder: From `build_encoder`.
        adapted: What was changed after training; None: nothing was.
    """

    def __init__(self, card: EncoderCard, encoder: nn.Module, adapted: Adaptation | None = None) -> None:
        super().__init__()
        self.card = card
        self.encoder = encoder
        self.adapted = adapted

    @classmethod
    def of(cls, package: Package) -> "PretrainedEncoder":
        """The encoder of a package, after it has computed the golden patch as it did when it was packaged.

        Raises:
            PackageError: weights, card and golden patch are not of one encoder.
            ConfigError: the card names an encoder that this version of segmentation-models-pytorch or timm lacks.
        """
        card = package.card
        encoder = build_encoder(card.encoder, card.depth, card.in_channels)
        load_strictly(encoder, package.weights)
        check_stages(encoder, card)
        check_golden(encoder, package.golden)
        return cls(card, encoder)

    @property
    def bands(self) -> tuple[str, ...]:
        """Band names in the order of the input's channels."""
        return self.card.bands

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps.

        Args:
            x: Float (B, bands, H, W) in [0, 1], as `normalise` makes it; H and W are multiples of `card.input_multiple`.

        Returns:
            One map a stage, float (B, card.out_channels[k], H / card.strides[k], W / card.strides[k]).

        Raises:
            BandError: another number of channels than bands.
        """
        if x.ndim != 4 or x.shape[1] != len(self.bands):
            raise BandError(
                f"Input of shape {tuple(x.shape)} does not fit; give (batch, {len(self.bands)}, H, W) with {self._wanted()}."
            )
        return stage_features(self.encoder, x)

    def normalise(self, values: npt.ArrayLike) -> Tensor:
        """Physical values to model input, by the contract the encoder was trained under (uint8, then / 255).

        Args:
            values: Shape (..., bands, H, W), in `card.normalisation.units`, in the order of `bands`.

        Returns:
            float32 of the same shape, in [0, 1]; NaN becomes 0.

        Raises:
            BandError: another number of bands.
        """
        values = np.asarray(values)
        if values.ndim < 3 or values.shape[-3] != len(self.bands):
            raise BandError(
                f"Values of shape {values.shape} do not fit; give (..., {len(self.bands)}, H, W) with {self._wanted()}."
            )
        return torch.from_numpy(self.card.normalisation.to_uint8(values, self.bands)).float() / 255

    def to_smp(self, decoder: str = "Unet", classes: int = 1, **options: Any) -> nn.Module:
        """A segmentation model of segmentation-models-pytorch with this encoder's weights; features are bit-equal.

        Args:
            decoder: 'Unet', 'FPN', 'DeepLabV3Plus', 'PSPNet' or another architecture of smp.
            classes: Channels of the logits.
            options: Further arguments of the smp model. `encoder_depth` may be less than `card.depth`.

        Raises:
            ConfigError: smp has no such decoder, or `encoder_depth` is too large.
        """
        return to_smp(*self._built(), decoder, classes, **options)

    def to_timm(self) -> nn.Module:
        """timm's feature extractor with these weights; its last `len(card.strides)` maps are bit-equal.

        Families whose maps timm keeps as (B, H, W, C), such as Swin and MambaOut, give them so.

        Raises:
            ConfigError: timm has no twin of this encoder (ResNet, ResNeXt and `tu-` encoders have one).
        """
        return to_timm(*self._built())

    def _built(self) -> tuple[str, int, int, dict[str, Tensor]]:
        return self.card.encoder, self.card.depth, self.card.in_channels, self.encoder.state_dict()

    def _wanted(self) -> str:
        return f"{self.card.modality} bands {', '.join(self.bands)}, in this order"


def verify_package(folder: Path) -> EncoderCard:
    """Checks all of a package: every byte, and that its encoder computes the golden patch.

    Raises:
        PackageError: anything is missing, too much, changed, or not of one encoder.
        ConfigError: the card names an encoder that this version of segmentation-models-pytorch or timm lacks.
    """
    return PretrainedEncoder.of(read_package(folder)).card

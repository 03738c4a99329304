"""Pretrained encoders for downstream work: `load_encoder`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cromss_dist.errors import BandError, PackageError
from cromss_dist.models.encoder import build_encoder, load_strictly, stage_channels, stage_features, to_smp, to_timm
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import read_package
from cromss_dist.tracking.registry.registry import Registry, parse_ref


class PretrainedEncoder(nn.Module):
    """An encoder with its card; its forward pass gives feature maps, coarser and coarser.

    It is trainable and in training mode, as any new module; call `.eval()` or freeze it as you need.
    """

    def __init__(self, card: EncoderCard, state_dict: dict[str, Tensor]) -> None:
        super().__init__()
        self.card = card
        self.encoder = build_encoder(card.encoder, card.depth, card.in_channels)
        load_strictly(self.encoder, state_dict)
        built = stage_channels(self.encoder)
        if built != (card.out_channels, card.strides):
            raise PackageError(
                f"The card states channels and strides {(card.out_channels, card.strides)}, the encoder has {built}."
            )

    @property
    def bands(self) -> tuple[str, ...]:
        """Band names in the order of the input's channels."""
        return self.card.bands

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps.

        Args:
            x: Float (B, bands, H, W) in [0, 1], as `normalise` makes it; H and W divide by the last stride.

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

    def normalise(self, values: npt.NDArray[np.generic]) -> Tensor:
        """Physical values to model input, by the contract the encoder was trained under (uint8, then / 255).

        Args:
            values: Shape (..., bands, H, W), in `card.normalisation.units`, in the order of `bands`.

        Returns:
            float32 of the same shape, in [0, 1]; NaN becomes 0.

        Raises:
            BandError: another number of bands.
        """
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

        Raises:
            ConfigError: timm has no twin of this encoder (ResNet, ResNeXt and `tu-` encoders have one).
        """
        return to_timm(*self._built())

    def _built(self) -> tuple[str, int, int, dict[str, Tensor]]:
        return self.card.encoder, self.card.depth, self.card.in_channels, self.encoder.state_dict()

    def _wanted(self) -> str:
        return f"{self.card.modality} bands {', '.join(self.bands)}, in this order"


def load_encoder(
    ref: str | Path, *, bands: Sequence[str] | None = None, tracking_uri: str | None = None, cache: str | Path | None = None
) -> PretrainedEncoder:
    """Loads a pretrained encoder from the registry or from a package folder.

    Args:
        ref: A package folder, or a registry reference: `name@alias`, `name/version`, with or without `models:/`.
        bands: The bands you will feed, in your order; checked against the encoder's if given.
        tracking_uri: MLflow store of the registry; default: `CROMSS_TRACKING_URI`, `MLFLOW_TRACKING_URI`, then
            `runs/mlflow.db` in the working directory.
        cache: Folder that keeps fetched packages; default: `CROMSS_CACHE`, else `~/.cache/cromss`.

    Raises:
        BandError: `bands` are not the encoder's, or not in its order.
        PackageError: the package is incomplete or was changed.
        RegistryError: no such model, alias, version or store.
    """
    folder = Path(ref)
    # A folder is one only if it is there or written like a path: a registry reference may hold one slash.
    if not folder.is_dir() and not str(ref).startswith((".", "/", "~")):
        parse_ref(str(ref))  # before the store is looked for: a mistyped folder is not a missing store
        registry = Registry(tracking_uri)
        entry = registry.resolve(str(ref))
        root = Path(cache or os.environ.get("CROMSS_CACHE") or Path.home() / ".cache" / "cromss")
        # The digest is part of the name: another store may have another encoder of this name and version.
        folder = registry.pull(entry.ref, root / entry.name / f"{entry.version}-{entry.tags.get('card_sha256', '')[:16]}")
    card, state_dict = read_package(folder.expanduser())
    if bands is not None and tuple(bands) != card.bands:
        problem = "in another order" if sorted(bands) == sorted(card.bands) else f"{len(bands)} bands"
        raise BandError(
            f"Encoder {ref} takes {len(card.bands)} {card.modality} bands, {', '.join(card.bands)}, in this order; given "
            f"{', '.join(bands) or 'none'} ({problem}). Select and order your bands like that, or choose another encoder."
        )
    return PretrainedEncoder(card, state_dict)

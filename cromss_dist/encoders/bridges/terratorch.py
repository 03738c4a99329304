"""TerraTorch: encoders as backbones of its registry."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from cromss_dist.encoders.bridges.extras import require
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import MissingRule, PretrainedEncoder
from cromss_dist.errors import ConfigError

# TerraTorch's names of Sentinel-2's bands (terratorch.datasets.OpticalBands); those of Sentinel-1 are ours.
TERRATORCH_BANDS = {
    "COASTAL_AEROSOL": "B1",
    "BLUE": "B2",
    "GREEN": "B3",
    "RED": "B4",
    "RED_EDGE_1": "B5",
    "RED_EDGE_2": "B6",
    "RED_EDGE_3": "B7",
    "NIR_BROAD": "B8",
    "NIR_NARROW": "B8A",
    "WATER_VAPOR": "B9",
    "CIRRUS": "B10",
    "SWIR_1": "B11",
    "SWIR_2": "B12",
}


class TerraTorchBackbone(nn.Module):
    """An encoder as TerraTorch's factories take a backbone: with `out_channels`, and a forward pass that gives a list."""

    def __init__(self, encoder: PretrainedEncoder, stages: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.stages = tuple(stages)
        self.out_channels = [encoder.card.out_channels[k] for k in self.stages]

    def forward(self, x: Tensor, **_: object) -> list[Tensor]:
        """The chosen maps of `PretrainedEncoder.forward`; what TerraTorch gives beside the image is not used."""
        maps = self.encoder(x)
        return [maps[k] for k in self.stages]


def cromss_encoder(
    ref: str,
    bands: Sequence[Any] | None = None,
    missing: Literal["error"] | MissingRule = "error",
    out_indices: Sequence[int] | None = None,
    pretrained: bool = True,
    tracking_uri: str | None = None,
) -> TerraTorchBackbone:
    """The backbone `cromss_encoder` of TerraTorch, after `register()`.

    Args:
        ref: As of `load_encoder`: a package folder, `name@alias` or `name/version`.
        bands: The bands you will feed, in your order, by our names ('B8A') or TerraTorch's ('NIR_NARROW').
        missing: What to do about bands the encoder lacks; as of `load_encoder`.
        out_indices: Which stages to give, by index (-1: the last); default: all.
        pretrained: TerraTorch's configs often say so; only True is allowed.
        tracking_uri: MLflow store of the registry.

    Raises:
        ConfigError: `pretrained` is false, or a stage is out of range.
        BandError, PackageError, RegistryError: as `load_encoder`.
    """
    if not pretrained:
        raise ConfigError("backbone_pretrained=false: cromss_encoder is a trained encoder; leave it out, or give true.")
    names = None if bands is None else [str(getattr(band, "value", band)) for band in bands]
    own = None if names is None else [TERRATORCH_BANDS.get(name, name) for name in names]
    encoder = load_encoder(ref, bands=own, missing=missing, tracking_uri=tracking_uri)
    count = len(encoder.card.out_channels)
    stages = range(count) if out_indices is None else out_indices
    if not all(-count <= k < count for k in stages):
        raise ConfigError(f"backbone_out_indices={list(stages)}: the encoder has {count} stages; give 0 to {count - 1}, or -1.")
    return TerraTorchBackbone(encoder, [k % count for k in stages])


def register() -> None:
    """Makes `cromss_encoder` known to TerraTorch.

    Call it before a model is built. For TerraTorch's own command line put a folder `custom_modules` where it is started, with
    an `__init__.py` that calls it.

    Raises:
        ConfigError: TerraTorch is not installed.
    """
    require("terratorch", "terratorch")
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY  # type: ignore[import-untyped]

    TERRATORCH_BACKBONE_REGISTRY.register(cromss_encoder)

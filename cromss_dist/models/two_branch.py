"""The two-branch U-Net: one branch for Sentinel-1, one for Sentinel-2.

B batch, K classes, H rows, W columns.
"""

from dataclasses import dataclass

from segmentation_models_pytorch.base import SegmentationHead  # type: ignore[import-untyped]
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head  # type: ignore[import-untyped]
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder  # type: ignore[import-untyped]
from torch import Tensor, nn

from cromss_dist.config import ModelConfig
from cromss_dist.errors import ConfigError
from cromss_dist.models.encoder import build_encoder
from cromss_dist.schema import MODALITIES, NUM_CLASSES


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trainable parameters; `decoder` counts decoders and heads, one pair or two."""

    encoder_s1: int
    encoder_s2: int
    decoder: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.encoder_s1 + self.encoder_s2 + self.decoder


class TwoBranchUNet(nn.Module):
    """Two U-Nets on segmentation-models-pytorch's parts, one a modality.

    Late fusion: nothing is shared. Middle fusion: each modality has its encoder; decoder and head are one module
    that both use. `encoders["s1"]` and `encoders["s2"]` are what gets registered after training.

    Args:
        config: Fusion, encoder and decoder widths.
        s1_bands: Number of Sentinel-1 bands.
        s2_bands: Number of Sentinel-2 bands.
        num_classes: Channels of the logits.

    Raises:
        ConfigError: the encoder is unknown or cannot be built at that depth.

    Reference: CromSS, section III-A and figure 2.
    """

    def __init__(self, config: ModelConfig, s1_bands: int, s2_bands: int, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.config = config
        bands = {"s1": s1_bands, "s2": s2_bands}
        self.encoders = nn.ModuleDict({m: build_encoder(config.encoder, config.encoder_depth, bands[m]) for m in MODALITIES})
        # A shared decoder is registered once, so that no parameter has two names in a checkpoint.
        self._decoder_of: dict[str, str] = {m: m if config.fusion == "late" else "shared" for m in MODALITIES}
        names = tuple(dict.fromkeys(self._decoder_of.values()))
        self.decoders = nn.ModuleDict({name: self._build_decoder() for name in names})
        self.heads = nn.ModuleDict(
            {name: SegmentationHead(config.decoder_channels[-1], num_classes, kernel_size=3) for name in names}
        )
        for name in names:
            initialize_decoder(self.decoders[name])
            initialize_head(self.heads[name])

    def _build_decoder(self) -> nn.Module:
        decoder: nn.Module = UnetDecoder(
            encoder_channels=self.encoders["s1"].out_channels,  # the input's, at index 0, is not read
            decoder_channels=self.config.decoder_channels,
            n_blocks=self.config.encoder_depth,
            add_center_block=self.config.encoder.startswith("vgg"),  # as smp.Unet does
        )
        return decoder

    def forward(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both branches.

        Args:
            s1: Float (B, bands of S1, H, W) in [0, 1]; H and W divide by 2 ** encoder_depth.
            s2: Float (B, bands of S2, H, W) in [0, 1].

        Returns:
            Float (B, K, H, W) each: logits of the Sentinel-1 and of the Sentinel-2 branch.

        Raises:
            ConfigError: H or W does not divide by 2 ** encoder_depth.
        """
        return self._branch("s1", s1), self._branch("s2", s2)

    def _branch(self, modality: str, x: Tensor) -> Tensor:
        side = 2**self.config.encoder_depth
        height, width = x.shape[-2:]
        if height % side or width % side:
            raise ConfigError(
                f"{modality} input of {height} x {width} px does not divide by 2 ** model.encoder_depth = {side}; "
                f"set data.crop_px to a multiple of {side} or lower model.encoder_depth."
            )
        name = self._decoder_of[modality]
        logits_BKHW: Tensor = self.heads[name](self.decoders[name](self.encoders[modality](x)))
        return logits_BKHW

    def parameter_counts(self) -> ParameterCounts:
        """Counts of what the optimizer trains."""
        return ParameterCounts(
            _count(self.encoders["s1"]), _count(self.encoders["s2"]), _count(self.decoders) + _count(self.heads)
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

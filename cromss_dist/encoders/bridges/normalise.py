"""The normalisation contract as a module on tensors."""

import numpy as np
import torch
from torch import Tensor, nn

from cromss_dist.errors import BandError
from cromss_dist.schema import Normalisation


class Normalise(nn.Module):
    """Physical values to model input on any device; on the CPU the same to the bit as `PretrainedEncoder.normalise`.

    It has nothing to learn and adds nothing to a state dict.
    """

    def __init__(self, contract: Normalisation) -> None:
        super().__init__()
        self.bands = contract.bands
        # float32 in numpy, step by step as `Normalisation.to_uint8` does: truncation shows the last bit.
        mean, std = np.asarray(contract.mean, np.float32), np.asarray(contract.std, np.float32)
        self.register_buffer("low", torch.from_numpy(mean - 2 * std)[:, None, None], persistent=False)
        self.register_buffer("span", torch.from_numpy(4 * std)[:, None, None], persistent=False)
        self.low: Tensor
        self.span: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """Scales, cuts off and truncates to 256 levels.

        Args:
            values: Any number type, shape (..., bands, H, W), in the contract's units and order of bands.

        Returns:
            float32 of the same shape: 0/255, 1/255, ... 1. NaN becomes 0.

        Raises:
            BandError: another number of bands.
        """
        if values.ndim < 3 or values.shape[-3] != len(self.bands):
            raise BandError(
                f"Values of shape {tuple(values.shape)} do not fit; give (..., {len(self.bands)}, H, W) with the bands "
                f"{', '.join(self.bands)}, in this order."
            )
        levels = ((values.float() - self.low) / self.span * 255).clamp(0, 255).nan_to_num(nan=0.0).trunc()
        return levels / 255

    def extra_repr(self) -> str:
        """The bands, for `print`."""
        return ", ".join(self.bands)

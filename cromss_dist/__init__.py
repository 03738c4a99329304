"""CromSS: distributed pretraining of Sentinel-1 and Sentinel-2 segmentation encoders on noisy labels.

`cromss_dist.load_encoder("name@alias")` gives a pretrained encoder. Importing the package imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cromss_dist.encoders.load import load_encoder

__all__ = ["__version__", "load_encoder"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "load_encoder":
        from cromss_dist.encoders.load import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

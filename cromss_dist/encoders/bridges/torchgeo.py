"""TorchGeo: an encoder as an entry of its multi-weight API."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cromss_dist.encoders.bridges.extras import require
from cromss_dist.encoders.bridges.normalise import Normalise
from cromss_dist.encoders.bridges.torchvision import resnet_state

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum  # type: ignore[import-untyped]

    from cromss_dist.encoders.pretrained import PretrainedEncoder

_SATELLITES = {"s1": "SENTINEL1", "s2": "SENTINEL2"}


def torchgeo_weights(encoder: "PretrainedEncoder") -> "WeightsEnum":
    """An encoder as TorchGeo takes weights: `torchgeo.models.resnet50(weights=...)`, `SemanticSegmentationTask(weights=...)`.

    `transforms` is the encoder's normalisation, a module on tensors (..., bands, H, W) of physical values; `meta` has the keys
    of TorchGeo's own entries (`in_chans`, `bands`, `model`, `dataset`, `ssl_method`, `publication`, `repo`), and `units`,
    `licence` and `run_id` beside them. It neither crops nor resizes.

    Raises:
        ConfigError: TorchGeo is not installed, or has no twin of this encoder (see `to_torchvision`).

    Departs: `get_state_dict` gives a copy of the encoder's tensors, made here. TorchGeo's entries fetch `url` with
    `torch.hub`, whose unpickling can run code of the file; `url` here is a name (urn) that nothing can fetch.
    """
    require("torchgeo", "torchgeo")
    from torchvision.models import Weights, WeightsEnum

    card = encoder.card
    state = {key: tensor.cpu().clone() for key, tensor in resnet_state(encoder).items()}  # the encoder may train on

    class CromssWeights(WeightsEnum):  # type: ignore[misc]
        """Weights of one encoder, held in memory."""

        def get_state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:
            return dict(state)  # smp's encoders take keys out of what they are given

    meta: dict[str, Any] = {
        "dataset": card.dataset,
        "in_chans": card.in_channels,
        "model": card.encoder,
        "publication": "https://arxiv.org/abs/2405.01217" if card.method == "cromss" else "",
        "repo": card.origin.get("url", ""),
        "ssl_method": card.method,
        "bands": list(card.bands),
        "units": card.normalisation.units,
        "licence": card.licence,
        "run_id": card.run_id,
    }
    name = f"{card.encoder}_{_SATELLITES[card.modality]}_{card.in_channels}B_{card.method}".upper()
    weights = Weights(f"urn:cromss:{name}", Normalise(card.normalisation), meta)
    return CromssWeights("CromssWeights", {name: weights})[name]

"""Weights as TorchGeo keeps them: a `.pth` file whose name ends with its own hash, and JSON that says what goes in.

TorchGeo has no folder of cards: the name of a file tells architecture, sensor and method, and `torch.hub` compares the
hexadecimal digits between the last hyphen and the suffix with the file's sha256.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from cromss_dist.schema import Modality
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import card_sha256

SENSORS: dict[Modality, str] = {"s1": "sentinel1", "s2": "sentinel2"}


def write_weights_file(folder: Path, card: EncoderCard, state: Mapping[str, Tensor]) -> Path:
    """Writes `<encoder>_<sensor>_<n>b_<method>-<first 8 of sha256>.pth` and a `.json` of the same stem.

    The file is a plain dictionary of CPU tensors under timm's names, so `torch.load(..., weights_only=True)` reads it and
    `torchgeo.models.resnet50(in_chans=n, num_classes=0).load_state_dict` takes it. Equal weights give equal bytes under
    one version of torch.

    Args:
        folder: Must exist.
        card: Of the encoder.
        state: Its weights, float32 and int64, under the keys of the package.

    Returns:
        Path of the `.pth` file.

    Reference: `torch.hub.load_state_dict_from_url(check_hash=True)` for the law of the name.
    """
    buffer = io.BytesIO()
    # Clones: a tensor that shares memory would bring all of that memory along.
    torch.save({timm_key(card.encoder, key): state[key].detach().cpu().clone() for key in sorted(state)}, buffer)
    content = buffer.getvalue()
    digest = sha256(content).hexdigest()
    path = folder / f"{model_slug(card)}-{digest[:8]}.pth"
    path.write_bytes(content)
    about = {
        "file": path.name,
        "sha256": digest,
        "model": card.encoder,
        "depth": card.depth,
        "in_chans": card.in_channels,
        "bands": list(card.bands),
        "wavelengths_nm": card.wavelengths_nm,
        "normalisation": asdict(card.normalisation),
        "input_range": list(card.input_range),
        "method": card.method,
        "dataset": card.dataset,
        "licence": card.licence,
        "card_sha256": card_sha256(card),
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    return path


def model_slug(card: EncoderCard) -> str:
    """Name of a published encoder in the manner of TorchGeo: 'resnet50_sentinel2_9b_cromss'. Letters, digits and '_'."""
    words = (card.encoder.removeprefix("tu-"), SENSORS[card.modality], f"{card.in_channels}b", card.method)
    return "_".join(re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in words)


def timm_key(encoder: str, key: str) -> str:
    """timm's name of a weight: smp keeps the models of its `tu-` encoders under `model.`."""
    return key.removeprefix("model.") if encoder.startswith("tu-") else key

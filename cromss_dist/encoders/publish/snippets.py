"""Code of a model card: three ways to load a published encoder. Each block runs as it stands, inside the folder."""

from cromss_dist.tracking.package.card import CARD_FILE, GOLDEN_FILE, PUBLISHED_PACKAGE, WEIGHTS_FILE, EncoderCard

_TORCHGEO = ("resnet18", "resnet50", "resnet152")  # ResNets that `torchgeo.models` builds, always with 5 stages


def snippets(card: EncoderCard, weights_file: str, hub_id: str) -> list[str]:
    """Paragraphs of Markdown with one block of Python each.

    Args:
        card: Of the encoder.
        weights_file: Name of the `.pth` file.
        hub_id: 'organisation/name' on the hub, or ''.
    """
    fetch = f'; from the hub: huggingface_hub.snapshot_download("{hub_id}")' if hub_id else ""
    hashed = "from the weights file whose name ends with its hash"
    blocks = [
        ("With `cromss-dist`, which checks every hash, the golden patch and the bands", _with_this_package(card, fetch)),
        ("With segmentation-models-pytorch alone", _with_smp(card)),
        (f"With TorchGeo, {hashed}", _with_torchgeo(card, weights_file))
        if card.encoder in _TORCHGEO and card.depth == 5
        else (f"As a plain dictionary, {hashed}", _plain(weights_file)),
    ]
    return [f"{text}:\n\n```python\n{code}```" for text, code in blocks]


def _with_this_package(card: EncoderCard, fetch: str) -> str:
    return f"""import cromss_dist
import numpy as np

folder = "."  # this one{fetch}
encoder = cromss_dist.load_encoder(folder, bands={list(card.bands)!r}).eval()
values = {_values(card)}
maps = encoder(encoder.normalise(values))  # {len(card.out_channels)} feature maps, fine to coarse
"""


def _with_smp(card: EncoderCard) -> str:
    return f"""import json
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file

folder = Path("{PUBLISHED_PACKAGE}")
encoder = smp.encoders.get_encoder({card.encoder!r}, in_channels={card.in_channels}, depth={card.depth}, weights=None)
# Not strict: parts that no feature map needs have no weights here. The golden patch shows that no other part lacks any.
torch.nn.Module.load_state_dict(encoder, load_file(folder / "{WEIGHTS_FILE}"), strict=False)
encoder.eval()


def features(x):
    with torch.no_grad():  # smp puts the input in front, and an empty map where an encoder has no stage
        return [feature for feature in encoder(x)[1:] if feature.shape[1]]


golden = load_file(folder / "{GOLDEN_FILE}")
for k, feature in enumerate(features(golden["input"].float() / 255), 1):
    stated = golden[f"stage_{{k}}"]
    assert (feature - stated).abs().max() <= 1e-4 * stated.abs().max()

contract = json.loads((folder / "{CARD_FILE}").read_text())["normalisation"]
mean, std = (np.array(contract[key], np.float32)[:, None, None] for key in ("mean", "std"))
values = {_values(card)}
u8 = np.nan_to_num(np.clip((values - (mean - 2 * std)) / (4 * std) * 255, 0, 255)).astype(np.uint8)
maps = features(torch.from_numpy(u8).float() / 255)
"""


def _with_torchgeo(card: EncoderCard, weights_file: str) -> str:
    return f"""import torch
from torchgeo.models import {card.encoder}

state = torch.load({weights_file!r}, weights_only=True)
model = {card.encoder}(in_chans={card.in_channels}, num_classes=0)  # bands: {", ".join(card.bands)}, scaled as above
model.load_state_dict(state)
"""


def _plain(weights_file: str) -> str:
    return f"""import hashlib
from pathlib import Path

import torch

file = Path({weights_file!r})
assert hashlib.sha256(file.read_bytes()).hexdigest().startswith(file.stem.rpartition("-")[2])
state = torch.load(file, weights_only=True)
"""


def _values(card: EncoderCard) -> str:
    """Stands for the reader's image; the units of an imported card can end neither the comment nor the block."""
    side = -(-224 // card.input_multiple) * card.input_multiple
    units = " ".join(card.normalisation.units.replace("`", "'").split())
    return f"np.zeros((1, {card.in_channels}, {side}, {side}), np.float32)  # yours, in {units}"

"""One file with an encoder's tensors, under the names that a library knows, for programs without this package."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import safetensors.torch
from torch import Tensor

from cromss_dist.data.staging import write_atomically
from cromss_dist.encoders.bridges.torchvision import resnet_state
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.errors import OutputExistsError
from cromss_dist.tracking.package.folder import refuse_inside

Names: TypeAlias = Literal["state_dict", "timm", "torchvision"]
NAMES: tuple[Names, ...] = get_args(Names)


def write_state_dict(encoder: PretrainedEncoder, path: Path, names: Names = "state_dict") -> Path:
    """Writes an encoder's tensors as safetensors, with `describe(encoder)` in the header.

    Args:
        encoder: Also one whose bands were chosen: the file has the weights for just these.
        path: File to write; its folder is made.
        names: 'state_dict': as in `encoder.safetensors` of a package, which are those of segmentation-models-pytorch's encoder
            of that name; 'timm': as in timm's model with `features_only=True`; 'torchvision': as in torchvision's model. For
            the ResNets, which have all three, they are the same; nothing of a last layer is in it.

    Returns:
        `path`.

    Raises:
        OutputExistsError: `path` is there already.
        ConfigError: the library has no twin of this encoder, or `path` lies in a package.
    """
    refuse_existing(path)
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in _state(encoder, names).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors, metadata=describe(encoder)))
    return path


def _state(encoder: PretrainedEncoder, names: Names) -> dict[str, Tensor]:
    match names:
        case "timm":
            return encoder.to_timm().state_dict()
        case "torchvision":
            return resnet_state(encoder)
        case "state_dict":
            return encoder.encoder.state_dict()


def describe(encoder: PretrainedEncoder) -> dict[str, str]:
    """What a file of an encoder must say for itself, as text by key.

    `bands` and `input` are for people, `normalisation` is the contract as JSON, `card` the encoder's card.
    """
    card, contract = encoder.card, encoder.card.normalisation
    return {
        "bands": ",".join(card.bands),
        "input": f"float32 (batch, {card.in_channels}, H, W) in [0, 1] = u8 / 255; u8 = {contract.rule}; v in {contract.units}; "
        f"H and W multiples of {card.input_multiple}",
        "normalisation": json.dumps(asdict(contract)),
        "card": card.to_json(),
    }


def refuse_existing(path: Path) -> None:
    """Raises OutputExistsError if `path` is there, ConfigError if it would lie in a package."""
    refuse_inside(path)
    if path.exists():
        raise OutputExistsError(f"{path} exists already and is not replaced. Choose another name, or remove it first.")

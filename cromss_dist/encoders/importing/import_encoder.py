"""A published checkpoint as an encoder package: `import_encoder`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from cromss_dist import __version__
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.encoders.importing.checkpoint import Checkpoint, open_checkpoint
from cromss_dist.encoders.importing.layouts import (
    LAYOUTS,
    SCALINGS,
    FoundEncoder,
    Layout,
    Scaling,
    bands_of,
    find_encoder,
    normalisation,
    shown,
)
from cromss_dist.encoders.importing.pickles import TensorRef
from cromss_dist.errors import BandError, ConfigError, PackageError
from cromss_dist.models.encoder import build_encoder, load_strictly, stage_channels
from cromss_dist.schema import CLASS_NAMES, Modality, check_bands
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.revision import git_revision

DEPTH = 5
# Blocks of each stage, and whether a block is a bottleneck, of the ResNets of smp: He et al. (2015), table 1.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_SMALLER = (torch.float16, torch.bfloat16, torch.float32)  # what float32 holds exactly
# Names that end in the beginning of the file's own sha256, as TorchGeo's and torch.hub's do.
_HASH_NAMED = re.compile(r"(?:resnet|rn)[0-9]+_.*-(?P<hash>[0-9a-f]{8,64})\.(?:pth|pt|ckpt)")


@dataclass(frozen=True)
class Facts:
    """What the caller knows of a checkpoint that the file does not say; '' or None for what its layout says.

    Args:
        layout: Name of the key layout; 'auto' for the only one that fits.
        bands: Bands in the order of the first convolution's channels.
        method: How it was pretrained: 'moco', 'dino', ...
        scaling: 'statistics' or 'reflectance', see `normalisation` of layouts.py.
        dataset: Name of the training data.
        licence: SPDX licence of the weights.
        url: Where the file is from.
    """

    layout: str = "auto"
    bands: Sequence[str] | None = None
    method: str = ""
    scaling: Scaling | None = None
    dataset: str = ""
    licence: str = ""
    url: str = ""


def import_encoder(file: Path, folder: Path, modality: Modality, facts: Facts | None = None, run_id: str = "") -> EncoderCard:
    """Writes one encoder of a published checkpoint as a package; no code of the file is run.

    Args:
        file: As for `read_encoder`.
        folder: Of the package; must not exist.
        modality: As for `read_encoder`.
        facts: As for `read_encoder`.
        run_id: Own id of the run that records the import; '' if none does.

    Returns:
        The package's card.

    Raises:
        OutputExistsError: `folder` is there already.
        CromssError: as for `read_encoder`.
    """
    encoder, card = read_encoder(file, modality, facts)
    return package_encoder(folder, encoder, replace(card, run_id=run_id))


def read_encoder(file: Path, modality: Modality, facts: Facts | None = None) -> tuple[nn.Module, EncoderCard]:
    """One encoder of a published checkpoint, as `build_encoder` makes it, with its card; no code of the file is run.

    Floating-point weights narrower than float32 become float32, which holds them exactly; all others keep their bits.

    Args:
        file: Checkpoint of PyTorch 1.6 or later.
        modality: Which encoder: 's1' or 's2'.
        facts: What the file does not say.

    Returns:
        The encoder, float32 on the CPU, and its card, whose `origin` names the file, its sha256 and layout.

    Raises:
        PackageError: the file is damaged, holds anything that is no data, has no such encoder, or one whose keys or shapes
            are not exactly those of a ResNet.
        BandError: the bands do not fit the encoder's channels.
        ConfigError: a fact is needed that the layout does not tell, or is not allowed.
        StorageError: the file cannot be read.
    """
    facts = facts or Facts()
    with open_checkpoint(file) as checkpoint:
        _check_name(checkpoint)
        try:
            found = find_encoder(checkpoint.content, modality, facts.layout)
            name = _architecture(found.tensors)
            channels = _in_channels(found.tensors)
            layout = _completed(found.layout, file.name, facts)
            bands = tuple(facts.bands) if facts.bands is not None else bands_of(layout, modality, channels)
            check_bands(modality, bands)
            if len(bands) != channels:
                raise BandError(
                    f"The encoder takes {channels} channels, given {len(bands)} bands {', '.join(bands)}; name {channels}."
                )
            encoder = build_encoder(name, DEPTH, channels)
            state = _weights(checkpoint, found.tensors, encoder.state_dict())
            load_strictly(encoder, state)
        except (PackageError, BandError) as error:
            raise type(error)(f"{file}: {error}") from None
    out_channels, strides = stage_channels(encoder)
    return encoder, EncoderCard(
        modality=modality,
        bands=bands,
        normalisation=normalisation(modality, bands, _scaling(layout, modality)),
        encoder=name,
        depth=DEPTH,
        in_channels=channels,
        out_channels=out_channels,
        strides=strides,
        method=layout.method,
        fusion=layout.fusion,
        dataset=layout.dataset,
        patch_px=layout.patch_px,
        config_digest="",
        manifest_digest="",
        run_id="",
        git_revision=git_revision(),
        versions={"cromss_dist": __version__, "torch": version("torch")},
        metrics={},
        licence=layout.licence,
        origin={"file": file.name, "sha256": checkpoint.sha256, "url": facts.url, "layout": _described(found)},
        classes=CLASS_NAMES if layout.method == "cromss" else (),
    )


def _check_name(checkpoint: Checkpoint) -> None:
    """Raises PackageError where a name that states the file's hash states another."""
    match = _HASH_NAMED.fullmatch(checkpoint.path.name)
    if match and not checkpoint.sha256.startswith(match["hash"]):
        raise PackageError(
            f"{checkpoint.path} should have a sha256 that begins with {match['hash']}, by its name; it has {checkpoint.sha256}. "
            "It was cut or changed; take it from its publisher again."
        )


def _architecture(tensors: dict[str, TensorRef]) -> str:
    """The ResNet whose stages have these blocks."""
    blocks = [len({key.split(".")[1] for key in tensors if key.startswith(f"layer{stage}.")}) for stage in range(1, DEPTH)]
    bottleneck = "layer1.0.conv3.weight" in tensors
    known = _RESNETS.get((tuple(blocks), bottleneck))
    if known is None:
        raise PackageError(
            f"The encoder has {blocks} {'bottleneck ' * bottleneck}blocks in its stages; known are those of "
            f"{', '.join(_RESNETS.values())}. It is another network, or keys are missing."
        )
    return known


def _in_channels(tensors: dict[str, TensorRef]) -> int:
    shape = tensors["conv1.weight"].shape
    if len(shape) != 4:
        raise PackageError(f"The first convolution's weights have shape {shape}; four numbers are due.")
    return shape[1]


def _weights(checkpoint: Checkpoint, refs: dict[str, TensorRef], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the encoder, of exactly its keys and shapes, float32 and finite.

    Keys and shapes are compared before a number is read, so that no more is read than the encoder holds.
    """
    missing, extra = sorted(own.keys() - refs.keys()), sorted(refs.keys() - own.keys())
    if missing or extra:
        raise PackageError(
            f"The checkpoint's keys are not the encoder's: {len(missing)} missing {missing[:3]}, {len(extra)} too many "
            f"{[shown(key) for key in extra[:3]]}."
        )
    for key, tensor in own.items():
        if refs[key].shape != tuple(tensor.shape):
            raise PackageError(f"The checkpoint's {key} has shape {refs[key].shape}, the encoder's {tuple(tensor.shape)}.")
    state = {}
    for key, tensor in checkpoint.read(refs).items():
        due = own[key].dtype
        if tensor.dtype != due and not (due == torch.float32 and tensor.dtype in _SMALLER):
            raise PackageError(f"The checkpoint's {key} is {tensor.dtype}, which {due} cannot hold exactly.")
        state[key] = tensor.to(due)
        if not torch.isfinite(state[key]).all():
            raise PackageError(f"The checkpoint's {key} holds numbers that are not finite; its training went wrong.")
    return {key: state[key] for key in own}


def _completed(layout: Layout, file_name: str, facts: Facts) -> Layout:
    """The layout with what the caller knows, and with what the method's own layout says where this one does not tell."""
    methods = {known.method: known for known in LAYOUTS if known.method}
    named = [method for method in methods if method in re.split(r"[-_.]", file_name.lower())]
    method = facts.method or layout.method or (named[0] if len(named) == 1 else "")
    if not method:
        raise ConfigError(
            f"How {file_name} was pretrained is not known; say it with --method, e.g. {', '.join(methods)}, and --scaling."
        )
    own = methods.get(method, layout) if not layout.method else layout
    return replace(
        layout,
        method=method,
        scaling=own.scaling if facts.scaling is None else {"s1": facts.scaling, "s2": facts.scaling},
        dataset=facts.dataset or own.dataset,
        licence=facts.licence or own.licence,
        patch_px=own.patch_px,
    )


def _scaling(layout: Layout, modality: Modality) -> Scaling:
    if not (scaling := layout.scaling[modality]):
        raise ConfigError(
            f"How the input of {layout.method} was scaled is not known; say it with --scaling, one of {', '.join(SCALINGS)}: "
            "'statistics' maps mean +- 2 std of SSL4EO-S12 to 0 ... 1, 'reflectance' divides Sentinel-2 by 10,000."
        )
    return scaling


def _described(found: FoundEncoder) -> str:
    return f"{found.layout.name} ({found.place})"

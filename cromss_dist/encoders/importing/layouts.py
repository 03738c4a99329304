"""Where published checkpoints keep their encoders, and how the input of these was scaled.

A layout names the part of the file that holds the weights and the prefix of the encoder's keys in it; behind the prefix the
keys are those of torchvision's ResNet, which smp and timm share.

Reference, for keys: zhu-xlab/CromSS, utils/finetune.py and models/multimodel/unet_{mid,late}Fusion.py; zhu-xlab/SSL4EO-S12,
src/benchmark/utils/convert_model_torchvision.py (MoCo) and pretrain_ssl/pretrain_dino_s2c.py (DINO); zhu-xlab/DeCUR,
src/pretrain/utils/convert_backbone.py; TorchGeo, torchgeo/models/resnet.py (plain keys). For scaling: CromSS,
dataset/ssl4eo_dataset_lmdb.py (uint8 by statistics, / 255); SSL4EO-S12, issues 2, 17 and 28, where its author says that MoCo and
DINO saw Sentinel-2 divided by 10,000 as uint8 and Sentinel-1 by statistics; DeCUR, datasets/SSL4EO/ssl4eo_dataset_lmdb_mm_norm.py
and scripts/pretrain/ssl4eo_s12/srun_train_rn50_decur_mm.sh (statistics).

Reference, for licences: NoLDO-S12's page, where CromSS's files lie (MIT); SSL4EO-S12, issue 1 (CC-BY-4.0); DeCUR's README
(Apache-2.0).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from cromss_dist.encoders.importing.pickles import Inert, TensorRef
from cromss_dist.errors import BandError, ConfigError, PackageError
from cromss_dist.schema import (
    BANDS,
    NORMALISATION,
    S1_BANDS,
    S2_9,
    S2_12,
    S2_BANDS,
    S2_NORMALISATION,
    S2_RGB,
    Modality,
    Normalisation,
)

# 'statistics': mean +- 2 std to uint8; 'reflectance': Sentinel-2 digital numbers / 10,000 to uint8. Both then / 255.
Scaling = Literal["statistics", "reflectance"]
SCALINGS: tuple[Scaling, Scaling] = ("statistics", "reflectance")

_SSL4EO_BANDS: dict[Modality, dict[int, tuple[str, ...]]] = {"s1": {2: S1_BANDS}, "s2": {13: S2_BANDS, 3: S2_RGB}}
_STEM = "conv1.weight"  # of every ResNet


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints is laid out.

    Args:
        name: For `--layout`.
        method: How the encoders were trained; '' where the layout does not tell.
        prefixes: Modality to prefixes of its encoder's keys; they are tried in turn.
        parts: Keys of the file under which the weights lie; '' is the top level. They are tried in turn.
        bands: Modality to the bands it was trained on, by number of channels.
        scaling: Modality to scaling; '' where the layout does not tell.
        fusion: Fusion of the model it was trained in.
        dataset: Name of the training data; '' if unknown.
        licence: SPDX licence of the published weights; '' if unknown.
        patch_px: Side of the patches it was trained on; 0 if unknown.
    """

    name: str
    method: str
    prefixes: Mapping[Modality, tuple[str, ...]]
    parts: tuple[str, ...]
    bands: Mapping[Modality, Mapping[int, tuple[str, ...]]]
    scaling: Mapping[Modality, Scaling | Literal[""]]
    fusion: Literal["middle", "late", "none"] = "none"
    dataset: str = "SSL4EO-S12"
    licence: str = "CC-BY-4.0"
    patch_px: int = 224


def _cromss(fusion: Literal["middle", "late"], s1: str, s2: str) -> Layout:
    return Layout(
        f"cromss-{fusion}",
        "cromss",
        {"s1": (s1,), "s2": (s2,)},
        ("state_dict",),
        {"s1": {2: S1_BANDS}, "s2": {13: S2_BANDS, 12: S2_12, 9: S2_9, 3: S2_RGB}},
        {"s1": "statistics", "s2": "statistics"},
        fusion,
        "NoLDO-S12",
        "MIT",
        256,
    )


def _either(*prefixes: str) -> dict[Modality, tuple[str, ...]]:
    """The same prefixes for both modalities, with and without that of DistributedDataParallel."""
    every = tuple(f"{wrapper}{prefix}" for prefix in prefixes for wrapper in ("module.", ""))
    return {"s1": every, "s2": every}


_SSL4EO_SCALING: dict[Modality, Scaling | Literal[""]] = {"s1": "statistics", "s2": "reflectance"}
LAYOUTS = (
    _cromss("middle", "net.encoder1.", "net.encoder."),
    _cromss("late", "net.model1.encoder.", "net.model2.encoder."),
    Layout("moco", "moco", _either("encoder_q."), ("state_dict",), _SSL4EO_BANDS, _SSL4EO_SCALING),
    # The teacher: DINO's own evaluation takes it.
    Layout("dino", "dino", _either("backbone."), ("teacher",), _SSL4EO_BANDS, _SSL4EO_SCALING),
    Layout(
        "decur",
        "decur",
        {"s1": ("module.backbone_1.", "backbone_1."), "s2": ("module.backbone_2.", "backbone_2.")},
        ("", "model"),
        _SSL4EO_BANDS,
        {"s1": "statistics", "s2": "statistics"},
        licence="Apache-2.0",
    ),
    # TorchGeo's files, and the 'backbone' files of the above.
    Layout(
        "plain",
        "",
        {"s1": ("",), "s2": ("",)},
        ("", "state_dict", "model"),
        _SSL4EO_BANDS,
        {"s1": "", "s2": ""},
        dataset="",
        licence="",
        patch_px=0,
    ),
)
_HEADS = ("fc.",)  # behind the last feature map; MoCo's has layers, fc.0 and fc.2
_DEFORMABLE = ("da1_", "da2_")  # DeCUR's '-rda' encoders add deformable attention between the stages
_VIT = ("patch_embed.", "cls_token", "pos_embed")
# What a message about a file looks at and shows: one dict may stand in it under any number of names, of any length.
_PARTS_LOOKED_AT = 32
_KEYS_LOOKED_AT = 100_000
_SHOWN = 60


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder in a checkpoint: its layout, where it lies, and its tensors by torchvision's keys."""

    layout: Layout
    part: str
    prefix: str
    tensors: dict[str, TensorRef]

    @property
    def place(self) -> str:
        """Where it lies in the file, for people."""
        return f"{self.part or 'top level'}, keys {self.prefix}*" if self.prefix else self.part or "top level"


def find_encoder(content: object, modality: Modality, layout: str = "auto") -> FoundEncoder:
    """The encoder of `modality` in what a checkpoint holds.

    Args:
        content: Of the checkpoint.
        modality: 's1' or 's2'.
        layout: Name of a layout, or 'auto' for the only one that fits.

    Raises:
        ConfigError: no such layout.
        PackageError: the file has no such encoder, or one that is no ResNet; the message names the prefixes that it has.
    """
    known = {known.name: known for known in LAYOUTS}
    if layout != "auto" and layout not in known:
        raise ConfigError(f"layout={layout!r} is not known; choose auto, {', '.join(known)}.")
    found = [
        FoundEncoder(candidate, part, prefix, _behind(tensors, prefix))
        for candidate in (LAYOUTS if layout == "auto" else (known[layout],))
        for part, tensors in _parts(content, candidate.parts)
        for prefix in candidate.prefixes[modality]
        if prefix + _STEM in tensors
    ]
    if len(found) == 1:
        _check_is_plain(content, found[0])
        return found[0]
    if found:
        places = "; ".join(f"{encoder.layout.name}: {encoder.place}" for encoder in found)
        raise PackageError(f"The checkpoint has {len(found)} encoders for {modality} ({places}); say which with --layout.")
    wanted = layout if layout != "auto" else "any known layout"
    raise PackageError(
        f"The checkpoint has no encoder for {modality} of {wanted}; {_what_it_has(content)}. Layouts: {', '.join(known)}. A "
        "checkpoint of another one cannot be imported; nothing is filled in with random weights."
    )


def normalisation(modality: Modality, bands: tuple[str, ...], scaling: Scaling) -> Normalisation:
    """The contract of `bands` under a scaling.

    / 10,000 is written in the one rule that contracts have: with mean 5,000 and std 2,500, mean - 2 std is 0 and 4 std is 10,000.

    Departs: from SSL4EO-S12's uint8 of a reflectance above 1, which wraps around to dark; here it is clipped to 255.

    Raises:
        BandError: a band is unknown.
        ConfigError: 'reflectance' for Sentinel-1.
    """
    if scaling == "statistics":
        return NORMALISATION[modality].select(bands)
    if modality != "s2":
        raise ConfigError("scaling='reflectance' is Sentinel-2's; give scaling='statistics' for s1.")
    count = len(S2_BANDS)
    every = Normalisation("s2", S2_NORMALISATION.units, S2_BANDS, (5000.0,) * count, (2500.0,) * count)
    return every.select(bands)


def bands_of(layout: Layout, modality: Modality, channels: int) -> tuple[str, ...]:
    """The bands that a layout's encoder of so many input channels was trained on, in order.

    Raises:
        BandError: published ones have other numbers of channels.
    """
    known = layout.bands[modality]
    if channels in known:
        return known[channels]
    raise BandError(
        f"The encoder takes {channels} channels; {layout.name} checkpoints for {modality} have {', '.join(map(str, known))}. "
        f"If it is another modality's, say so; else name its bands in order with --bands, out of {', '.join(BANDS[modality])}."
    )


def _parts(content: object, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, TensorRef]]]:
    """The tensors of each part that the file has, by key."""
    for name in names:
        part = content.get(name) if name and isinstance(content, dict) else content
        if isinstance(part, dict):
            yield name, {key: value for key, value in part.items() if isinstance(key, str) and isinstance(value, TensorRef)}


def _behind(tensors: Mapping[str, TensorRef], prefix: str) -> dict[str, TensorRef]:
    """The tensors of one encoder without its head, by key behind the prefix."""
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in inside.items() if not key.startswith(_HEADS)}


def _check_is_plain(content: object, found: FoundEncoder) -> None:
    around = dict(_parts(content, (found.part,)))[found.part]
    if any(part.startswith(_DEFORMABLE) for key in around for part in key.split(".")):
        raise PackageError(
            "The checkpoint is DeCUR with deformable attention between the stages; without it the features would be others, "
            "and no encoder here has it. Import the checkpoint without '-rda'."
        )


def _what_it_has(content: object) -> str:
    """The prefixes of a checkpoint, for the message that none fits."""
    if not isinstance(content, dict):
        kinds = {TensorRef: "tensor", Inert: "single object"}
        kind = kinds.get(type(content), type(content).__name__)
        return f"it holds a {kind}, not a dict of weights"
    names = (name for name in content if isinstance(name, str) and isinstance(content[name], dict))
    every = ((part, key) for part, tensors in _parts(content, ("", *islice(names, _PARTS_LOOKED_AT))) for key in tensors)
    keys = [(shown(part), shown(key)) for part, key in islice(every, _KEYS_LOOKED_AT)]
    if not keys:
        return f"it holds no tensors by name, but {', '.join(shown(repr(key)) for key in islice(content, 8)) or 'nothing'}"
    if any(key.startswith(_VIT) or f".{vit}" in key for _, key in keys for vit in _VIT):
        return "it is of a vision transformer, as MAE's and the ViT-S/16 ones are; only ResNet encoders have stages to import"
    prefixes = Counter(f"{part + ': ' if part else ''}{'.'.join(key.split('.')[:2])}.*" for part, key in keys)
    listed = ", ".join(f"{prefix} ({count})" for prefix, count in prefixes.most_common(12))
    return f"its keys, by prefix: {listed}{', ...' if len(prefixes) > 12 else ''}"


def shown(text: str) -> str:
    """Text of a foreign file for a message: one short line that a terminal only prints."""
    return "".join(character if character.isprintable() else "?" for character in text[:_SHOWN])

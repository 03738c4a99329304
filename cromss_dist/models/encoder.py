"""Encoders alone: built, cut to the stages that are used, and handed to smp and timm.

An encoder is segmentation-models-pytorch's module of that name without the submodules that its depth leaves unused.
Its keys are the same inside `TwoBranchUNet`, in a registered package and in the conversions here.
B batch, H rows, W columns.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import segmentation_models_pytorch as smp  # type: ignore[import-untyped]
import timm
import torch
from segmentation_models_pytorch.encoders import TimmUniversalEncoder, encoders, get_encoder  # type: ignore[import-untyped]
from segmentation_models_pytorch.encoders.resnet import ResNetEncoder  # type: ignore[import-untyped]
from torch import Tensor, nn

from cromss_dist.errors import ConfigError, PackageError

PROBE_PX = 64  # smallest square that every encoder accepts at depth 5


class Removed(nn.Module):
    """Stands where an unused submodule was: owns nothing and passes its first argument on."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Returns `x`."""
        return x


def build_encoder(name: str, depth: int, in_channels: int, output_stride: int | None = None) -> nn.Module:
    """A randomly initialised encoder; nothing is downloaded.

    Args:
        name: Encoder name of segmentation-models-pytorch, `tu-<timm name>` included.
        depth: Number of stages, 3-5; stage k has stride 2 ** k.
        in_channels: Number of input bands.
        output_stride: Largest stride, 8 or 16; stages beyond it are dilated instead, with the same weights. None: no limit.

    Returns:
        A module whose forward takes float (B, in_channels, H, W) and returns the list of its `depth + 1` feature
        maps, the first of them the input (smp's convention). It has `out_channels` to match, and every parameter
        it has takes part in the forward pass.

    Raises:
        ConfigError: the encoder is unknown, or cannot be built at that depth.
    """
    check_encoder_name(name)
    try:
        stride = {} if output_stride is None else {"output_stride": output_stride}
        encoder: nn.Module = get_encoder(name, in_channels=in_channels, depth=depth, weights=None, **stride)
        return remove_unused(encoder, in_channels)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).rstrip(".") or f"it fails on squares of {PROBE_PX} px"
        dilated = f" and output stride {output_stride}" if output_stride else ""
        raise ConfigError(
            f"model.encoder={name!r} cannot be built with depth {depth}{dilated}: {reason}. Choose another encoder or depth."
        ) from error


def check_encoder_name(name: str) -> None:
    """Raises ConfigError, with the nearest names, unless `name` is an encoder of smp or `tu-` and a model of timm."""
    if name.startswith("timm-"):
        raise ConfigError(f"model.encoder={name!r}: smp has deprecated its timm- encoders; give tu-<timm name> instead.")
    if name.startswith("tu-"):
        # 'resnet50.a1_in1k' names an architecture and its pretrained weights; only the architecture counts here.
        if timm.is_model(name.removeprefix("tu-").split(".")[0]):
            return
        known = [f"tu-{model}" for model in timm.list_models()]
    else:
        known = list(encoders)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "give a name such as resnet18, resnet50 or tu-convnext_tiny."
        raise ConfigError(f"model.encoder={name!r} is unknown to segmentation-models-pytorch; {hint}")


def remove_unused(encoder: nn.Module, in_channels: int) -> nn.Module:
    """Takes out, in place, what the forward pass of `encoder` does not use; features stay the same bit for bit.

    smp's encoders keep the stages below their depth and parts behind the last feature map. They would sit in the
    optimizer's state, and as random numbers in the registry. What no gradient reaches is unused.

    Returns:
        `encoder`, in the mode (train or eval) it came in.

    Raises:
        ConfigError: it does not work without them, as timm's HRNets, which add up maps that nobody takes.
    """
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()  # BatchNorm keeps its statistics, dropout draws no random number
    device = next(encoder.parameters()).device
    with torch.enable_grad():
        probe = torch.zeros(1, in_channels, PROBE_PX, PROBE_PX, device=device)
        features = encoder(probe)
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        total = torch.stack([feature.sum() for feature in features[1:] if feature.requires_grad]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    used = {p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    if len(used) < len(parameters):
        _remove(encoder, used)
        try:
            with torch.no_grad():
                encoder(probe)
        except (TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"This encoder does not work without the stages that its depth leaves unused ({error}). Choose another encoder "
                "or the depth that uses all."
            ) from error
    for module in encoder.modules():
        module.training = modes.get(module, encoder.training)
    return encoder


def _remove(module: nn.Module, used: set[nn.Parameter]) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter not in used:
            module.register_parameter(name, None)
    for name, child in list(module.named_children()):
        parameters = set(child.parameters())
        if parameters and not parameters & used:
            module.add_module(name, Removed())
        else:
            _remove(child, used)


def stage_features(encoder: nn.Module, x: Tensor) -> list[Tensor]:
    """The encoder's own feature maps, without the input and the empty map some encoders put at stride 2."""
    return [feature for feature in encoder(x)[1:] if feature.shape[1]]


def stage_channels(encoder: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of the maps of `stage_features`."""
    stages = [(int(channels), 2**k) for k, channels in enumerate(encoder.out_channels) if k and channels]  # type: ignore[arg-type]
    return tuple(c for c, _ in stages), tuple(s for _, s in stages)


def to_smp(
    name: str, depth: int, in_channels: int, state: Mapping[str, Tensor], decoder: str, classes: int, **options: Any
) -> nn.Module:
    """A segmentation model of smp with this encoder's weights under a new decoder.

    Args:
        name: Encoder name.
        depth: Stages the weights have.
        in_channels: Number of input bands.
        state: The encoder's weights.
        decoder: smp's architecture: 'Unet', 'FPN', 'DeepLabV3Plus', 'PSPNet', ...
        classes: Channels of the logits.
        options: Further arguments of smp's model. `encoder_depth` may be less than `depth` (PSPNet wants 3): the
            deeper stages are then left out.

    Raises:
        ConfigError: smp has no such decoder, or `encoder_depth` exceeds `depth`.
    """
    wanted = int(options.pop("encoder_depth", depth))
    if wanted > depth:
        raise ConfigError(
            f"encoder_depth={wanted} exceeds the {depth} stages this encoder was trained with; give {depth} or less."
        )
    try:
        options = _decoder_of_depth(decoder, wanted) | options
        model: nn.Module = smp.create_model(
            decoder, name, encoder_weights=None, in_channels=in_channels, classes=classes, encoder_depth=wanted, **options
        )
    except KeyError as error:
        raise ConfigError(
            f"decoder={decoder!r} is not an architecture of segmentation-models-pytorch: {error.args[0]}"
        ) from error
    encoder = model.get_submodule("encoder")
    remove_unused(encoder, in_channels)
    load_strictly(encoder, state, subset=wanted < depth)
    return model


def _decoder_of_depth(decoder: str, depth: int) -> dict[str, Any]:
    """smp's own decoder with a block for each stage; its defaults are for five and refuse encoders with fewer."""
    architecture = smp.MODEL_ARCHITECTURES_MAPPING.get(decoder.lower())
    parameters = inspect.signature(architecture).parameters if architecture else {}
    channels = parameters["decoder_channels"].default if "decoder_channels" in parameters else None
    return {"decoder_channels": tuple(channels)[:depth]} if isinstance(channels, Sequence) else {}


def to_timm(name: str, depth: int, in_channels: int, state: Mapping[str, Tensor]) -> nn.Module:
    """timm's feature extractor (`features_only=True`) with this encoder's weights; its features are bit-equal.

    Raises:
        ConfigError: timm has no model with the same layers under the same keys: only smp's ResNet and ResNeXt
            encoders and `tu-` encoders can be converted.
    """
    encoder = build_encoder(name, depth, in_channels)
    model: nn.Module
    if isinstance(encoder, TimmUniversalEncoder):
        model, prefix = encoder.get_submodule("model"), "model."
    elif isinstance(encoder, ResNetEncoder) and timm.is_model(name):
        stages = tuple(range(depth))
        model, prefix = (
            timm.create_model(name, pretrained=False, features_only=True, out_indices=stages, in_chans=in_channels),
            "",
        )
    else:
        raise ConfigError(f"encoder {name!r} has no twin in timm; ResNet, ResNeXt and tu- encoders have. Use to_smp() instead.")
    load_strictly(model, {key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return model


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], subset: bool = False) -> None:
    """Loads `state`; keys and shapes must be the module's own. With `subset`, keys the module lacks are left out.

    Raises:
        PackageError: a key is missing or too many, or a shape differs.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or (extra and not subset):
        raise PackageError(
            f"The weights do not fit the encoder: {len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]} keys."
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise PackageError(
                f"The weights do not fit the encoder: {key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}."
            )
    # nn.Module's own method: smp's overrides rename or drop keys for old files.
    nn.Module.load_state_dict(module, {key: state[key] for key in own}, strict=True)

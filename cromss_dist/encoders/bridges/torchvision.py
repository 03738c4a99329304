"""torchvision: an encoder as one of its ResNets."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cromss_dist.errors import ConfigError
from cromss_dist.models.encoder import load_strictly

if TYPE_CHECKING:
    from torchvision.models import ResNet  # type: ignore[import-untyped]

    from cromss_dist.encoders.pretrained import PretrainedEncoder

# The encoders of segmentation-models-pytorch that are torchvision's own layers under torchvision's own names.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
_STAGES = 5  # relu, layer1 ... layer4


def to_torchvision(encoder: "PretrainedEncoder", classes: int | None = None) -> "ResNet":
    """torchvision's ResNet or ResNeXt with these weights and a first convolution that takes the encoder's bands.

    The maps after `relu` and `layer1` to `layer4` are those of the encoder, to the bit.

    Args:
        encoder: Of one of `RESNETS`, with all 5 stages.
        classes: Logits of a new, random last layer; None: the model ends with its pooled features.

    Raises:
        ConfigError: torchvision has no such model, or the encoder has fewer stages.
    """
    from torchvision.models import get_model

    state = resnet_state(encoder)
    model = get_model(encoder.card.encoder, weights=None)
    features = model.fc.in_features
    first = model.conv1
    model.conv1 = nn.Conv2d(
        encoder.card.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
    )
    model.fc = nn.Identity()
    load_strictly(model, state)
    if classes is not None:
        model.fc = nn.Linear(features, classes)
    return model


def resnet_state(encoder: "PretrainedEncoder") -> dict[str, Tensor]:
    """The weights under torchvision's names, which timm's ResNets have, too; without a last layer.

    Raises:
        ConfigError: see `to_torchvision`.
    """
    card = encoder.card
    if card.encoder not in RESNETS or card.depth != _STAGES:
        raise ConfigError(
            f"An encoder {card.encoder!r} of depth {card.depth} has no twin in torchvision or TorchGeo; {', '.join(RESNETS)} of "
            f"depth {_STAGES} have. Use its to_smp(), to_timm() or the ONNX route instead."
        )
    return encoder.encoder.state_dict()

"""The network that a transfer run leaves, and how it is had again for prediction: `load_transferred`.

Layer 4. The file says itself what network it is of, so that it can be copied away from its run, and needs no registry.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.errors import CheckpointError, ConfigError, PackageError
from cromss_dist.models.downstream import DecoderName, DownstreamNetwork, EncoderSpec, input_multiple
from cromss_dist.models.encoder import load_strictly
from cromss_dist.schema import MODALITIES, Modality
from cromss_dist.tracking.package.strict_json import build
from cromss_dist.train.run.folder import WEIGHTS_FILE, write_weights
from cromss_dist.transfer.network import TransferredEncoder


@dataclass(frozen=True)
class EncoderOfRun:
    """An encoder of `NetworkOfRun`.

    Args:
        name: Architecture, by smp's or timm's name.
        depth: Stages that it was trained with.
        bands: Of its input, in order.
    """

    name: str
    depth: int
    bands: tuple[str, ...]


@dataclass(frozen=True)
class NetworkOfRun:
    """What has to be known of a network to build it again.

    Args:
        encoders: By modality.
        decoder: 'deeplabv3plus' and so on.
        decoder_channels: Its widths; empty: smp's.
        class_names: Of the K classes of its logits.
    """

    encoders: dict[Modality, EncoderOfRun]
    decoder: DecoderName
    decoder_channels: tuple[int, ...]
    class_names: tuple[str, ...]

    @classmethod
    def of(
        cls, config: TransferConfig, encoders: Mapping[Modality, TransferredEncoder], class_names: tuple[str, ...]
    ) -> "NetworkOfRun":
        """That of a run."""
        told = {m: EncoderOfRun(one.spec.name, one.spec.depth, one.bands) for m, one in encoders.items()}
        return cls(told, config.decoder, config.decoder_channels or (), class_names)

    def build(self) -> DownstreamNetwork:
        """The network, with random weights. Raises ConfigError as `DownstreamNetwork`."""
        specs = {m: EncoderSpec(one.name, one.depth, len(one.bands)) for m, one in self.encoders.items()}
        return DownstreamNetwork(specs, self.decoder, len(self.class_names), self.decoder_channels or None)


@dataclass(frozen=True, eq=False)
class Transferred:
    """A trained network, ready to predict: `network(*images)[0].argmax(1)` are indices of `class_names`.

    Args:
        network: In evaluation mode. It takes float32 (B, bands, H, W) of each modality in turn, stored values / 255.
        bands: Of each modality's images, in order; S1 first.
        class_names: Of the K classes.
        multiple: Of what H and W are multiples, px; what a tile lacks is best reflected at its border (`whole_geometry`).
    """

    network: DownstreamNetwork
    bands: Mapping[Modality, tuple[str, ...]]
    class_names: tuple[str, ...]
    multiple: int


def write_network(run_dir: Path, weights: Mapping[str, Tensor], network: NetworkOfRun) -> None:
    """Leaves the network in the folder of its run. Raises OSError: the file cannot be written."""
    write_weights(run_dir, weights, json.dumps(asdict(network), sort_keys=True))


def load_transferred(place: Path | str, device: torch.device | str = "cpu") -> Transferred:
    """The network of a transfer run that has come to its end; nothing else of the run is needed.

    Args:
        place: Folder of the run, or its `model.safetensors`.
        device: Where the network is put.

    Raises:
        CheckpointError: there is no such file, it is damaged, or not of a transfer run.
    """
    path = Path(place) / WEIGHTS_FILE if Path(place).is_dir() else Path(place)
    mend = f"Give the folder of a transfer run in mode 'frozen' or 'finetuned' that has come to its end, or its {WEIGHTS_FILE}."
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get("network", "null")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - is no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {mend}") from error
    try:
        of_run = build(NetworkOfRun, json.loads(told), f"{path} is not of a transfer run")
        network = of_run.build()
        load_strictly(network, weights)
    except (ValueError, RecursionError, PackageError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error} {mend}") from error
    bands = {m: of_run.encoders[m].bands for m in MODALITIES if m in of_run.encoders}
    multiple = max(input_multiple(of_run.decoder, one.depth) for one in of_run.encoders.values())
    return Transferred(network.to(device).eval(), bands, of_run.class_names, multiple)

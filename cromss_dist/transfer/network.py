"""The encoders that a transfer run asks for, and the network that it trains.

Layer 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from cromss_dist.config.operation import OFFLINE
from cromss_dist.config.transfer import EncoderConfig, TransferConfig
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.encoders.bands import for_bands
from cromss_dist.encoders.load import load_encoder, local_package
from cromss_dist.errors import BandError
from cromss_dist.models.downstream import DownstreamNetwork, EncoderSpec, Freeze
from cromss_dist.models.encoder import check_encoder_name
from cromss_dist.schema import BANDS, Modality, Normalisation
from cromss_dist.tracking.package.folder import card_sha256, read_package
from cromss_dist.tracking.registry.cache import cached_package
from cromss_dist.transfer.results import EncoderUsed


@dataclass(frozen=True)
class TransferredEncoder:
    """An encoder of a transfer run.

    Args:
        used: How results tell of it.
        spec: What the network takes.
        contract: How its input has to be scaled; None where it was never trained on any.
    """

    used: EncoderUsed
    spec: EncoderSpec
    contract: Normalisation | None

    @property
    def bands(self) -> tuple[str, ...]:
        """Band names in the order of its input."""
        return self.used.bands


def load_encoders(config: TransferConfig) -> dict[Modality, TransferredEncoder]:
    """The encoders of a run, checked as `load_encoder` does; S1 first.

    Raises:
        BandError: an encoder is of another modality, or lacks bands that are asked for.
        ConfigError: `encoder.name` is unknown.
        PackageError, RegistryError: as `load_encoder`.
    """
    encoder = config.encoder
    make = _by_name if encoder.name else _by_ref
    return {modality: make(encoder, modality, registry_uri(config)) for modality in encoder.modalities}


def pin_encoders(config: TransferConfig) -> TransferConfig:
    """The config with references that mean the same for ever: an alias becomes the version that it means now.

    So a run that goes on later, or another rank, has the encoder it began with.

    Raises:
        RegistryError: there is no such model, version, alias or store.
        PackageError: a package is not whole.
    """

    def pinned(ref: str | None) -> str | None:
        return ref if ref is None or local_package(ref) else cached_package(ref, tracking_uri=registry_uri(config)).ref

    return replace(config, encoder=replace(config.encoder, s1=pinned(config.encoder.s1), s2=pinned(config.encoder.s2)))


def registry_uri(config: TransferConfig) -> str | None:
    """The store that has the encoders: the run's, where it names one; None: what the environment says, as for all commands."""
    return None if config.tracking.uri == OFFLINE else config.tracking.uri


def build_network(config: TransferConfig, encoders: Mapping[Modality, TransferredEncoder], num_classes: int) -> DownstreamNetwork:
    """The network of a run; what is random in it is drawn from the run's seed.

    The batch norms of a frozen encoder stay as they are, too, but for two cases, in which they normalise by the batch and follow
    the downstream set: those of a random encoder, which have no statistics yet, so that the baseline would be worse than it has
    to be; and all under the paper's protocol, since the published code takes the weights out of training and leaves the encoder
    in training mode.

    Raises:
        ConfigError: the encoders cannot be had under the decoder.
    """
    freeze: Freeze = "none"
    if config.mode == "frozen":
        freeze = "weights" if config.protocol == "paper" or config.encoder.init == "random" else "all"
    torch.manual_seed(config.seed)
    specs = {modality: encoder.spec for modality, encoder in encoders.items()}
    return DownstreamNetwork(specs, config.decoder, num_classes, config.decoder_channels, freeze)


def check_contract(dataset: Dataset, where: str, encoders: Mapping[Modality, TransferredEncoder]) -> None:
    """Whether a dataset has the bands of the encoders, scaled as they were trained.

    Raises:
        BandError: it has not; says both sides.
    """
    for modality, encoder in encoders.items():
        found = [band for spec in dataset.images if spec.modality == modality for band in spec.bands]
        if missing := [band for band in encoder.bands if band not in found]:
            raise BandError(
                f"{where} lacks {', '.join(missing)} of the {modality} bands that {encoder.used.ref} takes; it has "
                f"{', '.join(found) or f'no {modality} band'}. Set encoder.{modality}_bands to some of these."
            )
        stored = dataset.normalisation(modality).select(encoder.bands)
        if encoder.contract is not None and stored.digest != encoder.contract.digest:
            raise BandError(
                f"{where} and {encoder.used.ref} do not scale {modality} alike: the dataset {_told(stored)}, the encoder "
                f"{_told(encoder.contract)}. Shard the archive again with the encoder's statistics and units, or give an encoder "
                "that was trained on such data."
            )


def _by_ref(config: EncoderConfig, modality: Modality, uri: str | None) -> TransferredEncoder:
    ref = config.ref(modality)
    assert ref is not None
    folder, version = local_package(ref), ""
    if folder is None:
        cached = cached_package(ref, tracking_uri=uri)
        folder, version = cached.folder, cached.ref
    card = read_package(folder).card
    if card.modality != modality:
        raise BandError(f"{ref} is an encoder of {card.modality}; give it as encoder.{card.modality}, not encoder.{modality}.")
    bands = config.bands(modality) or card.bands
    used = EncoderUsed(ref, config.init, card.encoder, bands, card_sha256(card), card.run_id, version)
    if config.init == "random":
        known = set(bands) <= set(card.bands)
        spec = EncoderSpec(card.encoder, card.depth, len(bands))
        return TransferredEncoder(used, spec, card.normalisation.select(bands) if known else None)
    encoder = for_bands(load_encoder(folder), bands, config.missing)
    spec = EncoderSpec(card.encoder, card.depth, len(bands), encoder.encoder.state_dict())
    return TransferredEncoder(used, spec, encoder.card.normalisation)


def _by_name(config: EncoderConfig, modality: Modality, uri: str | None) -> TransferredEncoder:
    assert config.name is not None
    check_encoder_name(config.name)
    bands = config.bands(modality) or BANDS[modality]
    return TransferredEncoder(
        EncoderUsed(config.name, "random", config.name, bands), EncoderSpec(config.name, config.depth, len(bands)), None
    )


def _told(contract: Normalisation) -> str:
    """A contract for a message: what of it differs most often, and its digest."""
    first = list(zip(contract.bands, contract.mean, contract.std, strict=True))[:2]
    statistics = ", ".join(f"{band} {mean:g} +- {std:g}" for band, mean, std in first)
    return f"is in {contract.units!r}, {statistics} ... (digest {contract.digest[:12]})"

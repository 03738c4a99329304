"""A pretrained encoder for other bands than it was trained with: fewer, in another order, or some that it never saw.

Only the first convolution knows bands (some encoders have two side by side). Its channels are selected by name; all other
weights stay as they are. O outputs, C bands, H rows, W columns of a kernel.
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cromss_dist.encoders.pretrained import Adaptation, MissingRule, PretrainedEncoder
from cromss_dist.errors import BandError
from cromss_dist.models.encoder import build_encoder, load_strictly
from cromss_dist.schema import NORMALISATION, Normalisation, check_bands
from cromss_dist.tracking.package.card import EncoderCard


def for_bands(
    encoder: PretrainedEncoder, bands: Sequence[str], missing: Literal["error"] | MissingRule = "error"
) -> PretrainedEncoder:
    """The encoder for exactly these bands, in this order.

    The law: a channel of a band that it was trained with keeps its weights, bit for bit. So the features are those of
    the whole encoder whose left-out bands are 0 in its input, and whose missing bands are not there ('zeros'), up to the
    rounding of sums in another order.

    Args:
        encoder: As trained.
        bands: The bands you will feed, in your order.
        missing: What to do about bands that it was not trained with. 'error' refuses them. 'zeros' gives them weights of 0:
            they change nothing until you train. 'mean' gives them the mean of the weights of all bands it was trained with.

    Returns:
        `encoder` itself where `bands` are its own; else a new one, with a card of its own and `adapted`.

    Raises:
        BandError: a band is unknown to the modality or given twice, or they have no order; it was not trained with one, and
            `missing` does not say what to do; it was scaled in units that the statistics of missing bands are not in; or it was
            adapted before.
    """
    card = encoder.card
    if isinstance(bands, str | Set):
        raise BandError(f"bands={bands!r} is a {type(bands).__name__}; give a list of names, in the order you feed them.")
    if missing not in ("error", *get_args(MissingRule)):
        raise BandError(f"missing={missing!r} is not allowed; choose 'error', 'zeros' or 'mean'.")
    bands = tuple(bands)
    try:
        check_bands(card.modality, bands)
    except BandError as error:
        raise BandError(f"{error} {_takes(card)}") from None
    if bands == card.bands:
        return encoder
    if encoder.adapted is not None:  # what was left out then is gone
        raise BandError(
            f"The encoder was adapted before, from {', '.join(encoder.adapted.trained)} to {', '.join(card.bands)}; load it "
            "again for other bands."
        )
    lacking = tuple(band for band in bands if band not in card.bands)
    if missing == "error" and lacking:
        raise BandError(
            f"{_takes(card)} It was not trained with {', '.join(lacking)}. Leave these out, or say how they get weights: "
            "missing='zeros' (no influence until you train) or 'mean' (the mean of its bands')."
        )
    rule = None if missing == "error" or not lacking else missing
    contract = _contract(card, bands, lacking)
    adapted = Adaptation(card.bands, lacking, rule)
    own = replace(
        card,
        bands=bands,
        normalisation=contract,
        in_channels=len(bands),
        metrics={},  # figures and digests are of the encoder as trained
        evidence=(),
        files={},
        tensors_sha256="",
        recipe=card.recipe | {"adapted.trained_bands": ",".join(card.bands), "adapted.missing": rule or ""},
    )
    return PretrainedEncoder(own, _adapted(card, encoder.encoder.state_dict(), bands, rule), adapted)


def _adapted(card: EncoderCard, state: dict[str, Tensor], bands: tuple[str, ...], rule: MissingRule | None) -> nn.Module:
    """An encoder of `bands` with the weights in `state`, which are of the bands on the card."""
    built = build_encoder(card.encoder, card.depth, len(bands))
    # Where the number of bands stays, an encoder of another number shows which weights belong to them.
    other = built if len(bands) != card.in_channels else build_encoder(card.encoder, card.depth, card.in_channels + 1)
    selected = dict(state)
    for key in input_weights(card, state, other.state_dict()):
        weight_OCHW = state[key]
        fill_OHW = weight_OCHW.mean(1) if rule == "mean" else torch.zeros_like(weight_OCHW[:, 0])
        channels = [weight_OCHW[:, card.bands.index(band)] if band in card.bands else fill_OHW for band in bands]
        selected[key] = torch.stack(channels, 1)
    load_strictly(built, selected)
    return built


def input_weights(card: EncoderCard, state: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the weights whose shape depends on the number of bands: one, or several that read the input side by side."""
    keys = [key for key in state if key not in other or state[key].shape != other[key].shape]
    if keys and all(state[key].ndim == 4 and state[key].shape[1] == card.in_channels for key in keys):
        return keys
    raise BandError(
        f"Encoder {card.encoder!r} has no first convolution with a channel a band (what depends on their number is {keys}), so "
        f"other bands cannot be selected. {_takes(card)} Give all of these."
    )


def _contract(card: EncoderCard, bands: tuple[str, ...], lacking: tuple[str, ...]) -> Normalisation:
    """How each band is scaled: as in training; a missing one as SSL4EO-S12's statistics say, if they fit the others."""
    trained, known = card.normalisation, NORMALISATION[card.modality]
    if lacking and trained.units != known.units:
        raise BandError(
            f"How {', '.join(lacking)} would be scaled is not known: the encoder's inputs are in {trained.units!r}, the "
            f"statistics of missing bands in {known.units!r}. Leave these bands out."
        )
    of = {band: (known.mean[i], known.std[i]) for i, band in enumerate(known.bands)}
    of |= {band: (trained.mean[i], trained.std[i]) for i, band in enumerate(trained.bands)}
    mean, std = zip(*(of[band] for band in bands), strict=True)
    return replace(trained, bands=bands, mean=mean, std=std)


def _takes(card: EncoderCard) -> str:
    return f"The encoder takes {len(card.bands)} {card.modality} bands, {', '.join(card.bands)}."

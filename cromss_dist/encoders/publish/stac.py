"""A STAC item of the Machine Learning Model (MLM) extension, which catalogues of models read.

Written as plain JSON, not through pystac: its MLM classes (pystac-ext-mlm 1.4.1) hold one value scaling for an input,
where version 1.4.0 of the extension has a list with one for each band.

Reference: STAC 1.1.0; https://stac-extensions.github.io/mlm/v1.4.0/schema.json; file 2.1.0; eo 2.0.0.
"""

import re
from collections.abc import Mapping
from typing import Any

from cromss_dist.encoders.publish.torchgeo_file import model_slug
from cromss_dist.schema import Modality, Normalisation
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import card_sha256

MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
FILE_SCHEMA = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
EO_SCHEMA = "https://stac-extensions.github.io/eo/v2.0.0/schema.json"

# Launch of the first satellite: the earliest images there are. ESA: Sentinel-1A 2014-04-03, Sentinel-2A 2015-06-23.
_FIRST_IMAGES: dict[Modality, str] = {"s1": "2014-04-03T00:00:00Z", "s2": "2015-06-23T00:00:00Z"}
_OPEN_END = "9999-12-31T23:59:59Z"  # an item has no open end: both times are strings
_TASKS = ["semantic-segmentation", "scene-classification"]  # what the extension lists; features need a head for either
_DIMENSIONS = ["batch", "channel", "height", "width"]
_SPDX = re.compile(r"[\w.+-]+", re.ASCII)
_SEMVER = re.compile(r"\d+\.\d+\.\d+([-+][0-9A-Za-z.-]+)*")


def stac_item(card: EncoderCard, num_parameters: int, assets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The item of an encoder.

    The card does not say where and when the training images were taken, so the item has no geometry, and its time range
    is that of the satellites.

    Args:
        card: Of the encoder.
        num_parameters: Of the encoder, trainable or not.
        assets: As `file_asset` makes them, at least one of them with the role 'mlm:model'.

    Returns:
        JSON content: dictionaries, lists, strings, numbers and None.
    """
    slug, names = model_slug(card), {"bands": [{"name": band} for band in card.bands]}
    properties = {
        "title": f"{card.encoder}, {len(card.bands)} {card.modality} bands, {card.method}",
        "description": "Pretrained encoder: feature maps for a model of one's own, no predictions. Geometry is unknown; the "
        "time range is that of the satellites, not of the training images.",
        "datetime": None,
        "start_datetime": _FIRST_IMAGES[card.modality],
        "end_datetime": _OPEN_END,
        "license": card.licence if _SPDX.fullmatch(card.licence) else "other",
        "bands": [_band(card, band) for band in card.bands],
        "mlm:name": slug,
        "mlm:architecture": card.encoder,
        "mlm:tasks": _TASKS,
        "mlm:framework": "PyTorch",
        "mlm:framework_version": _semver(card.versions.get("torch", "")),
        "mlm:total_parameters": num_parameters,
        "mlm:pretrained": True,
        "mlm:pretrained_source": card.dataset or None,
        "mlm:accelerator_constrained": False,
        "mlm:input": [_input(card)],
        "mlm:output": [_output(k, *stage) for k, stage in enumerate(zip(card.out_channels, card.strides, strict=True))],
        "mlm:hyperparameters": dict(sorted(card.recipe.items())) or None,
    }
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [MLM_SCHEMA, FILE_SCHEMA, *([EO_SCHEMA] if card.modality == "s2" else [])],
        "id": f"{slug}-{card_sha256(card)[:8]}",
        "geometry": None,
        # What is not known is left out, but `datetime`, which an item must have.
        "properties": {key: value for key, value in properties.items() if value is not None or key == "datetime"},
        "links": [],
        # The item describes the bands; STAC 1.1 lets it do so only where an asset names them.
        "assets": {key: asset | (names if "mlm:model" in asset["roles"] else {}) for key, asset in assets.items()},
    }


def file_asset(
    href: str, content_bytes: int, sha256: str, media_type: str, roles: list[str], title: str, artifact_type: str = ""
) -> dict[str, Any]:
    """An asset: a file beside the item.

    Args:
        href: Path relative to the item.
        content_bytes: Size of the file.
        sha256: Of the file, hex.
        media_type: Of the file.
        roles: 'mlm:model' and 'mlm:weights' for weights, 'metadata' for text.
        title: For people.
        artifact_type: How weights were written; the extension wants it for 'mlm:model' and only there.
    """
    asset: dict[str, Any] = {
        "href": f"./{href}",
        "title": title,
        "type": media_type,
        "roles": roles,
        "file:size": content_bytes,
        "file:checksum": f"1220{sha256}",  # multihash: 0x12 is sha2-256, 0x20 its length in bytes
    }
    return asset | ({"mlm:artifact_type": artifact_type} if artifact_type else {})


def scaling_expression(normalisation: Normalisation, band: str) -> str:
    """The contract of one band in gdal_calc's notation (numpy functions; A is the band's values): to 0, 1/255, ..., 1."""
    part = normalisation.select([band])
    low, span = part.mean[0] - 2 * part.std[0], 4 * part.std[0]
    return f"trunc(nan_to_num(clip((A - {low!r}) / {span!r} * 255, 0, 255))) / 255".replace("- -", "+ ")


def _band(card: EncoderCard, band: str) -> dict[str, Any]:
    described: dict[str, Any] = {"name": band, "unit": card.normalisation.units}
    if card.modality == "s2":  # the field is for optical bands
        described["eo:center_wavelength"] = round(card.wavelengths_nm[band] / 1000, 6)  # um
    return described


def _input(card: EncoderCard) -> dict[str, Any]:
    return {
        "name": "image",
        "description": f"{card.modality} bands in this order, in {card.normalisation.units}, scaled band by band. Height and "
        f"width are multiples of {card.input_multiple} px; images are not resized.",
        "bands": list(card.bands),
        "input": {"shape": [-1, card.in_channels, -1, -1], "dim_order": _DIMENSIONS, "data_type": "float32"},
        # min-max would leave out the clipping, which clouds need, and the steps of 1/255.
        "value_scaling": [
            {"type": "processing", "format": "gdal-calc", "expression": scaling_expression(card.normalisation, band)}
            for band in card.bands
        ],
        "resize_type": None,
        "pre_processing_function": None,
    }


def _output(index: int, channels: int, stride: int) -> dict[str, Any]:
    return {
        "name": f"stage_{index + 1}",
        "description": f"Feature map, one pixel for {stride} x {stride} px of the input.",
        "tasks": _TASKS,
        "result": {"shape": [-1, channels, -1, -1], "dim_order": _DIMENSIONS, "data_type": "float32"},
        "post_processing_function": None,
    }


def _semver(version: str) -> str | None:
    return version if _SEMVER.fullmatch(version) else None

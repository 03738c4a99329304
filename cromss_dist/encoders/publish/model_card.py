"""The model card of a published encoder: `README.md` as model hubs read it, generated from the encoder's card alone.

What the card does not know is said to be unknown; nothing is looked up.

Reference: Hugging Face, "Model cards" (front matter: license, library_name, tags, datasets, model-index).
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from cromss_dist.encoders.publish.snippets import snippets
from cromss_dist.encoders.publish.torchgeo_file import SENSORS, model_slug
from cromss_dist.schema import Modality
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence

_SENSOR_NAMES: dict[Modality, str] = {"s1": "Sentinel-1", "s2": "Sentinel-2"}
# SPDX names whose lower-case form is the hub's; others go into `license_name`.
_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
)
_HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+")  # a bare name would link to whoever has it on the hub
_HUB_METRICS = {"miou": "mean_iou", "oa": "accuracy"}


def model_card(card: EncoderCard, evidence: Sequence[Evidence], files: Mapping[str, str], weights_file: str, hub_id: str) -> str:
    """Text of `README.md`.

    Args:
        card: Of the encoder.
        evidence: Downstream figures: those of the card, and later ones of the registry.
        files: Path in the folder to sha256 (hex).
        weights_file: Name of the `.pth` file.
        hub_id: 'organisation/name' on the hub, or ''.

    Returns:
        Markdown with YAML front matter.
    """
    name = hub_id.rpartition("/")[2] or model_slug(card)
    front = yaml.safe_dump(_front_matter(card, evidence, name), sort_keys=False, allow_unicode=True, width=1000)
    sections = [
        f"# {name}",
        _summary(card),
        "## Input",
        _input(card),
        "## Output",
        _table(("feature map", "channels", "stride, px"), _stages(card)),
        "## Use",
        *snippets(card, weights_file, hub_id),
        "## Evidence",
        _evidence(evidence),
        "## Limitations",
        "\n".join(f"- {limit}" for limit in _limitations(card, evidence)),
        "## Origin",
        _table(("what", "value"), _origin(card)),
        "## Files",
        _table(("file", "sha256"), sorted(files.items())),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(card: EncoderCard, evidence: Sequence[Evidence], name: str) -> dict[str, Any]:
    licence = card.licence.lower()
    content: dict[str, Any] = {"license": licence if licence in _HUB_LICENCES else "other" if licence else "unknown"}
    if content["license"] == "other":
        content["license_name"] = licence
    content |= {
        "library_name": "cromss-dist",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["earth-observation", "remote-sensing", SENSORS[card.modality], card.encoder, card.method, "safetensors"],
    }
    if _HUB_DATASET.fullmatch(card.dataset):
        content["datasets"] = [card.dataset]
    if evidence:
        content["metrics"] = sorted({_HUB_METRICS.get(item.metric, item.metric) for item in evidence})
        content["model-index"] = [{"name": name, "results": [_result(item) for item in evidence]}]
    return content


def _result(item: Evidence) -> dict[str, Any]:
    metric = {"type": _HUB_METRICS.get(item.metric, item.metric), "value": item.value, "name": f"{item.metric} ({item.protocol})"}
    task = "image-segmentation" if item.metric == "miou" else "image-feature-extraction"
    return {"task": {"type": task}, "dataset": {"type": item.dataset, "name": item.dataset}, "metrics": [metric]}


def _summary(card: EncoderCard) -> str:
    trained = f" on {_text(card.dataset)}" if card.dataset else ""
    fusion = (
        "" if card.fusion == "none" else f", as the {_SENSOR_NAMES[card.modality]} branch of a model with {card.fusion} fusion"
    )
    return (
        f"An encoder for {_SENSOR_NAMES[card.modality]} images of {len(card.bands)} bands: {_text(card.encoder)} with "
        f"{card.depth} stages, pretrained by {_text(card.method)}{trained}{fusion}. It gives feature maps for a model of your "
        "own; it has no decoder and predicts nothing by itself."
    )


def _input(card: EncoderCard) -> str:
    contract = card.normalisation
    rows = [
        (band, f"{card.wavelengths_nm[band]:.1f}", f"{mean:.10g}", f"{std:.10g}")
        for band, mean, std in zip(card.bands, contract.mean, contract.std, strict=True)
    ]
    patch = f" It was trained on patches of {card.patch_px} x {card.patch_px} px." if card.patch_px else ""
    return (
        f"Float32 of shape (batch, {card.in_channels}, height, width), the bands in this order; height and width are multiples "
        f"of {card.input_multiple} px.{patch} Values v in {_text(contract.units)} are scaled band by band with\n\n"
        f"    u8 = {' '.join(contract.rule.split())}\n    x = u8 / 255\n\n"
        + _table(("band", "wavelength, nm", "mean", "std"), rows)
    )


def _stages(card: EncoderCard) -> list[tuple[str, str, str]]:
    pairs = zip(card.out_channels, card.strides, strict=True)
    return [(str(k), str(channels), str(stride)) for k, (channels, stride) in enumerate(pairs, 1)]


def _evidence(evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return "None is recorded: how much this encoder helps on a downstream task has not been measured."
    rows = [
        (
            item.dataset,
            item.protocol,
            item.metric,
            f"{item.value:.4f}",
            f"{item.low:.4f} to {item.high:.4f} ({item.level:.0%})",
            str(item.runs or "not known"),
            str(item.samples or "not known"),
            item.source,
        )
        for item in evidence
    ]
    return _table(("test set", "protocol", "metric", "value", "interval", "runs", "samples", "source"), rows)


def _limitations(card: EncoderCard, evidence: Sequence[Evidence]) -> Iterable[str]:
    units = _text(card.normalisation.units)
    yield (
        f"It knows images in {units}, scaled as above. Another processing level, unit or scaling gives features without a "
        "warning, and worse ones."
    )
    if card.modality == "s2":
        yield (
            "Sentinel-2 products of processing baseline 04.00 and later (from 25 January 2022) carry an offset of 1000 in their "
            "digital numbers; take it off first."
        )
    yield f"It takes exactly the bands {', '.join(card.bands)}. Another order gives wrong features, not an error, in plain torch."
    yield "The card does not say where and when the training images were taken; regions and seasons may be represented unequally."
    if card.classes:
        yield (
            f"It was trained on labels of {len(card.classes)} classes, {_text(', '.join(card.classes))}; what one class lumps "
            "together it may not tell apart."
        )
    if evidence:
        yield "The figures above hold for their test sets, protocols and intervals only."
    if unknown := [what for what, value in _facts(card) if not value]:
        yield f"Not known: {', '.join(unknown)}."


def _facts(card: EncoderCard) -> list[tuple[str, str]]:
    """What a card may leave open, in words."""
    return [
        ("training data", card.dataset),
        ("licence", card.licence),
        ("size of the training patches", f"{card.patch_px} px" if card.patch_px else ""),
        ("training config, sha256", card.config_digest),
        ("training data's manifest, digest", card.manifest_digest),
        ("training run", card.run_id),
    ]


def _origin(card: EncoderCard) -> list[tuple[str, str]]:
    known = [("method", card.method), ("fusion", card.fusion), *((what, value or "not known") for what, value in _facts(card))]
    imported = [(f"imported: {key}", value or "not known") for key, value in sorted(card.origin.items())]
    versions = ", ".join(f"{package} {version}" for package, version in sorted(card.versions.items()))
    metrics = [(f"at the end of training: {key}", f"{value:.4g}") for key, value in sorted(card.metrics.items())]
    return [*known, *imported, *metrics, ("code of the package", card.git_revision), ("versions", versions)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["--"] * len(header), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: str) -> str:
    """A value of the card as plain text in Markdown: an imported card may hold anything."""
    one_line = " ".join(html.escape(value, quote=False).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", one_line)

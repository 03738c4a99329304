"""The card of an encoder package: what the weights are, how their input was scaled, where they come from.

A card is JSON in one canonical form. It carries the sha256 of its own content and of every other file, and reading it
checks every key, type and digest, so that one changed byte anywhere is found. Nothing here needs torch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cromss_dist.errors import BandError, PackageError
from cromss_dist.schema import CLASS_NAMES, WAVELENGTHS_NM, Modality, Normalisation, check_bands
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.package.strict_json import build, canonical

SCHEMA_VERSION = 2
CARD_FILE = "card.json"
WEIGHTS_FILE = "encoder.safetensors"
GOLDEN_FILE = "golden.safetensors"
PUBLISHED_PACKAGE = "package"  # subfolder of a published folder that is the package
ORIGIN_KEYS = frozenset({"file", "sha256", "url", "layout"})
# What a run knows of itself, and an imported file often does not.
_RUN_FACTS = ("dataset", "config_digest", "manifest_digest", "run_id", "patch_px")


@dataclass(frozen=True)
class EncoderCard:
    """What is known about an encoder.

    Args:
        modality: 's1' or 's2'.
        bands: Band names in the order the encoder takes them.
        normalisation: How physical values became uint8, for exactly these bands; holds their units.
        encoder: Encoder name of segmentation-models-pytorch.
        depth: Stages of the encoder.
        in_channels: Number of bands.
        out_channels: Channels of each feature map.
        strides: Stride of each feature map, px of input a px of map.
        method: How it was pretrained: 'cromss', 'moco', 'dino', 'decur', ...
        fusion: Fusion of the model it was trained in; 'none' where it was trained alone.
        dataset: Name of the training data; '' if an import does not know.
        patch_px: Side of the patches it was trained on, px at 10 m; 0 if an import does not know.
        config_digest: sha256 of the resolved run config; '' for imports.
        manifest_digest: Digest of the training shards' manifest; '' for imports.
        run_id: Own id of the run that trained it; '' for imports that no run has recorded.
        git_revision: Commit of the code that wrote the package.
        versions: Package name to version.
        metrics: Metric key to final value; finite.
        licence: SPDX licence of the weights; '' if not known.
        archive: What the manifests say of the archives behind them: `<manifest digest>.<fact>` to text.
        evidence: Downstream figures, each key once.
        origin: Of an imported encoder: `file` name, its `sha256`, `url` ('' if not known), `layout` of its keys. Empty for
            encoders trained here.
        recipe: The resolved config, flattened: dotted key to value.
        classes: Names of the classes it was trained on, by label value; none for training without labels.
        input_range: Range of the input: 0 and 1, since the input is u8 / 255.
        files: File name to sha256 (hex) of every other file; filled in by `write_package`.
        tensors_sha256: sha256 of the list of tensor names, dtypes and shapes; filled in by `write_package`.
        schema_version: Version of this layout.

    Raises:
        PackageError: the parts contradict each other, or a fact is missing that only imports may lack.
    """

    modality: Modality
    bands: tuple[str, ...]
    normalisation: Normalisation
    encoder: str
    depth: int
    in_channels: int
    out_channels: tuple[int, ...]
    strides: tuple[int, ...]
    method: str
    fusion: Literal["middle", "late", "none"]
    dataset: str
    patch_px: int
    config_digest: str
    manifest_digest: str
    run_id: str
    git_revision: str
    versions: dict[str, str]
    metrics: dict[str, float]
    licence: str
    archive: dict[str, str] = field(default_factory=dict)
    evidence: tuple[Evidence, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = CLASS_NAMES
    input_range: tuple[float, ...] = (0.0, 1.0)
    files: dict[str, str] = field(default_factory=dict)
    tensors_sha256: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise PackageError(f"Encoder card: {problem}.")

    def _problem(self) -> str | None:
        try:
            check_bands(self.modality, self.bands)
        except BandError as error:
            return str(error).rstrip(".")
        contract = self.normalisation
        if (contract.modality, contract.bands) != (self.modality, self.bands):
            return f"the normalisation is for bands {list(contract.bands)}, the encoder for {list(self.bands)}"
        if not len(self.bands) == len(contract.mean) == len(contract.std) == self.in_channels:
            return f"in_channels={self.in_channels} and the normalisation do not fit the {len(self.bands)} bands"
        if contract.rule != Normalisation.rule:
            return f"the normalisation's rule {contract.rule!r} is not {Normalisation.rule!r}, the only one there is"
        if min(contract.std) <= 0:
            return f"the normalisation divides by std {list(contract.std)}; all must be above 0"
        if not self.out_channels or len(self.out_channels) != len(self.strides):
            return f"out_channels={self.out_channels} and strides={self.strides} differ in length"
        if min(*self.out_channels, *self.strides) < 1 or self.depth < 1 or self.patch_px < 0:
            return f"out_channels={self.out_channels}, strides={self.strides}, depth={self.depth}, patch_px={self.patch_px}"
        if self.input_range != (0.0, 1.0):
            return f"input_range={self.input_range}; it is 0 and 1, since the input is u8 / 255"
        if self.origin and self.origin.keys() != ORIGIN_KEYS:
            return f"origin has keys {sorted(self.origin)}; give all of {sorted(ORIGIN_KEYS)}, or none"
        required = ("encoder", "method") if self.origin else ("encoder", "method", *_RUN_FACTS)
        missing = [name for name in required if not getattr(self, name)]
        if missing:
            return f"{', '.join(missing)} must be known" + ("" if self.origin else ", since it is no import (origin is empty)")
        twice = [key for key, count in Counter(item.key for item in self.evidence).items() if count > 1]
        if twice:
            return f"evidence for {', '.join(twice)} is given twice"
        return None

    @property
    def wavelengths_nm(self) -> dict[str, float]:
        """Wavelength of each band, nm: the central one of Sentinel-2A, or of Sentinel-1's carrier."""
        return {band: WAVELENGTHS_NM[self.modality][band] for band in self.bands}

    @property
    def input_multiple(self) -> int:
        """H and W of the input must be multiples of it, px: the last stride."""
        return self.strides[-1]

    def _derived(self) -> dict[str, Any]:
        """What follows from the other fields and is written for readers that do not have this code."""
        return {
            "input_multiple": self.input_multiple,
            "normalisation_sha256": self.normalisation.digest,
            "wavelengths_nm": self.wavelengths_nm,
        }

    def to_json(self) -> str:
        """Canonical text of the card, with what follows from it and the digest of all."""
        content = asdict(self) | self._derived()
        return canonical(content | {"content_sha256": _sha256(canonical(content))})

    @classmethod
    def from_json(cls, text: str) -> "EncoderCard":
        """Reads a card, strictly.

        Raises:
            PackageError: not JSON, of another schema version, a key missing or unknown, a value of another type, a digest
                or derived value that does not match, or any byte that differs from the canonical form.
        """
        try:
            content = json.loads(text)
            stated = content.pop("content_sha256", None) if isinstance(content, dict) else None
            actual = _sha256(canonical(content))
        except (ValueError, RecursionError) as error:
            raise PackageError(f"{CARD_FILE} is not JSON: {error}. Fetch the package again.") from None
        version = content.get("schema_version") if isinstance(content, dict) else None
        if stated == actual and type(version) is int and version != SCHEMA_VERSION:
            raise PackageError(
                f"{CARD_FILE} has schema_version {version}; this version of cromss_dist reads {SCHEMA_VERSION} only. Register "
                f"the encoder again with it, or load it with the version that wrote it ({content.get('git_revision')})."
            )
        if stated != actual:
            raise PackageError(
                f"{CARD_FILE} was changed: it states content sha256 {stated} and has {actual}. Fetch the package again."
            )
        said = {name: content.pop(name, None) for name in ("input_multiple", "normalisation_sha256", "wavelengths_nm")}
        card = build(cls, content, CARD_FILE)
        for name, value in card._derived().items():
            if said[name] != value:
                raise PackageError(f"{CARD_FILE} states {name} {said[name]} and has {value}. Fetch the package again.")
        own = card.to_json()
        if own != text:
            raise PackageError(
                f"{CARD_FILE} was changed: it has sha256 {_sha256(text)}, its canonical form {_sha256(own)}. "
                "Fetch the package again."
            )
        return card

    def with_files(self, files: Mapping[str, str], tensors_sha256: str) -> "EncoderCard":
        """The card with the digests of the files it travels with."""
        return replace(self, files=dict(files), tensors_sha256=tensors_sha256)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

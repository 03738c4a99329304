"""The card of an encoder package: what the weights are, how their input was scaled, where they come from.

A card is JSON in one canonical form. It carries the sha256 of its own content and of the weights, and reading it
checks every key, type and digest, so that one changed byte anywhere is found. Nothing here needs torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cromss_dist.errors import BandError, PackageError
from cromss_dist.schema import CLASS_NAMES, Modality, Normalisation, check_bands

SCHEMA_VERSION = 1
CARD_FILE = "card.json"
WEIGHTS_FILE = "encoder.safetensors"


@dataclass(frozen=True)
class EncoderCard:
    """What is known about a registered encoder.

    Args:
        modality: 's1' or 's2'.
        bands: Band names in the order the encoder takes them.
        normalisation: How physical values became uint8, for exactly these bands; holds their units.
        encoder: Encoder name of segmentation-models-pytorch.
        depth: Stages of the encoder.
        in_channels: Number of bands.
        out_channels: Channels of each feature map.
        strides: Stride of each feature map, px of input a px of map.
        fusion: Fusion of the model it was trained in.
        config_digest: sha256 of the resolved run config.
        manifest_digest: Digest of the training shards' manifest.
        run_id: MLflow run that trained it.
        git_revision: Commit of the code.
        versions: Package name to version.
        metrics: Metric key to final value; finite.
        licence: SPDX licence of the weights.
        recipe: The resolved config, flattened: dotted key to value.
        classes: Names of the classes it was trained on, by label value.
        input_range: Range of the input: 0 and 1, since the input is u8 / 255.
        files: File name to sha256 (hex) of every other file; filled in by `write_package`.
        tensors_sha256: sha256 of the list of tensor names, dtypes and shapes; filled in by `write_package`.
        schema_version: Version of this layout.
    """

    modality: Modality
    bands: tuple[str, ...]
    normalisation: Normalisation
    encoder: str
    depth: int
    in_channels: int
    out_channels: tuple[int, ...]
    strides: tuple[int, ...]
    fusion: Literal["middle", "late"]
    config_digest: str
    manifest_digest: str
    run_id: str
    git_revision: str
    versions: dict[str, str]
    metrics: dict[str, float]
    licence: str
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
        if self.schema_version != SCHEMA_VERSION:
            return f"schema_version={self.schema_version} is not {SCHEMA_VERSION}, the one this version of cromss_dist reads"
        try:
            check_bands(self.modality, self.bands)
        except BandError as error:
            return str(error).rstrip(".")
        if (self.normalisation.modality, self.normalisation.bands) != (self.modality, self.bands):
            return f"the normalisation is for bands {list(self.normalisation.bands)}, the encoder for {list(self.bands)}"
        if not len(self.bands) == len(self.normalisation.mean) == len(self.normalisation.std) == self.in_channels:
            return f"in_channels={self.in_channels} and the normalisation do not fit the {len(self.bands)} bands"
        if not self.out_channels or len(self.out_channels) != len(self.strides):
            return f"out_channels={self.out_channels} and strides={self.strides} differ in length"
        return None

    def to_json(self) -> str:
        """Canonical text of the card, with the digests of normalisation and content."""
        content = asdict(self)
        content["normalisation_sha256"] = self.normalisation.digest
        content["content_sha256"] = _sha256(_dump(content))
        return _dump(content)

    @classmethod
    def from_json(cls, text: str) -> "EncoderCard":
        """Reads a card, strictly.

        Raises:
            PackageError: not JSON, a key missing or unknown, a value of another type, a digest that does not match,
                or any byte that differs from the canonical form.
        """
        try:
            content = json.loads(text)
            stated = content.pop("content_sha256", None) if isinstance(content, dict) else None
            actual = _sha256(_dump(content))
        except (ValueError, RecursionError) as error:
            raise PackageError(f"{CARD_FILE} is not JSON: {error}. Fetch the package again.") from None
        if stated != actual:
            raise PackageError(
                f"{CARD_FILE} was changed: it states content sha256 {stated} and has {actual}. Fetch the package again."
            )
        contract = content.pop("normalisation_sha256", None)
        card: EncoderCard = _build(cls, content)
        own = card.normalisation.digest
        if contract != own:
            raise PackageError(f"{CARD_FILE} states normalisation sha256 {contract} and has {own}. Fetch the package again.")
        canonical = card.to_json()
        if canonical != text:
            raise PackageError(
                f"{CARD_FILE} was changed: it has sha256 {_sha256(text)}, its canonical form {_sha256(canonical)}. "
                "Fetch the package again."
            )
        return card

    def with_files(self, files: Mapping[str, str], tensors_sha256: str) -> "EncoderCard":
        """The card with the digests of the files it travels with."""
        return replace(self, files=dict(files), tensors_sha256=tensors_sha256)


def _dump(content: object) -> str:
    return json.dumps(content, sort_keys=True, indent=2) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _build(cls: type[Any], content: object) -> Any:
    """An instance of the dataclass `cls` out of parsed JSON; keys and types must be exactly its own."""
    if not isinstance(content, dict):
        raise PackageError(f"{CARD_FILE}: {cls.__name__} is a {type(content).__name__}, not an object.")
    names = {f.name for f in fields(cls)}
    if content.keys() != names:
        raise PackageError(
            f"{CARD_FILE}: missing keys {sorted(names - content.keys())}, unknown keys {sorted(content.keys() - names)}."
        )
    hints = get_type_hints(cls)
    return cls(**{name: _value(name, hints[name], content[name]) for name in names})


def _value(name: str, hint: Any, value: Any) -> Any:
    """`value` as the annotated type `hint`, which is one of those that the card's dataclasses use."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Normalisation:
        return _build(Normalisation, value)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(name, arguments[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(f"{name}.{key}", arguments[1], item) for key, item in value.items()}
    if hint in (str, int, float) and type(value) is hint and (hint is not float or abs(value) < float("inf")):
        return value
    raise PackageError(f"{CARD_FILE}: {name}={value!r} is not allowed; expected {getattr(hint, '__name__', hint)}, finite.")

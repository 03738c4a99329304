"""One version of a registered encoder, as the registry knows it without its package, and how it is referred to."""

import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cromss_dist.errors import PackageError, RegistryError
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CARD_TAG = "card_sha256"  # what a version's package must hash to; set when it is registered
VERIFIED_TAG = "verified"
RETIRED_TAG = "retired"
METRICS_TAG = "metrics"  # all in one tag: a search over thousands of versions reads every row of tags
EVIDENCE_TAGS = "evidence/"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ALIAS = r"[A-Za-z0-9_-]+"
_REF = re.compile(rf"(?:models:/)?(?P<name>{NAME})(?:@(?P<alias>{ALIAS})|[/:](?P<version>[0-9]{{1,9}}))?")


@dataclass(frozen=True)
class RegisteredEncoder:
    """One version of a model in the registry.

    Args:
        name: Of the model.
        version: From 1.
        aliases: That point to it, sorted.
        run_id: MLflow's id of the run that it belongs to; empty for versions of others.
        source: Where the store has its package.
        created: When it was registered, UTC.
        tags: What is known of it; `card_tags` says which.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    source: str
    created: datetime
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, version: "ModelVersion", aliases: tuple[str, ...] | None = None) -> "RegisteredEncoder":
        """From MLflow's own; `aliases` where it does not carry them."""
        return cls(
            version.name,
            int(version.version),  # a number from a database, text from a server
            tuple(sorted(version.aliases if aliases is None else aliases)),
            version.run_id or "",
            version.source or "",
            datetime.fromtimestamp((version.creation_timestamp or 0) / 1000, UTC),
            dict(version.tags),
        )

    @property
    def ref(self) -> str:
        """The reference that always means this version."""
        return f"{self.name}/{self.version}"

    @property
    def verified(self) -> bool:
        """Whether the package was read back from the store and found whole when it was registered."""
        return self.tags.get(VERIFIED_TAG) == "true"

    @property
    def card_sha256(self) -> str:
        """Hex digest of the card that was registered; empty for versions of others."""
        return self.tags.get(CARD_TAG, "")

    @property
    def retired(self) -> str | None:
        """Why it is not to be used any more; None while it is in use."""
        return self.tags.get(RETIRED_TAG)

    @property
    def bands(self) -> tuple[str, ...]:
        """The bands that it takes, in order."""
        return tuple(band for band in self.tags.get("bands", "").split(",") if band)

    @property
    def metrics(self) -> dict[str, float]:
        """The card's metrics. Tags are anyone's to write: what is no finite number is left out."""
        try:
            content = json.loads(self.tags.get(METRICS_TAG, "{}"))
        except ValueError:
            return {}
        figures = content.items() if isinstance(content, dict) else ()
        return {key: float(value) for key, value in figures if type(value) in (int, float) and math.isfinite(value)}

    @property
    def evidence(self) -> dict[str, Evidence]:
        """Key ('dw.frozen.miou') to what was measured downstream; a tag that is no evidence, or another key's, is left out."""
        found = {}
        for tag, text in self.tags.items():
            if tag.startswith(EVIDENCE_TAGS):
                try:
                    measured = Evidence.from_json(text)
                except PackageError:
                    continue
                if measured.key == tag.removeprefix(EVIDENCE_TAGS):
                    found[measured.key] = measured
        return found


def card_tags(card: EncoderCard) -> dict[str, str]:
    """What of a card a search goes by, so that it needs no package: text, metrics as JSON, evidence a tag each."""
    facts = {
        "modality": card.modality,
        "bands": ",".join(card.bands),
        "encoder": card.encoder,
        "depth": str(card.depth),
        "fusion": card.fusion,
        "method": card.method,
        "dataset": card.dataset,
        "licence": card.licence,
        METRICS_TAG: json.dumps(card.metrics, sort_keys=True),
    }
    facts = {key: value for key, value in facts.items() if value}  # what an import does not know
    return facts | {f"{EVIDENCE_TAGS}{measured.key}": measured.to_json() for measured in card.evidence}


def parse_ref(ref: str) -> re.Match[str]:
    """The parts of a reference: `name`, and `alias` or `version`. Raises RegistryError if it is none."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise RegistryError(
            f"{ref!r} is neither a package folder nor a reference to an encoder; write name@alias or name/version."
        )
    return match


def check_name(name: str) -> None:
    """Raises RegistryError if a model cannot be referred to by this name."""
    if not re.fullmatch(NAME, name):
        raise RegistryError(
            f"Model name {name!r} is not allowed; use letters, digits, '.', '_' and '-', starting with a letter or digit."
        )


def check_alias(alias: str) -> None:
    """Raises RegistryError if this cannot be an alias; MLflow keeps 'latest' and 'v<number>' for itself."""
    if not re.fullmatch(ALIAS, alias) or alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
        raise RegistryError(f"Alias {alias!r} is not allowed; use letters, digits, '_' and '-', but not 'latest' or 'v<number>'.")

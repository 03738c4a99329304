"""One version of a registered encoder, as the registry knows it without its package, and how it is referred to."""

import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cromss_dist.errors import PackageError, RegistryError
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FACTS_TAG = "card"  # all facts in one tag: MLflow reads every row of tags of every version that it lists
CARD_TAG = "card_sha256"  # what a version's package must hash to; set when it is registered
VERIFIED_TAG = "verified"
RETIRED_TAG = "retired"
EVIDENCE_TAGS = "evidence/"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # both are part of file names in the cache and of keys of tags
ALIAS = r"[A-Za-z0-9_-]{1,64}"
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
        tags: What is known of it, and what anyone wrote.
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
        """From MLflow's own; `aliases` where it does not carry them.

        Raises:
            RegistryError: it is none, as in the answer of a server that is not MLflow's.
        """
        number = str(version.version)  # a number from a database, text from a server
        if not version.name or not re.fullmatch("[0-9]+", number):
            raise RegistryError(
                f"The store answered with version {number!r} of model {version.name!r}, which is none. Is it a server of MLflow, "
                "or something in between?"
            )
        return cls(
            version.name,
            int(number),
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

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `card_facts` noted; empty for versions of others. Tags are anyone's to write: what is no JSON object is none."""
        try:
            content = json.loads(self.tags.get(FACTS_TAG, "{}"))
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def bands(self) -> tuple[str, ...]:
        """The bands that it takes, in order."""
        bands = self.facts.get("bands")
        return tuple(bands) if isinstance(bands, list) and all(isinstance(band, str) for band in bands) else ()

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The card's metrics; what is no finite number is left out."""
        content = self.facts.get("metrics")
        figures = content.items() if isinstance(content, dict) else ()
        return {key: float(value) for key, value in figures if _is_figure(value)}

    @cached_property
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


def card_facts(card: EncoderCard) -> str:
    """What of a card a search goes by and a list shows, so that they need no package; JSON. What is not known is left out."""
    facts = {
        "modality": card.modality,
        "bands": card.bands,
        "encoder": card.encoder,
        "depth": card.depth,
        "fusion": card.fusion,
        "method": card.method,
        "dataset": card.dataset,
        "licence": card.licence,
        "metrics": card.metrics,
    }
    return json.dumps({key: value for key, value in facts.items() if value}, sort_keys=True)


def holds_fact(key: str, value: str) -> str:
    """What `card_facts` has somewhere in it where a fact has a value."""
    return f"{json.dumps(key)}: {json.dumps(value)}"


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
            f"Model name {name!r} is not allowed; use letters, digits, '.', '_' and '-', starting with a letter or digit, "
            "at most 128."
        )


def check_alias(alias: str) -> None:
    """Raises RegistryError if this cannot be an alias; MLflow keeps 'latest' and 'v<number>' for itself."""
    if not re.fullmatch(ALIAS, alias) or alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
        raise RegistryError(
            f"Alias {alias!r} is not allowed; use letters, digits, '_' and '-', at most 64, but not 'latest' or 'v<number>'."
        )


def _is_figure(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer above all floats
        return False

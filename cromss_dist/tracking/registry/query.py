"""Searching the registry: which encoder fits these bands, and which is best.

MLflow narrows where it can; what a version must be is decided here, since MLflow compares no numbers, knows no subsets,
and folds case on some databases.
"""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cromss_dist.errors import BandError, ConfigError, RegistryError
from cromss_dist.schema import BANDS, Modality, check_bands
from cromss_dist.tracking.registry.aliases import matching_evidence
from cromss_dist.tracking.registry.entry import FACTS_TAG, VERIFIED_TAG, RegisteredEncoder, holds_fact
from cromss_dist.tracking.registry.registry import Registry

_FACTS = ("modality", "encoder", "fusion", "method", "licence", "dataset")
_PLAIN = re.compile(r"[A-Za-z0-9 ._+/:@-]+")  # what MLflow's filter and LIKE take without a question of quoting
_LIKE = str.maketrans("*?", "%_")


@dataclass(frozen=True)
class Query:
    """What is looked for; everything given must hold.

    The order of bands never matters: `load_encoder` reorders the channels exactly.

    Args:
        modality: 's1' or 's2'.
        bands: The bands that you have; empty = any. An encoder fits if it takes only these, or fewer of them.
        exactly: It must take all of them.
        missing: So many bands that you do not have may be among those it takes; `load_encoder(missing=...)` fills them in.
        name: Of the model, `*` and `?` stand for others.
        encoder: Architecture, 'resnet50'.
        fusion: 'middle', 'late' or 'none'.
        method: 'cromss', 'moco', ...
        licence: SPDX name.
        dataset: Of the training.
        alias: That it must have.
        at_least: Key of evidence ('dw.frozen.miou', or 'dw.miou' of any protocol) or of a metric ('val/miou_s2') to what it
            must reach.
        at_most: Likewise, what it must not exceed.
        sort: Such a key, or 'created'; those without it come last. Empty = by name, newest version first.
        ascending: Smallest first.
        limit: At most so many; 0 = all.
        retired: With those that were retired.
        unverified: With those whose registering was cut.

    Raises:
        BandError: a band is unknown, or of another modality.
        ConfigError: a number of bands or results below 0, or a limit that is NaN.
    """

    modality: Modality | None = None
    bands: tuple[str, ...] = ()
    exactly: bool = False
    missing: int = 0
    name: str | None = None
    encoder: str | None = None
    fusion: str | None = None
    method: str | None = None
    licence: str | None = None
    dataset: str | None = None
    alias: str | None = None
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    sort: str = ""
    ascending: bool = False
    limit: int = 0
    retired: bool = False
    unverified: bool = False

    def __post_init__(self) -> None:
        if min(self.missing, self.limit) < 0:
            raise ConfigError(f"missing={self.missing} and limit={self.limit} are counts; give 0 or more.")
        for key, limit in (*self.at_least.items(), *self.at_most.items()):
            if math.isnan(limit):
                raise ConfigError(f"{key}={limit} is no limit; give a number.")
        if (self.exactly or self.missing) and not self.bands:
            raise ConfigError("exactly and missing say how bands are compared; give bands, too.")
        if self.bands:
            modalities = (self.modality,) if self.modality else tuple(BANDS)
            fitting = [modality for modality in modalities if set(self.bands) <= set(BANDS[modality])]
            if not fitting:
                known = "; ".join(f"{modality}: {', '.join(BANDS[modality])}" for modality in modalities)
                raise BandError(f"Bands {', '.join(self.bands)} are not all of one modality; there are {known}.")
            check_bands(fitting[0], self.bands)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key of figures that it speaks of, each once."""
        keys = [*self.at_least, *self.at_most, *([self.sort] if self.sort and self.sort != "created" else [])]
        return tuple(dict.fromkeys(keys))


@dataclass(frozen=True)
class Found:
    """A version that fits, with its figures for the query's keys."""

    entry: RegisteredEncoder
    figures: dict[str, float]


def find(registry: Registry, query: Query) -> tuple[Found, ...]:
    """The versions that a query fits, sorted as it says.

    Raises:
        RegistryError: the store cannot be reached, or a key is no figure of any version that fits otherwise.
    """
    candidates = [entry for entry in registry.list(narrowed(query)) if fits(entry, query)]
    _check_keys(candidates, query)
    fitting = [Found(entry, _figures(entry, query)) for entry in candidates if reaches(entry, query)]
    if query.sort == "created":
        fitting.sort(key=lambda found: found.entry.created, reverse=not query.ascending)
    elif query.sort:
        sign = 1 if query.ascending else -1
        fitting.sort(key=lambda f: (query.sort not in f.figures, sign * f.figures.get(query.sort, 0.0)))
    return tuple(fitting[: query.limit or None])


def narrowed(query: Query) -> str:
    """MLflow's filter string for what it can tell; values that would need quoting are left to `fits`.

    LIKE finds more than is meant ('_' stands for any character, SQLite folds case), never less.
    """
    clauses = [] if query.unverified else [f"tags.`{VERIFIED_TAG}` = 'true'"]
    for fact in _FACTS:
        value = getattr(query, fact)
        if value and _PLAIN.fullmatch(value):
            clauses.append(f"tags.`{FACTS_TAG}` LIKE '%{holds_fact(fact, value)}%'")
    if query.name and _PLAIN.fullmatch(query.name.translate(str.maketrans("*?", ".."))):
        clauses.append(f"name LIKE '{query.name.translate(_LIKE)}'")
    return " AND ".join(clauses)


def fits(entry: RegisteredEncoder, query: Query) -> bool:
    """Whether a version is what a query asks for, figures aside."""
    if (entry.retired is not None and not query.retired) or (not entry.verified and not query.unverified):
        return False
    if any(getattr(query, fact) not in (None, entry.facts.get(fact)) for fact in _FACTS):
        return False
    if query.name is not None and not fnmatch.fnmatchcase(entry.name, query.name):
        return False
    if query.alias is not None and query.alias not in entry.aliases:
        return False
    return not query.bands or _bands_fit(entry.bands, query)


def reaches(entry: RegisteredEncoder, query: Query) -> bool:
    """Whether a version has the figures that a query asks for; one that is not known is not enough."""
    reached = all(any(v >= limit for v in values(entry, key)) for key, limit in query.at_least.items())
    return reached and all(any(v <= limit for v in values(entry, key)) for key, limit in query.at_most.items())


def values(entry: RegisteredEncoder, key: str) -> Sequence[float]:
    """The figures that a key means: of evidence, one for each protocol that fits; else of the card's metrics; else none."""
    measured = [evidence.value for evidence in matching_evidence(entry, key).values()]
    return measured or [value for name, value in entry.metrics.items() if name == key]


def _bands_fit(taken: Sequence[str], query: Query) -> bool:
    lacking = set(taken) - set(query.bands)
    return bool(taken) and len(lacking) <= query.missing and (not query.exactly or set(query.bands) <= set(taken))


def _figures(entry: RegisteredEncoder, query: Query) -> dict[str, float]:
    best = min if query.ascending else max
    return {key: best(found) for key in query.keys if (found := values(entry, key))}


def _check_keys(candidates: Sequence[RegisteredEncoder], query: Query) -> None:
    """A mistyped key would otherwise sort nothing, or find nothing, without a word."""
    for key in query.keys if candidates else ():
        if not any(values(entry, key) for entry in candidates):
            known = sorted({key for entry in candidates for key in (*entry.evidence, *entry.metrics)})
            raise RegistryError(
                f"{key!r} is no figure of any of the {len(candidates)} versions that fit otherwise; they have "
                f"{', '.join(known) or 'none'}. Add it with cromss registry evidence, or ask for another."
            )

"""Where an encoder comes from, hop by hop, and how two differ."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cromss_dist.errors import PackageError, RegistryError
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.registry.aliases import describe
from cromss_dist.tracking.registry.entry import RegisteredEncoder
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import mlflow_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

_CONFIG_ARTIFACT = "config.yaml"  # of every training run
_OWN_ID_TAG = "cromss.run"
_MANIFEST = "manifest.json"
Stop: TypeAlias = Literal["version", "package", "run", "origin", "config", "dataset", "archive"]


@dataclass(frozen=True)
class Hop:
    """One step on the way from a version to its data.

    Args:
        stop: What is looked for.
        found: Whether it is there and is what the hop before says.
        told: In words: what it is, or what is missing.
        facts: For scripts.
    """

    stop: Stop
    found: bool
    told: str
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A fact that two encoders do not share; '' where one lacks it."""

    fact: str
    first: str
    second: str


def trace(registry: Registry, ref: str) -> tuple[Hop, ...]:
    """The way back: version, package, run, config, datasets, archives; of an import, its file. What is missing is told.

    Raises:
        RegistryError: there is no such version, or the store cannot be reached.
    """
    entry = registry.resolve(ref)
    return tuple(_hops(registry, entry))


def difference(registry: Registry | None, first: str, second: str) -> tuple[Difference, ...]:
    """What the cards of two encoders say differently, evidence that came later included.

    Args:
        registry: None where both are folders.
        first: A reference, or a package folder.
        second: Likewise.

    Raises:
        RegistryError: as in `Registry.resolve`.
        PackageError: a package is not whole.
    """
    a, b = (_facts(registry, ref) for ref in (first, second))
    facts = dict.fromkeys([*a, *b])
    return tuple(Difference(f, a.get(f, ""), b.get(f, "")) for f in facts if a.get(f, "") != b.get(f, ""))


def _hops(registry: Registry, entry: RegisteredEncoder) -> Iterator[Hop]:
    aliases = "".join(f" @{alias}" for alias in entry.aliases)
    state = "" if entry.verified else ", never verified: its registering was cut"
    state += "" if entry.retired is None else f", retired: {entry.retired}"
    facts = {"ref": entry.ref, "card_sha256": entry.card_sha256, "source": entry.source}
    yield Hop("version", True, f"{entry.ref}{aliases}, registered {entry.created:%Y-%m-%d %H:%M} UTC{state}", facts)
    card: EncoderCard | None = None
    try:
        card = registry.card(entry.ref)[1]
        yield Hop("package", True, f"{entry.source}, card sha256 {entry.card_sha256}", {"source": entry.source})
    except (PackageError, RegistryError) as error:
        yield Hop("package", False, str(error))
    run: Run | None = None
    try:
        with mlflow_errors(entry.run_id or "no run id"):
            run = registry.client.get_run(entry.run_id)
        yield _run_hop(run, card)
    except RegistryError as error:
        yield Hop("run", False, f"the run is not in the store ({error})", {"run_id": entry.run_id})
    if card is None:
        yield Hop("config", False, "not known without the card")
    elif card.origin:
        origin = card.origin
        yield Hop(
            "origin", True, f"imported from {origin['file']}, sha256 {origin['sha256']}, {origin['url'] or 'no address'}", origin
        )
    else:
        yield _config_hop(registry, run, card)
        yield from _dataset_hops(run, card)
        yield from _archive_hops(card)


def _run_hop(run: "Run", card: EncoderCard | None) -> Hop:
    tags, info = run.data.tags, run.info
    own = tags.get(_OWN_ID_TAG, "")
    facts = {"run_id": info.run_id, "run": own, "status": info.status, "revision": tags.get("git_revision", "")}
    told = f"{info.run_name}, MLflow {info.run_id}, {info.status}, code {facts['revision'] or 'unknown'}"
    if info.lifecycle_stage != "active":
        mend = f"`mlflow gc` will take the package's files: mlflow runs restore --run-id {info.run_id}"
        return Hop("run", False, f"{told}; it was deleted, and {mend}", facts)
    if card is not None and own and card.run_id != own:
        return Hop("run", False, f"{told}; its own id is {own}, the card states {card.run_id}", facts)
    return Hop("run", True, told, facts)


def _config_hop(registry: Registry, run: "Run | None", card: EncoderCard) -> Hop:
    facts = {"config_digest": card.config_digest}
    told = f"sha256 {card.config_digest}"
    if run is None:
        return Hop("config", False, f"{told}; its file was the run's", facts)
    stated = run.data.tags.get("config_digest")
    if stated != card.config_digest:
        return Hop("config", False, f"{told}; the run states {stated or 'none'}", facts)
    with mlflow_errors(f"The artifacts of run {run.info.run_id} cannot be listed"):
        there = any(file.path == _CONFIG_ARTIFACT for file in registry.client.list_artifacts(run.info.run_id))
    place = f"artifact {_CONFIG_ARTIFACT} of the run" if there else f"the run has no artifact {_CONFIG_ARTIFACT}"
    return Hop("config", there, f"{told}, {place}", facts)


def _dataset_hops(run: "Run | None", card: EncoderCard) -> Iterator[Hop]:
    inputs = [] if run is None or run.inputs is None else [use.dataset for use in run.inputs.dataset_inputs]
    if not inputs:
        told = f"{card.dataset}, manifest digest {card.manifest_digest}; the run names no dataset"
        yield Hop("dataset", False, told, {"digest": card.manifest_digest})
    for dataset in inputs:
        assert run is not None
        # MLflow cuts a digest; it is whole in a tag.
        tags = (value for tag, value in run.data.tags.items() if tag.startswith("dataset/"))
        digest = next((value for value in tags if value.startswith(dataset.digest)), dataset.digest)
        place = _uri(dataset.source)
        facts = {"name": dataset.name, "digest": digest, "place": place}
        found, state = _manifest_state(place, digest)
        yield Hop("dataset", found, f"{dataset.name}, manifest digest {digest}, {place or 'no place'}: {state}", facts)


def _manifest_state(place: str, digest: str) -> tuple[bool, str]:
    """Whether the manifest with a digest is at a place, which may be another machine's."""
    path = Path(place) / _MANIFEST
    if not place or "://" in place or not path.is_file():
        return False, "not visible from here"
    try:
        stated = json.loads(path.read_bytes()).get("digest")
    except (ValueError, AttributeError, OSError) as error:
        return False, f"its manifest cannot be read ({error})"
    same = stated == digest
    return same, "here, with that digest" if same else f"another dataset is there now, of digest {stated}"


def _archive_hops(card: EncoderCard) -> Iterator[Hop]:
    if not card.archive:
        yield Hop("archive", False, "the manifest says nothing of its archive")
    archives: dict[str, dict[str, str]] = {}
    for key, value in card.archive.items():
        digest, _, fact = key.partition(".")
        archives.setdefault(digest, {})[fact] = value
    for digest, facts in archives.items():
        told = ", ".join(f"{fact} {value}" for fact, value in facts.items())
        yield Hop("archive", True, f"{told} (of manifest {digest})", facts)


def _uri(source: str) -> str:
    """The place in MLflow's JSON of a dataset's source."""
    try:
        return str(json.loads(source)["uri"])
    except (ValueError, TypeError, KeyError):
        return ""


def _facts(registry: Registry | None, ref: str) -> dict[str, str]:
    if registry is None or Path(ref).is_dir():
        from cromss_dist.tracking.package.folder import check_package

        card, measured = check_package(Path(ref)), {}
    else:
        entry, card = registry.card(ref)
        measured = entry.evidence
    content = json.loads(card.to_json())
    del content["evidence"]
    evidence = {item.key: item for item in card.evidence} | measured
    return dict(_flat(content)) | {f"evidence.{key}": describe(item) for key, item in sorted(evidence.items())}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, value)) if isinstance(value, list) else str(value)

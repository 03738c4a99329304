"""What is wrong in a registry: cut registerings, files that are gone or about to go, aliases that mean nothing good."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from cromss_dist.errors import PackageError, RegistryError
from cromss_dist.tracking.package.folder import FILES
from cromss_dist.tracking.registry.entry import RegisteredEncoder
from cromss_dist.tracking.registry.history import read_moves
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import mlflow_errors

Problem: TypeAlias = Literal["half", "deleted run", "files", "alias", "history", "twice", "foreign"]
IN_PROGRESS_S = 3600.0  # a registering that is younger may still be going on


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        ref: Of the version, or of the alias.
        problem: Kind: 'half' (a registering that was cut), 'deleted run' (`mlflow gc` will take the files), 'files' (missing or
            changed), 'alias' (means a version that is half, retired or gone), 'history' (a move was recorded and not made, or
            its alias deleted), 'twice' (the same package is another version, too), 'foreign' (not registered by cromss).
        told: What is wrong, and what to do.
    """

    ref: str
    problem: Problem
    told: str


def check(
    registry: Registry, *, deep: bool = False, progress: Callable[[int, int], object] = lambda done, total: None
) -> tuple[Finding, ...]:
    """Everything wrong in a registry; nothing is changed.

    Args:
        registry: To check.
        deep: Fetch every package and check every hash, instead of asking which files there are.
        progress: Called with the versions done and all of them.

    Raises:
        RegistryError: the store cannot be reached.
    """
    entries = registry.list()
    found: list[Finding] = []
    for done, entry in enumerate(entries):
        progress(done, len(entries))
        found += _of_version(registry, entry, deep)
    progress(len(entries), len(entries))
    return (*found, *_twice(entries), *_of_aliases(registry, entries))


def remove_half(registry: Registry, *, older_s: float = IN_PROGRESS_S) -> tuple[RegisteredEncoder, ...]:
    """Deletes the versions whose registering was cut; no alias has ever meant one, and its run can register it again.

    Args:
        registry: To clean.
        older_s: Younger ones stay, since their registering may still be going on, seconds.

    Returns:
        What was deleted.
    """
    half = [entry for entry in registry.list() if is_half(entry) and not entry.aliases and _age_s(entry) >= older_s]
    for entry in half:
        with mlflow_errors(f"{entry.ref} cannot be deleted from {registry.uri}"):
            registry.client.delete_model_version(entry.name, str(entry.version))
    return tuple(half)


def is_half(entry: RegisteredEncoder) -> bool:
    """Whether a version is ours and its registering was cut, or is going on."""
    return bool(entry.card_sha256) and not entry.verified


def _of_version(registry: Registry, entry: RegisteredEncoder, deep: bool) -> Iterator[Finding]:
    if not entry.card_sha256:
        yield Finding(entry.ref, "foreign", "it was not registered by cromss, and nothing says what it should be; do not use it")
        return
    if is_half(entry):
        yield Finding(entry.ref, "half", "its registering was cut or is going on; register it again, or use --remove-half")
        return
    try:
        run = registry.run_of(entry)
        if run.info.lifecycle_stage != "active":
            told = f"`mlflow gc` will take its files: mlflow runs restore --run-id {entry.run_id}"
            yield Finding(entry.ref, "deleted run", f"its run was deleted, and {told}")
        if deep:
            registry.examine(entry)
        elif (listed := registry.listed_files(entry, run)) != FILES:
            missing, unknown = sorted(FILES - listed), sorted(listed - FILES)
            yield Finding(entry.ref, "files", f"missing files {missing}, unknown files {unknown}; register the encoder again")
    except (PackageError, RegistryError) as error:
        yield Finding(entry.ref, "files", str(error))


def _twice(entries: Sequence[RegisteredEncoder]) -> Iterator[Finding]:
    same: dict[tuple[str, str], list[int]] = defaultdict(list)
    for entry in entries:
        if entry.card_sha256 and entry.retired is None:
            same[entry.name, entry.card_sha256].append(entry.version)
    for (name, _), versions in same.items():
        for version in sorted(versions)[1:]:
            told = f"it is the same package as version {min(versions)}; retire one of them"
            yield Finding(f"{name}/{version}", "twice", told)


def _of_aliases(registry: Registry, entries: Sequence[RegisteredEncoder]) -> Iterator[Finding]:
    versions = {(entry.name, entry.version): entry for entry in entries}
    for name in sorted({entry.name for entry in entries}):
        with mlflow_errors(f"Model {name} cannot be read from {registry.uri}"):
            model = registry.client.get_registered_model(name)
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        for alias, version in aliases.items():
            entry = versions.get((name, version))
            if entry is None or not entry.verified or entry.retired is not None:
                state = "is gone" if entry is None else "is retired" if entry.verified else "was never verified"
                told = f"it means version {version}, which {state}; use cromss registry rollback or promote"
                yield Finding(f"{name}@{alias}", "alias", told)
        recorded = {key.split("/")[1] for key in model.tags if key.startswith("history/") and key.count("/") == 2}
        for alias in sorted(recorded):
            moves = read_moves(model.tags, alias, aliases.get(alias))
            if moves and not moves[-1].took_place:
                told = f"a move to version {moves[-1].to} by {moves[-1].who} was recorded and not made, or taken back by hand"
                yield Finding(f"{name}@{alias}", "history", told)


def _age_s(entry: RegisteredEncoder) -> float:
    return (datetime.now(UTC) - entry.created).total_seconds()

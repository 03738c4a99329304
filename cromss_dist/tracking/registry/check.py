"""What is wrong in a registry: cut registerings, files that are gone or about to go, aliases that mean nothing good."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from cromss_dist.errors import PackageError, RegistryError
from cromss_dist.tracking.package.folder import FILES
from cromss_dist.tracking.registry.entry import RegisteredEncoder
from cromss_dist.tracking.registry.history import Move, moved_aliases, read_moves
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
            changed), 'alias' (means a version that is half, retired or gone), 'history' (the alias is not where the last recorded
            move took it: that was cut, or the alias moved or deleted by hand), 'twice' (the same package is another version,
            too), 'foreign' (not registered by cromss, in a model that has versions which were).
        told: What is wrong, and what to do.
    """

    ref: str
    problem: Problem
    told: str


def check(
    registry: Registry, *, deep: bool = False, progress: Callable[[int, int], object] = lambda done, total: None
) -> tuple[Finding, ...]:
    """Everything wrong in a registry; nothing is changed. Models that are all others' are left out: a server may have many.

    Args:
        registry: To check.
        deep: Fetch every package and check every hash, instead of asking which files there are.
        progress: Called with the versions done and all of them.

    Raises:
        RegistryError: the store cannot be reached.
    """
    every = registry.list()
    ours = {entry.name for entry in every if entry.card_sha256}
    entries = [entry for entry in every if entry.name in ours]
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
        stored = registry.stored(entry)
        if stored.run.info.lifecycle_stage != "active":
            told = f"`mlflow gc` will take its files: mlflow runs restore --run-id {entry.run_id}"
            yield Finding(entry.ref, "deleted run", f"its run was deleted, and {told}")
        if deep:
            stored.examine()
        elif (listed := stored.listed()) != FILES:
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
    for model in registry.models():
        moved = moved_aliases(model.tags)
        if not moved and not any(name == model.name for name, _ in versions):
            continue
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        for alias, version in sorted(aliases.items()):
            entry = versions.get((model.name, version))
            if entry is None or not entry.verified or entry.retired is not None:
                state = "is gone" if entry is None else "is retired" if entry.verified else "was never verified"
                told = f"it means version {version}, which {state}; use cromss registry rollback or promote"
                yield Finding(f"{model.name}@{alias}", "alias", told)
        for alias in sorted({*moved, *aliases}):
            strayed = _strayed(read_moves(model.tags, alias, aliases.get(alias)), aliases.get(alias))
            if strayed is not None:
                yield Finding(f"{model.name}@{alias}", "history", strayed)


def _strayed(moves: Sequence[Move], now: int | None) -> str | None:
    """How an alias came to be elsewhere than the last recorded move took it; None if it is there."""
    last = moves[-1] if moves else None
    if last and not last.took_place:
        return f"a move to version {last.to} by {last.who} was recorded and not made, or taken back by hand; promote it again"
    if (last.to if last else None) == now:
        return None
    if now is None:
        return f"it is gone, and last meant version {last.to if last else '?'}; cromss registry rollback sets it again"
    return f"it was moved to version {now} by hand, unchecked and unrecorded; promote that version, or roll back"


def _age_s(entry: RegisteredEncoder) -> float:
    return (datetime.now(UTC) - entry.created).total_seconds()

"""Which version an alias means: promote, roll back, retire, and the history of it all."""

from collections.abc import Callable
from pathlib import Path

from cromss_dist.errors import ConfigError, RegistryError, UnknownEncoderError
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.registry.entry import RETIRED_TAG, RegisteredEncoder, check_alias, parse_ref
from cromss_dist.tracking.registry.history import Move, Reason, earlier_versions, move_alias, read_moves
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import mlflow_errors

Check = Callable[[Path], object]


def promote(
    registry: Registry,
    ref: str,
    alias: str,
    *,
    verify: Check | None = None,
    require: str | None = None,
    margin: float = 0.0,
    allow_overlap: bool = False,
    why: str = "",
) -> RegisteredEncoder:
    """Moves an alias to a version, after its package was fetched whole and, if asked, its evidence beats the incumbent's.

    MLflow moves an alias without asking what it meant. If it moved while the package was being checked, it is not moved
    again; of two promotions within the same moment the later one holds, and the other is told so.

    Args:
        registry: With the version.
        ref: The version.
        alias: The alias; the incumbent is the version that it means now.
        verify: A check of the fetched package's folder beyond its hashes, which raises what is wrong.
        require: Key of evidence: 'dw.frozen.miou', or 'dw.miou' where the versions share one protocol. The candidate's
            interval must lie above the incumbent's; without an incumbent, having the evidence suffices.
        margin: By how much it must be above, in the metric's unit.
        allow_overlap: Compare the values instead of the intervals.
        why: Noted in the history.

    Returns:
        The version with its aliases after the move.

    Raises:
        RegistryError: the version is retired or was never verified, evidence is missing, not comparable or not better, the
            alias is not allowed, or someone else moved it meanwhile.
        ConfigError: the margin is no number of 0 or more.
        PackageError: the stored package is not whole.
    """
    check_alias(alias)
    if not 0 <= margin < float("inf"):
        raise ConfigError(f"margin={margin} is not allowed; give by how much the candidate must be above, 0 or more.")
    entry = registry.resolve(ref)
    _check_usable(entry)
    incumbent = _now(registry, entry.name, alias)
    if require is not None and (incumbent is None or incumbent.version != entry.version):
        told = check_evidence(entry, incumbent, require, margin, allow_overlap)
        why = f"{why} ({told})" if why else told
    registry.stored(entry).examine(verify)
    return _move(registry, entry, alias, incumbent, "promote", why)


def rollback(registry: Registry, ref: str, *, verify: Check | None = None, why: str = "") -> RegisteredEncoder:
    """Moves an alias back to the version it meant before; again, to the one before that.

    Versions that were deleted or retired since are passed over. An alias that went with its version is set again.

    Args:
        registry: With the alias.
        ref: `name@alias`.
        verify: As in `promote`.
        why: Noted in the history.

    Raises:
        RegistryError: there never was such an alias, nothing before it, or someone else moved it meanwhile.
        PackageError: the package it would go back to is not whole; the alias stays.
    """
    now, moves = history(registry, ref)
    alias = parse_ref(ref)["alias"]
    earlier = earlier_versions(moves, now.version if now else None)
    name, means = parse_ref(ref)["name"], f"means {now.ref}" if now else "is gone"
    for version in earlier:
        try:
            entry = registry.resolve(f"{name}/{version}")
        except UnknownEncoderError:
            continue
        if entry.retired is None:
            registry.stored(entry).examine(verify)
            return _move(registry, entry, alias, now, "rollback", why)
    passed = (
        f"versions {', '.join(map(str, earlier))} before it were deleted or retired" if earlier else "it meant nothing before"
    )
    raise RegistryError(
        f"{ref} {means} and cannot be rolled back: {passed}. Move it with cromss registry promote {name}/<version> {alias}."
    )


def history(registry: Registry, ref: str) -> tuple[RegisteredEncoder | None, tuple[Move, ...]]:
    """The version that an alias means, None if it is gone, and the moves that led there, oldest first.

    Args:
        registry: With the alias.
        ref: `name@alias`.

    Raises:
        RegistryError: not such a reference, or there never was such an alias.
    """
    match = parse_ref(ref)
    if not match["alias"]:
        raise RegistryError(f"{ref!r} has no alias, and only aliases move; write {match['name']}@<alias>.")
    entry, gone = None, None
    try:
        entry = registry.resolve(ref)
    except UnknownEncoderError as error:  # MLflow deletes the aliases of a version with it; the records stay
        gone = error
    try:
        with mlflow_errors(f"The history of {ref} cannot be read from {registry.uri}"):
            tags = registry.client.get_registered_model(match["name"]).tags
    except RegistryError as error:
        raise gone or error from None
    moves = read_moves(tags, match["alias"], entry.version if entry else None)
    if gone and not moves:
        raise gone
    return entry, moves


def retire(registry: Registry, ref: str, reason: str) -> RegisteredEncoder:
    """Marks a version as not to be used: searches hide it, no alias moves to it; its files stay for those who have it.

    Raises:
        RegistryError: no reason is given, or an alias still means it.
    """
    entry = registry.resolve(ref)
    if not reason.strip():
        raise RegistryError(f"{entry.ref} is not retired without a reason; say with --reason what is wrong with it.")
    if entry.aliases:
        aliases = ", ".join(f"@{alias}" for alias in entry.aliases)
        raise RegistryError(f"{entry.ref} is still {aliases}; move that first, with cromss registry rollback or promote.")
    with mlflow_errors(f"{entry.ref} cannot be retired in {registry.uri}"):
        registry.client.set_model_version_tag(entry.name, str(entry.version), RETIRED_TAG, reason.strip())
    return registry.resolve(entry.ref)


def reinstate(registry: Registry, ref: str) -> RegisteredEncoder:
    """Takes a retired version back into use."""
    entry = registry.resolve(ref)
    with mlflow_errors(f"{entry.ref} cannot be reinstated in {registry.uri}"):
        if entry.retired is not None:
            registry.client.delete_model_version_tag(entry.name, str(entry.version), RETIRED_TAG)
    return registry.resolve(entry.ref)


def check_evidence(
    entry: RegisteredEncoder, incumbent: RegisteredEncoder | None, key: str, margin: float, allow_overlap: bool
) -> str:
    """What the evidence says for a candidate, in words.

    Raises:
        RegistryError: it is missing, not comparable, or the candidate is not better.
    """
    ours = matching_evidence(entry, key)
    if incumbent is None:
        if not ours:
            raise RegistryError(_lacks(entry, key))
        return ", ".join(f"{name} {describe(measured)}, no incumbent" for name, measured in ours.items())
    theirs = matching_evidence(incumbent, key)
    for one, found in ((entry, ours), (incumbent, theirs)):
        if not found:
            raise RegistryError(_lacks(one, key))
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) != 1:
        raise RegistryError(
            f"{key!r} means {', '.join(sorted(ours))} of {entry.ref} and {', '.join(sorted(theirs))} of {incumbent.ref}; "
            f"{'only one protocol can decide' if shared else 'other protocols cannot be compared'}. Require one that both have."
        )
    a, b = ours[shared[0]], theirs[shared[0]]
    if a.manifest_digest != b.manifest_digest or not a.manifest_digest or a.level != b.level:
        raise RegistryError(
            f"{shared[0]} of {entry.ref} and {incumbent.ref} cannot be compared: test sets {a.manifest_digest or 'unknown'} and "
            f"{b.manifest_digest or 'unknown'}, intervals at {a.level:g} and {b.level:g}. Measure both on the same test set."
        )
    better = a.value > b.value + margin if allow_overlap else a.low > b.high + margin
    told = f"{shared[0]} {describe(a)} against {describe(b)} of version {incumbent.version}"
    if not better:
        by = f" by {margin:g}" if margin else ""
        rule = "its value is not above the other" if allow_overlap else "its interval does not lie above the other"
        mend = "" if allow_overlap else ", or compare the values alone with --allow-overlap"
        raise RegistryError(f"{entry.ref} does not beat {incumbent.ref}: {told}; {rule}{by}. Measure more{mend}.")
    return told


def matching_evidence(entry: RegisteredEncoder, key: str) -> dict[str, Evidence]:
    """Evidence that a key means: 'dw.frozen.miou' one, 'dw.miou' one of each protocol."""
    return {name: measured for name, measured in entry.evidence.items() if key in (name, f"{measured.dataset}.{measured.metric}")}


def describe(measured: Evidence) -> str:
    """'0.61 [0.6, 0.62]'."""
    return f"{measured.value:.4g} [{measured.low:.4g}, {measured.high:.4g}]"


def _lacks(entry: RegisteredEncoder, key: str) -> str:
    return (
        f"{entry.ref} has no evidence {key!r}; it has {', '.join(sorted(entry.evidence)) or 'none'}. Add it with "
        f"cromss registry evidence {entry.ref} FILE.json, or promote without --require."
    )


def _now(registry: Registry, name: str, alias: str) -> RegisteredEncoder | None:
    try:
        return registry.resolve(f"{name}@{alias}")
    except UnknownEncoderError:
        return None


def _check_usable(entry: RegisteredEncoder) -> None:
    if entry.retired is not None:
        raise RegistryError(
            f"{entry.ref} is retired: {entry.retired}. Choose another version, or take it back with "
            "cromss registry retire --undo."
        )
    if not entry.verified:
        raise RegistryError(
            f"{entry.ref} was never verified: its registering was cut. Register the encoder again; cromss registry check "
            "--remove-half removes what is left."
        )


def _move(
    registry: Registry, entry: RegisteredEncoder, alias: str, seen: RegisteredEncoder | None, reason: Reason, why: str
) -> RegisteredEncoder:
    """Moves an alias that still means what it did when the move was decided."""
    now = _now(registry, entry.name, alias)
    if (now and now.ref) != (seen and seen.ref):
        raise RegistryError(
            f"While {entry.ref} was being checked, @{alias} moved from {seen.ref if seen else 'nothing'} to "
            f"{now.ref if now else 'nothing'}. Look at cromss registry history {entry.name}@{alias} and decide again."
        )
    with mlflow_errors(f"@{alias} cannot be moved to {entry.ref} in {registry.uri}"):
        move_alias(registry.client, entry.name, alias, entry.version, reason, why)
    moved = registry.resolve(entry.ref)
    if alias not in moved.aliases:
        now = _now(registry, entry.name, alias)
        raise RegistryError(
            f"@{alias} was moved to {entry.ref} and at the same time, by someone else, to version "
            f"{now.version if now else 'none'}, which holds. Look at cromss registry history {entry.name}@{alias}."
        )
    return moved

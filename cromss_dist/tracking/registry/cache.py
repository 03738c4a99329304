"""Fetched packages, kept on this machine, and what their references meant when the store was last asked.

`<cache>/<name>/<version>-<card digest>/` is a package; `<cache>/seen/<store>/<reference>.json` says which one a
reference meant, and when. Without the network the latter stands in for the store. Packages are checked whole each time;
one that was damaged is fetched again while the store can be reached.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cromss_dist.errors import OutputExistsError, PackageError, RegistryError, StorageError, UnknownEncoderError
from cromss_dist.tracking.package.folder import FILES, place
from cromss_dist.tracking.registry.entry import RegisteredEncoder, parse_ref
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.registry.stored import check_same
from cromss_dist.tracking.store import tracking_uri

_log = logging.getLogger(__name__)
_DIGEST_CHARS = 16  # of a sha256 in a folder's name; the whole is compared
_OFFLINE = {"": False, "0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True)
class CachedPackage:
    """A package on this machine, checked.

    Args:
        ref: `name/version`.
        folder: Of the package.
        seen: When the store last said that the reference meant it, UTC.
        offline: Whether the store was not asked now.
    """

    ref: str
    folder: Path
    seen: datetime
    offline: bool

    @property
    def age(self) -> str:
        """Time since the store was asked, in words."""
        return _age(self.seen)


def cached_package(
    ref: str, *, tracking_uri: str | None = None, cache: str | Path | None = None, offline: bool = False
) -> CachedPackage:
    """The package that a reference means, fetched into the cache unless it is there.

    Args:
        ref: `name@alias` or `name/version`, as `Registry.resolve` takes it.
        tracking_uri: Of the store.
        cache: Folder; None: `CROMSS_CACHE`, else `~/.cache/cromss`.
        offline: Ask no store: take what the reference meant when it was last asked. `CROMSS_OFFLINE=1` means the same.

    Raises:
        UnknownEncoderError: the store has no such model, version or alias.
        RegistryError: the store cannot be reached (the message names what the cache has), or the cache has never seen the
            reference.
        PackageError: the package is not whole in the store; or, offline, in the cache.
        StorageError: the cache cannot be written.
    """
    return Cache(tracking_uri, cache).get(ref, offline or offline_by_environment())


class Cache:
    """The packages and references that one machine has seen of one store.

    Args:
        uri: Of the store; None as in `tracking_uri`.
        root: Folder; None: `CROMSS_CACHE`, else `~/.cache/cromss`. Shared by all stores.
    """

    def __init__(self, uri: str | None = None, root: str | Path | None = None) -> None:
        self.uri = tracking_uri(uri)
        try:
            self.root = Path(root or os.environ.get("CROMSS_CACHE") or "~/.cache/cromss").expanduser().absolute()
        except RuntimeError as error:  # a container's user may have no home
            raise StorageError(f"No place for fetched packages: {error}. Name a folder in CROMSS_CACHE.") from error
        # Hashed: a reference means something else in another store, and an address is nobody's to find here.
        self._seen = self.root / "seen" / hashlib.sha256(self.uri.encode()).hexdigest()[:_DIGEST_CHARS]

    def get(self, ref: str, offline: bool = False) -> CachedPackage:
        """As `cached_package`."""
        parse_ref(ref)  # before the store is looked for: a mistyped folder is not a missing store
        if not offline:
            return self._asked(ref)
        kept = self._kept(ref)
        _log.warning("offline: %s is %s, as the store said %s ago", ref, kept.ref, kept.age)
        return kept

    def copy(self, ref: str, destination: Path) -> CachedPackage:
        """Writes the package that a reference meant last to a folder of one's own, without asking the store.

        Raises:
            OutputExistsError: `destination` is there and is not that package.
        """
        kept = self._kept(ref)
        digest = self._record(ref)["card_sha256"]
        if os.path.lexists(destination):
            check_same(destination, kept.ref, digest)
        else:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
                draft = Path(scratch) / destination.name
                draft.mkdir()
                for name in sorted(FILES):
                    shutil.copyfile(kept.folder / name, draft / name)
                check_same(draft, kept.ref, digest)
                try:
                    place(draft, destination)
                except OutputExistsError:
                    check_same(destination, kept.ref, digest)
        return CachedPackage(kept.ref, destination, kept.seen, offline=True)

    def _asked(self, ref: str) -> CachedPackage:
        try:
            registry = Registry(self.uri)
            entry = registry.resolve(ref)
        except UnknownEncoderError:
            raise
        except RegistryError as error:
            try:
                kept = self._kept(ref)
            except (RegistryError, PackageError):
                raise error from None
            raise RegistryError(
                f"{error} The cache {self.root} has it as {kept.ref}, {kept.age} old; take that with --offline, offline=True "
                "or CROMSS_OFFLINE=1."
            ) from error
        try:
            folder = self._whole(registry, entry)
        except OSError as error:
            raise StorageError(
                f"{entry.ref} cannot be kept in the cache {self.root}: {error}. Name another folder in CROMSS_CACHE."
            ) from error
        now = time.time()
        record = {"name": entry.name, "version": entry.version, "card_sha256": entry.card_sha256, "time": now}
        try:
            for known_as in dict.fromkeys((ref, entry.ref)):
                self._remember(known_as, record)
        except OSError as error:  # a cache that others fill
            _log.warning("what %s means cannot be noted for use without network: %s", ref, error)
        return CachedPackage(entry.ref, folder, datetime.fromtimestamp(now, UTC), offline=False)

    def _whole(self, registry: Registry, entry: RegisteredEncoder) -> Path:
        """The kept package of a version, fetched if it is missing and again if it was damaged."""
        folder = self._folder(entry.name, entry.version, entry.card_sha256)
        try:
            return registry.pull(entry.ref, folder)
        except (PackageError, OutputExistsError) as damage:
            if not os.path.lexists(folder):  # it is the store's that is not whole
                raise
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
                fresh = registry.pull(entry.ref, Path(scratch) / "fresh")  # first, so that nothing is lost if this fails
                with contextlib.suppress(FileNotFoundError):  # of two processes that mend it, one finds it moved away
                    os.rename(folder, Path(scratch) / "damaged")
                with contextlib.suppress(OutputExistsError):
                    place(fresh, folder)
            _log.warning("fetched %s again: %s", entry.ref, damage)
            return check_same(folder, entry.ref, entry.card_sha256)

    def _kept(self, ref: str) -> CachedPackage:
        record = self._record(ref)
        known_as = f"{record['name']}/{record['version']}"
        folder = self._folder(record["name"], record["version"], record["card_sha256"])
        if not folder.is_dir():
            raise RegistryError(
                f"Offline: {ref} was {known_as} when {self.uri} was last asked, and {folder} is gone. Pull it while the "
                "store can be reached."
            )
        check_same(folder, known_as, record["card_sha256"])
        return CachedPackage(known_as, folder, record["time"], offline=True)

    def _record(self, ref: str) -> dict[str, Any]:
        path = self._file(ref)
        try:
            record = json.loads(path.read_text())
            if parse_ref(ref)["name"] != record["name"] or type(record["version"]) is not int:
                raise ValueError("it is of another model")
            seen = datetime.fromtimestamp(float(record["time"]), UTC)
            return {**record, "time": seen, "card_sha256": str(record["card_sha256"])}
        except FileNotFoundError:
            raise RegistryError(
                f"Offline: {ref} of {self.uri} was never fetched to {self.root}. Run cromss registry pull {ref} while the store "
                "can be reached, or give the cache that has it in CROMSS_CACHE."
            ) from None
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, OSError) as error:
            raise RegistryError(
                f"Offline: {path} is damaged ({error!r}). Pull {ref} again while the store can be reached."
            ) from error

    def _remember(self, ref: str, record: Mapping[str, Any]) -> None:
        """Written whole or not at all, one file a reference: many processes may fetch at once."""
        path = self._file(ref)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
            draft = Path(scratch) / path.name
            draft.write_text(json.dumps(record))
            os.replace(draft, path)

    def _file(self, ref: str) -> Path:
        match = parse_ref(ref)
        meant = f"@{match['alias']}" if match["alias"] else f":{match['version']}"
        return self._seen / f"{match['name']}{meant}.json"

    def _folder(self, name: str, version: int, digest: str) -> Path:
        return self.root / name / f"{version}-{digest[:_DIGEST_CHARS]}"


def offline_by_environment() -> bool:
    """Whether `CROMSS_OFFLINE` says so.

    Raises:
        RegistryError: it says neither.
    """
    said = os.environ.get("CROMSS_OFFLINE", "")
    if said.lower() not in _OFFLINE:
        raise RegistryError(f"CROMSS_OFFLINE={said!r} is not allowed; set it to 1 to use what the cache has, or to 0.")
    return _OFFLINE[said.lower()]


def _age(seen: datetime) -> str:
    seconds = (datetime.now(UTC) - seen).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if (count := int(seconds // length)) >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"

"""The registry of encoders: named models, numbered versions, movable aliases, on MLflow's model registry.

A version is an encoder package among the artifacts of the run that trained it; `stored` fetches and checks it.
"""

import builtins
import difflib
import gc
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist.errors import OutputExistsError, PackageError, UnknownEncoderError
from cromss_dist.failpoint import failpoint
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.package.folder import card_sha256, check_package, place
from cromss_dist.tracking.registry.entry import (
    CARD_TAG,
    EVIDENCE_TAGS,
    FACTS_TAG,
    VERIFIED_TAG,
    RegisteredEncoder,
    card_facts,
    check_alias,
    check_name,
    parse_ref,
)
from cromss_dist.tracking.registry.history import move_alias
from cromss_dist.tracking.registry.stored import ARTIFACT_FOLDER, Stored, check_same
from cromss_dist.tracking.store import connect, mlflow_errors, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

_MAX_NAMED = 12  # models, versions or aliases that an error lists


class Registry:
    """The encoders registered in one MLflow store.

    Args:
        uri: MLflow tracking URI; None as in `tracking_uri`. It must exist: looking up creates nothing.

    Raises:
        RegistryError: there is no such store.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = tracking_uri(uri)
        self.client: MlflowClient = connect(self.uri)

    def register(
        self, folder: Path, name: str, run_id: str, alias: str = "candidate", tags: Mapping[str, str] | None = None
    ) -> RegisteredEncoder:
        """Stores a package with its run, makes it a new version of `name`, and moves `alias` to it.

        It can be repeated after a cut: a package that the run has registered already keeps its version, and an alias that
        has moved on since stays. The version is marked as verified after the stored package was fetched back and is byte
        for byte the one given, and the alias moves last; a process killed on the way leaves a version that no search
        shows. If the package does not come back whole, the version is deleted again.

        Args:
            folder: An encoder package.
            name: Model name; created if missing.
            run_id: MLflow's id of the run that it belongs to.
            alias: Alias to move.
            tags: Tags of the version, beside those from the card.

        Raises:
            PackageError: the package is not whole, here or after storing.
            RegistryError: the name, alias or run is not allowed or known, or the store cannot be reached.
        """
        check_name(name)
        check_alias(alias)
        card = check_package(folder)
        digest = card_sha256(card)
        path = f"{ARTIFACT_FOLDER}/{name}-{digest[:16]}"  # a package of other content never overwrites it
        with mlflow_errors(f"{name!r} cannot be registered in {self.uri}"):
            root = self.client.get_run(run_id).info.artifact_uri
            entry = self._registered(name, run_id, digest)
            if entry is None or not entry.verified:
                self.client.log_artifacts(run_id, str(folder), path)
                failpoint("registry.stored")
            if entry is None:
                self._create_model(name)
                every_tag = {**(tags or {}), **_tags(card), CARD_TAG: digest}
                created = self.client.create_model_version(
                    name, f"{root}/{path}", run_id=run_id, tags=every_tag, await_creation_for=0
                )
                entry = RegisteredEncoder.of(created, ())
                failpoint("registry.created")
            if not entry.verified:
                try:
                    self.stored(entry).examine()
                except PackageError:  # whatever else cuts it, the next attempt goes on with this version
                    self.client.delete_model_version(name, str(entry.version))
                    raise
                failpoint("registry.examined")
                self.client.set_model_version_tag(name, str(entry.version), VERIFIED_TAG, "true")
                failpoint("registry.verified")
            move_alias(self.client, name, alias, entry.version, "register")
        return self.resolve(entry.ref)

    def list(self, narrowed: str = "") -> tuple[RegisteredEncoder, ...]:
        """Every version of every model, by name, newest version first.

        Args:
            narrowed: MLflow's filter string for versions.
        """
        with _uncollected(), mlflow_errors(f"The registry in {self.uri} cannot be read"):
            aliases = {model.name: model.aliases for model in self.models()}
            versions = _pages(self.client.search_model_versions, narrowed)
        entries = (
            RegisteredEncoder.of(
                v, tuple(key for key, number in aliases.get(v.name, {}).items() if int(number) == int(v.version))
            )
            for v in versions
        )
        return tuple(sorted(entries, key=lambda entry: (entry.name, -entry.version)))

    def models(self) -> "builtins.list[RegisteredModel]":
        """Every model, as MLflow has it: its aliases, and tags with their history."""
        with mlflow_errors(f"The registry in {self.uri} cannot be read"):
            return _pages(self.client.search_registered_models)

    def resolve(self, ref: str) -> RegisteredEncoder:
        """The version a reference means: one look-up, however many versions there are.

        Args:
            ref: `name@alias`, `name/version` or `name:version`, with or without `models:/` before it.

        Raises:
            UnknownEncoderError: the model, alias or version is not in the registry; the message names those that are.
            RegistryError: not a reference, or the store cannot be reached.
        """
        from mlflow.exceptions import MlflowException

        match = parse_ref(ref)
        name, alias, version = match["name"], match["alias"], match["version"]
        with mlflow_errors(f"{ref} cannot be looked up in {self.uri}"):
            try:
                if version:
                    return RegisteredEncoder.of(self.client.get_model_version(name, version))
                if alias and alias.lower() != "latest":  # MLflow's own word for the highest number, whatever that is
                    return RegisteredEncoder.of(self.client.get_model_version_by_alias(name, alias))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
            raise self._unknown(match)

    def stored(self, entry: RegisteredEncoder) -> Stored:
        """What the store holds for a version."""
        return Stored(self.client, self.uri, entry)

    def card(self, ref: str) -> tuple[RegisteredEncoder, EncoderCard]:
        """A version and its card: that one file is fetched, and is the one that was registered.

        Raises:
            RegistryError: as in `resolve`.
            PackageError: the store holds no card or another one.
        """
        entry = self.resolve(ref)
        return entry, self.stored(entry).card()

    def pull(self, ref: str, destination: Path) -> Path:
        """Fetches a version's package and checks every hash; `destination` appears whole or not at all.

        Returns:
            `destination`. If it holds that very package already, nothing is fetched.

        Raises:
            RegistryError: as in `resolve`.
            PackageError: the stored package, or the one at `destination`, is not whole.
            OutputExistsError: `destination` is there and is no package, or another one.
        """
        entry = self.resolve(ref)
        if os.path.lexists(destination):
            return check_same(destination, entry.ref, entry.card_sha256)
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
            draft = Path(scratch) / destination.name
            draft.mkdir()
            self.stored(entry).fetch(draft)
            try:
                place(draft, destination)
            except OutputExistsError:  # another process pulled at the same time
                return check_same(destination, entry.ref, entry.card_sha256)
        return destination

    def add_evidence(self, ref: str, measured: Evidence) -> RegisteredEncoder:
        """Adds what was measured downstream after registering; it replaces evidence of the same key.

        Raises:
            RegistryError: as in `resolve`.
        """
        entry = self.resolve(ref)
        with mlflow_errors(f"Evidence for {entry.ref} cannot be stored in {self.uri}"):
            tag = f"{EVIDENCE_TAGS}{measured.key}"
            self.client.set_model_version_tag(entry.name, str(entry.version), tag, measured.to_json())
        return self.resolve(entry.ref)

    def _registered(self, name: str, run_id: str, digest: str) -> RegisteredEncoder | None:
        """The version that this package has already, of two the older."""
        narrowed = f"name = '{name}' AND run_id = '{run_id}' AND tags.`{CARD_TAG}` = '{digest}'"
        same = [RegisteredEncoder.of(version, ()) for version in _pages(self.client.search_model_versions, narrowed)]
        return min(same, key=lambda entry: entry.version, default=None)

    def _create_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _unknown(self, match: re.Match[str]) -> UnknownEncoderError:
        name, alias, version = match["name"], match["alias"], match["version"]
        models = {model.name: model.aliases for model in self.models()}
        if name not in models:
            near = difflib.get_close_matches(name, models, _MAX_NAMED, 0) if len(models) > _MAX_NAMED else sorted(models)
            more = f" and {len(models) - len(near)} more" if len(models) > len(near) else ""
            return UnknownEncoderError(f"No model {name!r} in {self.uri}; it has {', '.join(near) or 'none yet'}{more}.")
        newest = self.client.search_model_versions(
            f"name = '{name}'", max_results=_MAX_NAMED + 1, order_by=["version_number DESC"]
        )
        numbers = [str(found.version) for found in newest[:_MAX_NAMED]]
        listed = ", ".join(reversed(numbers)) + (" and earlier ones" if len(newest) > _MAX_NAMED else "")
        wanted = f"version {version}" if version else f"alias {alias!r}"
        problem = f"has no {wanted}" if version or alias else "needs an alias or a version"
        return UnknownEncoderError(
            f"Model {name!r} {problem}; it has versions {listed or 'none'} and aliases "
            f"{', '.join(f'@{alias}' for alias in sorted(models[name])[:_MAX_NAMED]) or 'none'}. "
            f"Write {name}@<alias> or {name}/<version>."
        )


def _tags(card: EncoderCard) -> dict[str, str]:
    return {FACTS_TAG: card_facts(card)} | {f"{EVIDENCE_TAGS}{item.key}": item.to_json() for item in card.evidence}


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which takes half of the time while MLflow makes an object for each row of thousands."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _pages(search: Callable[..., Any], narrowed: str = "") -> builtins.list[Any]:
    """Every result of one of MLflow's paged searches."""
    results, token = [], None
    while True:
        page = search(filter_string=narrowed or None, page_token=token)
        results.extend(page)
        token = page.token
        if not token:
            return results

"""The registry of encoders: named models, numbered versions, movable aliases, on MLflow's model registry.

A version is an encoder package among the artifacts of the run that trained it. Files are fetched one by one under
their two allowed names and checked by hash; MLflow's own model loading, which can execute code, is never used.
"""

import builtins
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist.errors import OutputExistsError, PackageError, RegistryError
from cromss_dist.tracking.package.card import CARD_FILE, WEIGHTS_FILE, EncoderCard
from cromss_dist.tracking.package.folder import FILES, card_sha256, check_package, place
from cromss_dist.tracking.store import connect, mlflow_errors, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_CARD_TAG = "card_sha256"  # what a version's package must hash to; set when it is registered
_VERIFIED_TAG = "verified"
_ARTIFACT_FOLDER = "encoders"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REF = re.compile(rf"(?:models:/)?(?P<name>{_NAME})(?:@(?P<alias>[A-Za-z0-9_-]+)|[/:](?P<version>[0-9]+))?")


@dataclass(frozen=True)
class RegisteredEncoder:
    """One version of a model in the registry."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    source: str
    created: datetime
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        """The reference that always means this version."""
        return f"{self.name}/{self.version}"

    @property
    def verified(self) -> bool:
        """Whether the package was read back from the store and found whole when it was registered."""
        return self.tags.get(_VERIFIED_TAG) == "true"


class Registry:
    """The encoders registered in one MLflow store.

    Args:
        uri: MLflow tracking URI; None as in `tracking_uri`. It must exist: looking up creates nothing.

    Raises:
        RegistryError: there is no such store.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = tracking_uri(uri)
        self._client: MlflowClient = connect(self.uri)

    def register(
        self, folder: Path, name: str, run_id: str, alias: str = "candidate", tags: Mapping[str, str] | None = None
    ) -> RegisteredEncoder:
        """Stores a package with its run, makes it a new version of `name`, and moves `alias` to it.

        A package that the run has registered already keeps its version, so that a registering that was cut can be repeated.
        The alias moves last, after the stored package was fetched back and is byte for byte the one given. If that
        fails the version is deleted again and the alias stays where it was.

        Args:
            folder: An encoder package.
            name: Model name; created if missing.
            run_id: Run that trained it.
            alias: Alias to move.
            tags: Tags of the version, beside those from the card.

        Raises:
            PackageError: the package is not whole, here or after storing.
            RegistryError: the name, alias or run is not allowed or known, or the store cannot be reached.
        """
        if not re.fullmatch(_NAME, name):
            raise RegistryError(
                f"Model name {name!r} is not allowed; use letters, digits, '.', '_' and '-', starting with a letter or digit."
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", alias) or alias == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
            raise RegistryError(
                f"Alias {alias!r} is not allowed; use letters, digits, '_' and '-', but not 'latest' or 'v<number>'."
            )
        card = check_package(folder)
        digest = card_sha256(card)
        path = f"{_ARTIFACT_FOLDER}/{name}-{digest[:16]}"  # a package of other content never overwrites it
        with mlflow_errors(f"{name!r} cannot be registered in {self.uri}"):
            self._client.log_artifacts(run_id, str(folder), path)
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{path}"
            self._create_model(name)
            same = (e for e in self.list() if (e.name, e.run_id, e.tags.get(_CARD_TAG)) == (name, run_id, digest))
            if not (entry := next(same, None)):
                every_tag = {**(tags or {}), **_card_tags(card), _CARD_TAG: digest}
                created = self._client.create_model_version(name, source, run_id=run_id, tags=every_tag, await_creation_for=0)
                entry = _entry(created, ())
            try:
                self._peek(entry)
            except BaseException:
                self._client.delete_model_version(name, str(entry.version))
                raise
            self._client.set_model_version_tag(name, str(entry.version), _VERIFIED_TAG, "true")
            self._client.set_registered_model_alias(name, alias, str(entry.version))
        return self.resolve(entry.ref)

    def list(self) -> tuple[RegisteredEncoder, ...]:
        """Every version of every model, by name, newest version first."""
        with mlflow_errors(f"The registry in {self.uri} cannot be read"):
            aliases = {m.name: m.aliases for m in _pages(self._client.search_registered_models)}
            versions = _pages(self._client.search_model_versions)
        entries = [_entry(version, _aliases_of(version, aliases.get(version.name, {}))) for version in versions]
        return tuple(sorted(entries, key=lambda entry: (entry.name, -entry.version)))

    def resolve(self, ref: str) -> RegisteredEncoder:
        """The version a reference means.

        Args:
            ref: `name@alias`, `name/version` or `name:version`, with or without `models:/` before it.

        Raises:
            RegistryError: not a reference, or the model, alias or version is not in the registry; the message names
                those that are.
        """
        match = parse_ref(ref)
        every = self.list()
        versions = [entry for entry in every if entry.name == match["name"]]
        if not versions:
            known = sorted({entry.name for entry in every})
            raise RegistryError(f"No model {match['name']!r} in {self.uri}; it has {', '.join(known) or 'none yet'}.")
        for entry in versions:
            if match["alias"] in entry.aliases or match["version"] == str(entry.version):
                return entry
        wanted = f"version {match['version']}" if match["version"] else f"alias {match['alias']!r}"
        problem = f"has no {wanted}" if match["version"] or match["alias"] else "needs an alias or a version"
        aliases = sorted(f"@{alias}" for entry in versions for alias in entry.aliases)
        numbers = sorted(entry.version for entry in versions)
        raise RegistryError(
            f"Model {match['name']!r} {problem}; it has versions {', '.join(map(str, numbers))} and aliases "
            f"{', '.join(aliases) or 'none'}. Write {match['name']}@<alias> or {match['name']}/<version>."
        )

    def show(self, ref: str) -> tuple[RegisteredEncoder, EncoderCard]:
        """A version and its card; the package is fetched and checked for that.

        Raises:
            RegistryError: as in `resolve`.
            PackageError: the stored package is not whole.
        """
        entry = self.resolve(ref)
        return entry, self._peek(entry)

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
            return self._reuse(entry, destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
            draft = Path(scratch) / destination.name
            draft.mkdir()
            self._fetch(entry, draft)
            try:
                place(draft, destination)
            except OutputExistsError:  # another process pulled at the same time
                return self._reuse(entry, destination)
        return destination

    def _reuse(self, entry: RegisteredEncoder, destination: Path) -> Path:
        if not any((destination / name).exists() for name in FILES):
            raise OutputExistsError(
                f"{destination} is there already and is no encoder package; give a new folder for {entry.ref}."
            )
        try:
            digest = card_sha256(check_package(destination))
        except PackageError as error:
            raise PackageError(f"{error} Remove {destination} first.") from None
        if digest != entry.tags.get(_CARD_TAG):
            raise OutputExistsError(
                f"{destination} holds another encoder (card sha256 {digest}) than {entry.ref}; choose another folder."
            )
        return destination

    def _peek(self, entry: RegisteredEncoder) -> EncoderCard:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "package"
            folder.mkdir()
            return self._fetch(entry, folder)

    def _fetch(self, entry: RegisteredEncoder, folder: Path) -> EncoderCard:
        """Downloads the package of `entry` to the existing, empty `folder` and checks it."""
        path = self._artifact_path(entry)
        with mlflow_errors(f"The files of {entry.ref} cannot be fetched from {self.uri}"):
            listed = {Path(file.path).name for file in self._client.list_artifacts(entry.run_id, path)}
            if listed and listed != FILES:
                raise PackageError(
                    f"{entry.ref} has files {sorted(listed)}; a package has exactly {CARD_FILE} and {WEIGHTS_FILE}. "
                    "Do not use it; register the encoder again."
                )
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                for name in sorted(listed):
                    Path(self._client.download_artifacts(entry.run_id, f"{path}/{name}", scratch)).rename(folder / name)
        try:
            card = check_package(folder)
        except PackageError as error:
            raise PackageError(f"{entry.ref} in {self.uri}: {error}") from None
        if card_sha256(card) != entry.tags.get(_CARD_TAG):
            raise PackageError(
                f"{entry.ref} was registered with card sha256 {entry.tags.get(_CARD_TAG)}, the store now holds "
                f"{card_sha256(card)}; its files were exchanged. Register the encoder again."
            )
        return card

    def _artifact_path(self, entry: RegisteredEncoder) -> str:
        """Where the package lies within the run; sources elsewhere (a database takes any) are refused."""
        if not entry.run_id:
            raise RegistryError(f"{entry.ref} belongs to no run; it was not registered by cromss. Use another version.")
        try:
            with mlflow_errors(entry.run_id):
                root = f"{self._client.get_run(entry.run_id).info.artifact_uri}/"
        except RegistryError as error:
            raise PackageError(
                f"{entry.ref}: its run is gone from {self.uri} ({error}). `mlflow gc` deletes a run and its files although "
                "registered versions still point to them; register the encoder again."
            ) from error
        path = entry.source.removeprefix(root)
        if not entry.source.startswith(root) or not re.fullmatch(rf"{_ARTIFACT_FOLDER}/{_NAME}", path):
            raise RegistryError(
                f"{entry.ref} has its files at {entry.source}, outside its run; it was not registered by cromss. Do not use it."
            )
        return path

    def _create_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def parse_ref(ref: str) -> re.Match[str]:
    """The parts of a reference: `name`, and `alias` or `version`. Raises RegistryError if it is none."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise RegistryError(
            f"{ref!r} is neither a package folder nor a reference to an encoder; write name@alias or name/version."
        )
    return match


def _card_tags(card: EncoderCard) -> dict[str, str]:
    """What a list shows without fetching packages."""
    return {
        "modality": card.modality,
        "bands": ",".join(card.bands),
        "encoder": card.encoder,
        "depth": str(card.depth),
        "fusion": card.fusion,
        "licence": card.licence,
    }


def _entry(version: "ModelVersion", aliases: tuple[str, ...]) -> RegisteredEncoder:
    return RegisteredEncoder(
        version.name,
        int(version.version),  # a number from a database, text from a server
        aliases,
        version.run_id or "",
        version.source or "",
        datetime.fromtimestamp((version.creation_timestamp or 0) / 1000, UTC),
        dict(version.tags),
    )


def _aliases_of(version: "ModelVersion", aliases: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(alias for alias, number in aliases.items() if int(number) == int(version.version)))


def _pages(search: Any) -> builtins.list[Any]:
    """Every result of one of MLflow's paged searches."""
    results, token = [], None
    while True:
        page = search(page_token=token)
        results.extend(page)
        token = page.token
        if not token:
            return results

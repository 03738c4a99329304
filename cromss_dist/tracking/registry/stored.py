"""What a store holds for one version: its run, and the package's files, fetched one by one and checked by hash.

MLflow's own model loading, which can execute code, is never used.
"""

import re
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cromss_dist.errors import OutputExistsError, PackageError, RegistryError
from cromss_dist.tracking.package.card import CARD_FILE, EncoderCard
from cromss_dist.tracking.package.folder import FILES, card_sha256, check_package
from cromss_dist.tracking.registry.entry import NAME, RegisteredEncoder
from cromss_dist.tracking.store import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARTIFACT_FOLDER = "encoders"


class Stored:
    """The run and the package of a version, in the store.

    Args:
        client: Of the store.
        uri: Of the store, for messages.
        entry: The version.
    """

    def __init__(self, client: "MlflowClient", uri: str, entry: RegisteredEncoder) -> None:
        self.entry = entry
        self._client, self._uri = client, uri

    @cached_property
    def run(self) -> "Run":
        """The run that the version belongs to, which may have been deleted and not yet be gone.

        Raises:
            PackageError: it is gone.
            RegistryError: the version belongs to none, or the store cannot be reached.
        """
        from mlflow.exceptions import MlflowException

        ref, run_id = self.entry.ref, self.entry.run_id
        if not run_id:
            raise RegistryError(f"{ref} belongs to no run; it was not registered by cromss. Use another version.")
        with mlflow_errors(f"The run of {ref} cannot be read from {self._uri}"):
            try:
                return self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise PackageError(
                    f"{ref}: its run {run_id} is gone from {self._uri}. `mlflow gc` deletes a run and its files although "
                    "registered versions still point to them; register the encoder again."
                ) from error

    def listed(self) -> set[str]:
        """Names of the files that are there; none if `mlflow gc` deleted them.

        Raises:
            PackageError: its run is gone.
            RegistryError: its files lie outside its run, or the store cannot be reached.
        """
        path = self._path()
        with mlflow_errors(f"The files of {self.entry.ref} cannot be listed in {self._uri}"):
            return {Path(file.path).name for file in self._client.list_artifacts(self.entry.run_id, path)}

    def card(self) -> EncoderCard:
        """Its card: that one file is fetched, and is the one that was registered.

        Raises:
            PackageError: the store holds no card or another one.
            RegistryError: as in `listed`.
        """
        path = f"{self._path()}/{CARD_FILE}"
        with tempfile.TemporaryDirectory() as scratch:
            try:
                with mlflow_errors(f"{self.entry.ref} in {self._uri}"):
                    fetched = self._client.download_artifacts(self.entry.run_id, path, scratch)
                    text = Path(fetched).read_text(errors="replace")
            except (RegistryError, OSError) as error:  # MLflow's words for a missing file differ from store to store
                if CARD_FILE in self.listed():
                    raise
                raise PackageError(
                    f"{self.entry.ref} in {self._uri}: {CARD_FILE} cannot be fetched ({error}). If `mlflow gc` deleted it, "
                    "register the encoder again."
                ) from error
        card = EncoderCard.from_json(text)
        self._check_digest(card)
        return card

    def fetch(self, folder: Path) -> EncoderCard:
        """Downloads the package to an existing, empty folder and checks every hash.

        Raises:
            PackageError: the stored package is not whole.
            RegistryError: as in `listed`.
        """
        path, listed = self._path(), self.listed()
        if listed and listed != FILES:
            raise PackageError(
                f"{self.entry.ref} has files {sorted(listed)}; a package has exactly {', '.join(sorted(FILES))}. "
                "Do not use it; register the encoder again."
            )
        with (
            mlflow_errors(f"The files of {self.entry.ref} cannot be fetched from {self._uri}"),
            tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        ):
            for name in sorted(listed):
                fetched = self._client.download_artifacts(self.entry.run_id, f"{path}/{name}", scratch)
                Path(fetched).rename(folder / name)
        try:
            card = check_package(folder)
        except PackageError as error:
            raise PackageError(f"{self.entry.ref} in {self._uri}: {error}") from None
        self._check_digest(card)
        return card

    def examine(self, also: Callable[[Path], object] | None = None) -> EncoderCard:
        """Fetches the whole package, checks every hash, and forgets it.

        Args:
            also: A further check of the package's folder, which raises what is wrong.

        Raises:
            PackageError: the stored package is not whole.
            RegistryError: as in `listed`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "package"
            folder.mkdir()
            card = self.fetch(folder)
            if also is not None:
                also(folder)
            return card

    def _path(self) -> str:
        """Where the package lies within the run; sources elsewhere (a database takes any) are refused."""
        root, source = f"{self.run.info.artifact_uri}/", self.entry.source
        path = source.removeprefix(root)
        if not source.startswith(root) or not re.fullmatch(rf"{ARTIFACT_FOLDER}/{NAME}-[0-9a-f]{{16}}", path):
            raise RegistryError(
                f"{self.entry.ref} has its files at {source}, outside its run; it was not registered by cromss. Do not use it."
            )
        return path

    def _check_digest(self, card: EncoderCard) -> None:
        if card_sha256(card) != self.entry.card_sha256:
            raise PackageError(
                f"{self.entry.ref} was registered with card sha256 {self.entry.card_sha256 or 'none'}, the store {self._uri} "
                f"now holds {card_sha256(card)}; its files were exchanged. Register the encoder again."
            )


def check_same(folder: Path, ref: str, digest: str) -> Path:
    """The folder, which is there already, if it holds the package with this card.

    Raises:
        PackageError: it holds a package that is not whole.
        OutputExistsError: it is no package, or another one.
    """
    if not any((folder / name).exists() for name in FILES):
        raise OutputExistsError(f"{folder} is there already and is no encoder package; give a new folder for {ref}.")
    try:
        found = card_sha256(check_package(folder))
    except PackageError as error:
        raise PackageError(f"{error} Remove {folder} first.") from None
    if found != digest:
        raise OutputExistsError(f"{folder} holds another encoder (card sha256 {found}) than {ref}; choose another folder.")
    return folder

"""The copy of a run in one MLflow store: found or made, and brought up to its spool. Sending anything again changes nothing."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cromss_dist.errors import RegistryError
from cromss_dist.tracking.package.folder import card_sha256, check_package
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.run.requests import Fold, Registration, Requests, RunName
from cromss_dist.tracking.run.spool import EVENTS_FILE, Tail
from cromss_dist.tracking.store import artifact_root, connect, initialise_store, mlflow_errors, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SHIPPED_FILE = "shipped.json"
RUN_TAG, HEARTBEAT_TAG = "cromss.run", "cromss.heartbeat"
_CHUNK = 1 << 18  # bytes of the spool between two watermarks: about ten thousand points
_MAX_BATCH = 1000  # points that MLflow takes in one request
_MAX_DIGEST = 36  # characters that MLflow keeps of a dataset's digest


class Replica:
    """Sends what the spool of a run has beyond its copy in a store.

    The store's run is the one whose tag `cromss.run` is the run's own id; a missing one is made, also where it was deleted. The
    file `shipped.json` says how much of the spool is there; without it all is sent again.

    Args:
        run_dir: Folder of the run.
        uri: MLflow tracking URI. A missing SQLite store is created.
        tell: Takes a line about what was done.
        again: Whether all is sent, whatever `shipped.json` says.

    Raises:
        RegistryError: the URI is of a kind that cannot hold runs.
    """

    def __init__(self, run_dir: Path, uri: str, tell: Callable[[str], None], again: bool = False) -> None:
        self.run_dir, self.uri = run_dir, tracking_uri(uri)
        self.run_id: str | None = None
        """Of the run in the store."""
        self.registered: dict[str, int] = {}
        """Model name -> version of the run's encoders."""
        self._tell, self._again = tell, again
        self._fold = Fold()
        self._tail = Tail(run_dir / EVENTS_FILE)
        self._pending: Requests | None = None
        self._sent = 0  # bytes of the spool that the store has
        self._client: MlflowClient | None = None
        self._cards: dict[str, str] = {}  # of what is registered, by model

    @property
    def status(self) -> str:
        """Of the run, as far as its spool was read."""
        return self._fold.status

    def send(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Sends all that is in the spool now. After an error, calling again goes on with what was left.

        Args:
            progress: Takes the bytes of the spool that are done.

        Raises:
            RegistryError: the store cannot be reached, or refuses.
            PackageError: an encoder that is to be registered is not whole.
            StorageError: the spool cannot be read.
        """
        while True:
            if self._pending is None:
                lines = self._tail.read(_CHUNK, synced=True)  # what a crash took back must not be in the store, either
                if not lines:
                    return
                self._pending = self._fold.add(lines)
            if self._fold.run is not None:
                if self._client is None:
                    self._client = self._open(self._fold.run)
                if self._tail.offset > self._sent:
                    with mlflow_errors(f"The figures of {self.run_dir} cannot be sent to {self.uri}"):
                        self._ask(self._client, self._pending)
                    self._sent = self._tail.offset
                    _write_watermark(self.run_dir, self.uri, str(self.run_id), self._sent)
            self._pending = None
            progress(self._tail.offset)

    def beat(self, time_s: float) -> None:
        """Leaves a sign of life of a run that has not ended, also where someone took it for dead.

        Raises:
            RegistryError: the store cannot be reached.
        """
        if self._client is None or self.run_id is None or self.status != "RUNNING":
            return
        with mlflow_errors(f"{self.uri} takes no sign of life of {self.run_dir}"):
            self._client.set_tag(self.run_id, HEARTBEAT_TAG, f"{time_s:.0f}")
            self._client.update_run(self.run_id, status="RUNNING")

    def _open(self, name: RunName) -> "MlflowClient":
        """Finds or makes the run in the store, and what it has."""
        initialise_store(self.uri)
        client = connect(self.uri)
        with mlflow_errors(f"Run {name.name!r} cannot be found or made in {self.uri}"):
            run_id, sent = (None, 0) if self._again else read_watermark(self.run_dir, self.uri)
            run = None if run_id is None else _run_of(client, run_id)
            if run is None or run.data.tags.get(RUN_TAG) != name.run:
                run, sent = _found_or_made(client, self.uri, name), 0
            for key, value in run.data.tags.items():
                if key.startswith("registered/"):
                    card, _, version = value.partition(" ")
                    model = key.removeprefix("registered/")
                    self._cards[model], self.registered[model] = card, int(version)
        self.run_id, self._sent = run.info.run_id, sent
        return client

    def _ask(self, client: "MlflowClient", requests: Requests) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        run_id = str(self.run_id)
        params = [Param(key, value) for key, value in requests.params.items()]
        tags = [RunTag(key, value) for key, value in requests.tags.items()]
        tags.append(RunTag(HEARTBEAT_TAG, str(self._fold.last_ms // 1000)))
        client.log_batch(run_id, params=params, tags=tags, synchronous=True)
        points = [Metric(point.key, point.value, point.time_ms, point.step) for point in requests.points]
        for start in range(0, len(points), _MAX_BATCH):
            client.log_batch(run_id, metrics=points[start : start + _MAX_BATCH], synchronous=True)
        for use in requests.datasets:
            dataset = Dataset(use.name, use.digest[:_MAX_DIGEST], source_type="local", source=json.dumps({"uri": use.source}))
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        for artifact, path in requests.artifacts.items():
            if (self.run_dir / path).is_file():
                client.log_artifact(run_id, str(self.run_dir / path), os.path.dirname(artifact) or None)
            else:
                self._tell(f"{path} is no more in {self.run_dir}, and so not sent to {self.uri}")
        for registration in requests.registrations:
            self._register(client, registration)
        if requests.status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        elif requests.status:
            client.set_terminated(run_id, status=requests.status, end_time=requests.end_ms)

    def _register(self, client: "MlflowClient", registration: Registration) -> None:
        """Registers an encoder, unless that was done: a run that is sent again must not take an alias from a newer one."""
        model = registration.model
        if self._cards.get(model) == registration.card:
            return
        folder = self.run_dir / registration.package
        if card_sha256(check_package(folder)) != registration.card:
            self._tell(f"{folder} holds another encoder by now than the one for {model}, which is not registered")
            return
        run_id = str(self.run_id)
        version = Registry(self.uri).register(folder, model, run_id, alias=registration.alias).version
        client.set_tag(run_id, f"registered/{model}", f"{registration.card} {version}")
        self._cards[model], self.registered[model] = registration.card, version
        self._tell(f"registered {model} version {version} as @{registration.alias}")


def read_watermark(run_dir: Path, uri: str) -> tuple[str | None, int]:
    """The run in a store that has the spool of a run's folder, and how many bytes of it; None and 0 where that is not known."""
    entry = _read_shipped(run_dir).get(tracking_uri(uri))
    return (str(entry["run_id"]), int(entry["offset"])) if entry else (None, 0)


def _read_shipped(run_dir: Path) -> dict[str, dict[str, str | int]]:
    try:
        content: dict[str, dict[str, str | int]] = json.loads((run_dir / SHIPPED_FILE).read_text())
        return content
    except (FileNotFoundError, ValueError):  # a crash may have torn it: it costs the time of sending again
        return {}


def _write_watermark(run_dir: Path, uri: str, run_id: str, offset: int) -> None:
    path = run_dir / SHIPPED_FILE
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_text(json.dumps(_read_shipped(run_dir) | {uri: {"run_id": run_id, "offset": offset}}, indent=2) + "\n")
    draft.replace(path)


def _run_of(client: "MlflowClient", run_id: str) -> "Run | None":
    """A run that the store has; one that was deleted, and could be restored, takes nothing."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _found_or_made(client: "MlflowClient", uri: str, name: RunName) -> "Run":
    """The run with the id `name.run` in its tag. Of several, of which each was made before its maker saw another, the oldest."""
    experiment = _experiment_id(client, uri, name.experiment)

    def found() -> "list[Run]":
        runs = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{name.run}'", order_by=["attributes.start_time"])
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    runs = found()
    if not runs:
        tags = {RUN_TAG: name.run, HEARTBEAT_TAG: str(name.time_ms // 1000)}
        client.create_run(experiment, start_time=name.time_ms, tags=tags, run_name=name.name)
        runs = found()  # MLflow's client repeats a request whose reply is lost
    for other in runs[1:]:
        client.delete_run(other.info.run_id)
    return runs[0]


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """The id of an experiment, created if missing; ids, because MLflow's by-name call can fall back to another one."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        root = artifact_root(uri)
        try:
            return client.create_experiment(name, artifact_location=None if root is None else root.as_uri())
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another process was first
                raise
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise RegistryError(
            f"Experiment {name!r} in {uri} was deleted; restore it with `mlflow experiments restore` or choose another name."
        )
    return str(found.experiment_id)

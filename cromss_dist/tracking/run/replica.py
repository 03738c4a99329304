"""The copy of a run in one MLflow store: found or made, and brought up to its spool. Sending anything again changes nothing."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist.errors import CromssError, PackageError, RegistryError
from cromss_dist.tracking.package.folder import card_sha256, check_package
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.run.requests import Fold, Registration, Requests, RunName, name_for_mlflow
from cromss_dist.tracking.run.spool import EVENTS_FILE, Tail, read_events
from cromss_dist.tracking.store import artifact_root, connect, initialise_store, mlflow_errors, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SHIPPED_FILE = "shipped.json"
RUN_TAG, HEARTBEAT_TAG = "cromss.run", "cromss.heartbeat"
_CHUNK = 1 << 18  # bytes of the spool between two watermarks: about ten thousand points
_MAX_BATCH = 500  # points in one request; with parameters and tags MLflow takes 1,000 things
_MAX_NOTE = 5000  # characters of a tag
_MAX_DIGEST = 36  # characters that MLflow keeps of a dataset's digest
_CHECKED = 4096  # bytes before a watermark that must be as they were
_FINAL = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


@dataclass(frozen=True)
class Watermark:
    """How much of a spool a store has."""

    run_id: str  # of the run in the store
    offset: int  # bytes of the spool
    fold: Fold  # of these bytes
    unregistered: tuple[str, ...]  # models that the run's encoders are no versions of yet


class Replica:
    """Sends what the spool of a run has beyond its copy in a store.

    The store's run is the one whose tag `cromss.run` is the run's own id; a missing one is made, also where it was deleted. The
    file `shipped.json` says how much of the spool is there; without it all is sent again. After an error, the next sending
    begins where that file says, with a new look at the store, so that nothing rests on what was there before.

    Args:
        run_dir: Folder of the run.
        uri: MLflow tracking URI. A missing SQLite store is created.
        tell: Takes a line about what was done.
        again: Whether all is sent, whatever `shipped.json` says.
        pause: Called after each request with many points.

    Raises:
        RegistryError: the URI is of a kind that cannot hold runs.
    """

    def __init__(
        self,
        run_dir: Path,
        uri: str,
        tell: Callable[[str], None],
        again: bool = False,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir, self.uri = run_dir, tracking_uri(uri)
        self.run_id: str | None = None
        """Of the run in the store."""
        self.registered: dict[str, int] = {}
        """Model name -> version of the run's encoders."""
        self.refused: dict[str, CromssError] = {}
        """Model name -> why the run's encoder is no version of it, and will be none if that is tried again."""
        self._tell, self._again, self._pause = tell, again, pause
        self._client: MlflowClient | None = None
        self._fold, self._tail = Fold(), Tail(run_dir / EVENTS_FILE)
        self._cards: dict[str, str] = {}  # of what is registered, by model
        self._refused_cards: dict[str, str] = {}

    def send(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Sends all that is in the spool now, and then has its encoders registered. Calling it again goes on with what was left.

        Args:
            progress: Takes the bytes of the spool that are done.

        Raises:
            RegistryError: the store cannot be reached, or refuses.
            StorageError: the spool cannot be read.
        """
        try:
            if self._client is None:
                self._client = self._open()
            if self._client is None:
                return
            # What a crash took back must not be in the store, either: only what is on disk is sent.
            while lines := self._tail.read(_CHUNK, synced=True):
                requests = self._fold.add(lines)
                with mlflow_errors(f"The figures of {self.run_dir} cannot be sent to {self.uri}"):
                    self._ask(self._client, requests)
                self._note()
                progress(self._tail.offset)
            for registration in list(self._fold.registrations.values()):
                self._register(self._client, registration)
        except BaseException:
            self._client = None
            raise

    def beat(self, time_s: float) -> None:
        """Leaves a sign of life of a run that has not ended, also where someone took it for dead.

        Raises:
            RegistryError: the store cannot be reached.
        """
        if self._client is None or self.run_id is None or self._fold.status != "RUNNING":
            return
        with mlflow_errors(f"{self.uri} takes no sign of life of {self.run_dir}"):
            self._client.set_tag(self.run_id, HEARTBEAT_TAG, f"{time_s:.0f}")
            self._client.update_run(self.run_id, status="RUNNING")

    def _open(self) -> "MlflowClient | None":
        """Finds or makes the run in the store, and what it has; None where no run has begun."""
        begun = next(read_events(self.run_dir, "run"), None)
        if begun is None:
            return None
        Tail(self.run_dir / EVENTS_FILE).take(1, synced=True)
        name = Fold()
        name.add([begun])
        assert name.run is not None, "of the line that names it"
        initialise_store(self.uri)
        client = connect(self.uri)
        with mlflow_errors(f"Run {name.run.name!r} cannot be found or made in {self.uri}"):
            mark = None if self._again else read_watermark(self.run_dir, self.uri)
            run = None if mark is None else _run_of(client, mark.run_id)
            if mark is None or run is None or run.data.tags.get(RUN_TAG) != name.run.run:
                mark, run = None, _found_or_made(client, self.uri, name.run)
            for key, value in run.data.tags.items():
                card, _, version = value.partition(" ")
                if key.startswith("registered/") and version.isdecimal():
                    model = key.removeprefix("registered/")
                    self._cards[model], self.registered[model] = card, int(version)
        self.run_id, self._again = run.info.run_id, False
        self._fold = mark.fold if mark else Fold()
        self._tail = Tail(self.run_dir / EVENTS_FILE, mark.offset if mark else 0)
        return client

    def _ask(self, client: "MlflowClient", requests: Requests) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        run_id = str(self.run_id)
        params = [Param(key, value) for key, value in requests.params.items()]
        tags = [RunTag(key, value) for key, value in requests.tags.items()]
        tags.append(RunTag(HEARTBEAT_TAG, str(self._fold.last_ms // 1000)))
        points = [Metric(point.key, point.value, point.time_ms, point.step) for point in requests.points]
        client.log_batch(run_id, metrics=points[:_MAX_BATCH], params=params, tags=tags, synchronous=True)
        for start in range(_MAX_BATCH, len(points), _MAX_BATCH):
            self._pause()
            client.log_batch(run_id, metrics=points[start : start + _MAX_BATCH], synchronous=True)
        for use in requests.datasets:
            dataset = Dataset(use.name, use.digest[:_MAX_DIGEST], source_type="local", source=json.dumps({"uri": use.source}))
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        for artifact, path in requests.artifacts.items():
            if (self.run_dir / path).is_file():
                client.log_artifact(run_id, str(self.run_dir / path), os.path.dirname(artifact) or None)
            else:
                self._tell(f"{path} is no more in {self.run_dir}, and so not sent to {self.uri}")
        if requests.status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        elif requests.status:
            client.set_terminated(run_id, status=requests.status, end_time=requests.end_ms)

    def _register(self, client: "MlflowClient", registration: Registration) -> None:
        """Registers an encoder, unless that was done: a run that is sent again must not take an alias from a newer one.

        One that cannot be is told and noted; it holds up nothing else, and is tried again by whoever sends the spool next.
        """
        model, run_id, note = registration.model, str(self.run_id), name_for_mlflow(f"refused/{registration.model}")
        if registration.card in (self._cards.get(model), self._refused_cards.get(model)):
            return
        registry, folder = Registry(self.uri), self.run_dir / registration.package
        try:
            if card_sha256(check_package(folder)) != registration.card:
                raise PackageError(f"{folder} holds another encoder by now than the one for {model}, which is not registered.")
            version = registry.register(folder, model, run_id, alias=registration.alias).version
        except CromssError as error:
            if not _is_final(error):
                raise
            self.refused[model], self._refused_cards[model] = error, registration.card
            self._tell(f"{model} is not registered: {error}")
            with mlflow_errors(f"The figures of {self.run_dir} cannot be sent to {self.uri}"):
                client.set_tag(run_id, note, f"{type(error).__name__}: {error}"[:_MAX_NOTE])
            return
        with mlflow_errors(f"The figures of {self.run_dir} cannot be sent to {self.uri}"):
            client.set_tag(run_id, f"registered/{model}", f"{registration.card} {version}")
            if note in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, note)
        self._cards[model], self.registered[model] = registration.card, version
        self.refused.pop(model, None)
        self._note()
        self._tell(f"registered {model} version {version} as @{registration.alias}")

    def _note(self) -> None:
        """Writes the watermark. Where the folder takes none, that costs the time of sending again."""
        waiting = [r.model for r in self._fold.registrations.values() if self._cards.get(r.model) != r.card]
        mark = {"run_id": self.run_id, "offset": self._tail.offset, "unregistered": waiting, "fold": self._fold.state()}
        path = self.run_dir / SHIPPED_FILE
        draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        with suppress(OSError):
            mark["before"] = _before(self.run_dir, self._tail.offset)
            draft.write_text(json.dumps(_read_shipped(self.run_dir) | {self.uri: mark}, indent=1) + "\n")
            draft.replace(path)


def read_watermark(run_dir: Path, uri: str) -> Watermark | None:
    """How much of the spool of a run's folder a store has; None where that is not known."""
    with suppress(OSError, LookupError, TypeError, ValueError, AttributeError):  # torn, or by other hands
        mark = _read_shipped(run_dir)[tracking_uri(uri)]
        if _before(run_dir, mark["offset"]) == mark["before"]:
            return Watermark(str(mark["run_id"]), mark["offset"], Fold.of(mark["fold"]), tuple(mark["unregistered"]))
    return None


def _read_shipped(run_dir: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads((run_dir / SHIPPED_FILE).read_text())
    except (FileNotFoundError, ValueError):  # a crash may have torn it
        return {}
    return content if isinstance(content, dict) else {}


def _before(run_dir: Path, offset: int) -> str:
    """Digest of what is before a place in the spool: whoever takes a line out moves all that is after it."""
    with (run_dir / EVENTS_FILE).open("rb") as file:
        file.seek(max(offset - _CHECKED, 0))
        data = file.read(min(offset, _CHECKED))
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}"


def _is_final(error: BaseException) -> bool:
    """Whether what is refused will be refused again: not what a store that is away, locked or slow answers."""
    from mlflow.exceptions import MlflowException

    reason = error.__cause__
    while reason is not None:
        if isinstance(reason, MlflowException):
            return reason.error_code in _FINAL
        reason = reason.__cause__
    return isinstance(error, PackageError) or error.__cause__ is None


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

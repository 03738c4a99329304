"""A training run in MLflow, written by rank 0 alone."""

import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cromss_dist.errors import RegistryError
from cromss_dist.tracking.store import artifact_root, brief, connect, initialise_store, mlflow_errors, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_log = logging.getLogger(__name__)
_MAX_BATCH = 1000  # metrics MLflow takes in one request
_MAX_DIGEST = 36  # characters MLflow keeps of a dataset's digest
_RETRY_S = 60.0


class RunTracker:
    """Records one run: a context manager that ends it as FINISHED, FAILED (exception) or KILLED (Ctrl-C, exit).

    Metrics are buffered and sent in batches, because one at a time costs tens of milliseconds each. A batch that
    cannot be sent stays in the buffer and is tried again a minute later, so that a store that is away does not stop
    training; what is still unsent at the end raises. A killed process loses at most the buffer.

    Non-finite metrics: NaN is stored as NaN; so is an infinity, since MLflow would store 1.8e308, which no plot
    survives. The first one of each key is noted in the tag `nonfinite/<key>`.

    Resuming a run: points at or before the last stored step of their key are dropped (MLflow would keep both copies);
    parameters cannot change in MLflow, so one with another value goes to the tag `resumed/<key>`.

    Args:
        uri: MLflow tracking URI; None as in `tracking_uri`. A missing SQLite store is created.
        experiment: Name of the experiment, created if missing.
        run_name: Name of the run.
        run_id: A run to go on with, instead of a new one. Where the store has it no more, a new one begins under the same
            name: `run_id` tells.
        tags: Tags of the run.
        flush_points: Points after which the buffer is sent.
        flush_s: Seconds after which the buffer is sent with the next point.

    Raises:
        RegistryError: the store cannot be reached.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str,
        *,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        flush_points: int = 500,
        flush_s: float = 10.0,
    ) -> None:
        self.uri = tracking_uri(uri)
        initialise_store(self.uri)
        self._client = connect(self.uri)
        self._flush_points, self._flush_s = flush_points, flush_s
        self._buffer: list[Metric] = []
        self._next_flush = time.monotonic() + flush_s
        self._nonfinite: set[str] = set()
        self._params: dict[str, str] = {}
        self._stored_step: dict[str, int] = {}
        with mlflow_errors(f"Run {run_id or run_name!r} cannot be started in {self.uri}"):
            if run_id is not None and _is_there(self._client, run_id):
                self.run_id: str = run_id
                self._resume()
            else:
                experiment_id = _experiment_id(self._client, self.uri, experiment)
                self.run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        self.set_tags(tags or {})

    def _resume(self) -> None:
        run = self._client.get_run(self.run_id)
        self._params = dict(run.data.params)
        for key in run.data.metrics:
            self._stored_step[key] = max(point.step for point in self._client.get_metric_history(self.run_id, key))
        self._client.update_run(self.run_id, status="RUNNING")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close("FINISHED")
            return
        try:
            self.set_tags({"error": f"{kind.__name__}: {error}"[:500]})
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")
        except RegistryError as failure:  # must not hide the error that ended the run
            _log.warning("%s", failure)

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is buffered and ends the run.

        Raises:
            RegistryError: metrics are left that could not be sent, or the store cannot be reached.
        """
        self.flush()
        with mlflow_errors(f"Run {self.run_id} cannot be ended in {self.uri}"):
            self._client.set_terminated(self.run_id, status=status)
        if self._buffer:
            raise RegistryError(
                f"{len(self._buffer)} metric points of run {self.run_id} could not be sent to {self.uri}; see the log."
            )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Buffers one value a key at `step`; sends the buffer when it is full or old."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        for key, value in metrics.items():
            if step <= self._stored_step.get(key, -1):
                continue
            if not math.isfinite(value) and key not in self._nonfinite:
                self._nonfinite.add(key)
                self.set_tags({f"nonfinite/{key}": f"{value} at step {step}"})
            self._buffer.append(Metric(key, float(value) if math.isfinite(value) else math.nan, now_ms, step))
        if time.monotonic() >= self._next_flush or len(self._buffer) >= self._flush_points:
            self.flush()

    def flush(self) -> None:
        """Sends the buffer now. What fails stays in it, with a warning in the log."""
        from mlflow.exceptions import MlflowException

        self._next_flush = time.monotonic() + self._flush_s
        try:
            while self._buffer:
                self._client.log_batch(self.run_id, metrics=self._buffer[:_MAX_BATCH], synchronous=True)
                del self._buffer[:_MAX_BATCH]
        except MlflowException as error:
            self._next_flush = time.monotonic() + _RETRY_S
            _log.warning("%d metric points wait to be sent to %s: %s", len(self._buffer), self.uri, brief(error))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Stores parameters; nested mappings get dotted keys, lists become JSON."""
        from mlflow.entities import Param

        flat = flatten(params)
        new = {key: value for key, value in flat.items() if key not in self._params}
        changed = {key: value for key, value in flat.items() if self._params.get(key, value) != value}
        with mlflow_errors(f"Parameters of run {self.run_id} cannot be stored in {self.uri}"):
            self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in new.items()])
        self._params |= new
        self.set_tags({f"resumed/{key}": value for key, value in changed.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run, replacing those of the same key."""
        from mlflow.entities import RunTag

        if tags:
            with mlflow_errors(f"Tags of run {self.run_id} cannot be stored in {self.uri}"):
                self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Records the dataset: its name, its manifest's digest (in full in the tag `dataset/<name>`) and its place.

        MLflow takes few signs in the name of a tag; others become '_' there.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name=name, digest=digest[:_MAX_DIGEST], source_type="local", source=json.dumps({"uri": source}))
        with mlflow_errors(f"Dataset {name!r} cannot be recorded in {self.uri}"):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
        self.set_tags({f"dataset/{re.sub(r'[^A-Za-z0-9_.: -]', '_', name)}": digest})

    def log_text(self, text: str, path: str) -> None:
        """Stores `text` as the artifact `path`."""
        with self._storing(path):
            self._client.log_text(self.run_id, text, path)

    def log_dict(self, content: Mapping[str, Any], path: str) -> None:
        """Stores `content` as the JSON or YAML artifact `path`, by its suffix."""
        with self._storing(path):
            self._client.log_dict(self.run_id, dict(content), path)

    def log_file(self, file: Path, path: str) -> None:
        """Stores a file as the artifact `path`, whose last part is the file's name."""
        with self._storing(path):
            self._client.log_artifact(self.run_id, os.fspath(file), os.fspath(PurePosixPath(path).parent))

    def log_folder(self, folder: Path, path: str) -> None:
        """Stores the files of `folder` as artifacts under `path`."""
        with self._storing(path):
            self._client.log_artifacts(self.run_id, os.fspath(folder), path)

    def _storing(self, path: str) -> Any:
        return mlflow_errors(f"Artifact {path} of run {self.run_id} cannot be stored in {self.uri}")


def end_run(uri: str, run_id: str, status: str) -> None:
    """Ends a run from outside, for a process that cannot do so itself any more.

    Args:
        uri: Of the store.
        run_id: The run.
        status: 'KILLED' or 'FAILED'.

    Raises:
        RegistryError: the store cannot be reached or has no such run.
    """
    with mlflow_errors(f"Run {run_id} cannot be ended in {uri}"):
        connect(uri).set_terminated(run_id, status=status)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one with dotted keys; values are text, other containers JSON."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _is_there(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store has a run; one that was deleted, and could be restored, takes nothing."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


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

"""Runs whose process died before it could end them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cromss_dist.errors import StorageError
from cromss_dist.tracking.run.replica import HEARTBEAT_TAG, RUN_TAG
from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.run.spool import Spool, read_events, run_id_of
from cromss_dist.tracking.store import connect, mlflow_errors, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# A run whose folder nobody here holds may live on another machine, where the lock is not seen: it beats once a minute.
_BEATS_S = 180.0


@dataclass(frozen=True)
class DeadRun:
    """A run that the store has as RUNNING and that does not."""

    run_id: str  # in MLflow
    name: str
    run_dir: str
    silent_s: float  # since its last sign of life


def end_from_outside(run_dir: Path, status: str, error: str | None) -> bool:
    """Ends a run whose ranks are no more, in its spool; not one that has ended itself. Whether it did.

    Args:
        run_dir: Folder of the run, which nobody else writes.
        status: KILLED or FAILED.
        error: What ended it.
    """
    begun = [event["event"] for event in read_events(run_dir, "attempt", "end")]
    if begun[-1:] != ["attempt"]:
        return False
    with Spool(run_dir) as spool:
        spool.append("end", status=status, error=error)
    return True


def reap(
    uri: str | None, holding: Callable[[Path], AbstractContextManager[bool]], older_s: float, dry_run: bool = False
) -> Iterator[DeadRun]:
    """Marks runs as KILLED that the store has as RUNNING and that are dead.

    Dead is a run whose folder is here and whose process is not, or, where its folder is not seen from here, one without a sign
    of life for a time. A run whose folder someone holds is never dead, however long the store could not hear of it.

    Args:
        uri: MLflow tracking URI; None as in `tracking_uri`.
        holding: Tries to hold a run's folder while its block runs, and says whether that worked.
        older_s: Seconds of silence after which a run whose folder is not seen is dead.
        dry_run: Whether nothing is changed.

    Yields:
        Each run, when it is marked.

    Raises:
        RegistryError: the store cannot be reached.
    """
    uri = tracking_uri(uri)
    client = connect(uri)
    with mlflow_errors(f"The runs in {uri} cannot be marked"):
        for run in _running(client):
            tags = run.data.tags
            silent_s = time.time() - float(tags.get(HEARTBEAT_TAG, run.info.start_time / 1000))
            dead = DeadRun(run.info.run_id, run.info.run_name, tags.get("run_dir", ""), silent_s)
            folder = Path(dead.run_dir)
            if dead.run_dir and _is_here(folder, tags[RUN_TAG]):
                if silent_s < min(_BEATS_S, older_s):
                    continue
                with holding(folder) as held:
                    if not held:
                        continue
                    if not dry_run:
                        _end_here(client, dead, uri)
            elif silent_s < older_s:
                continue
            elif not dry_run:
                _mark(client, dead)
            yield dead


def _end_here(client: "MlflowClient", dead: DeadRun, uri: str) -> None:
    """Ends a run in its folder and in the store, which gets what it lacks; one of a damaged spool, too."""
    try:
        end_from_outside(Path(dead.run_dir), "KILLED", "the process was gone")
        deliver(Path(dead.run_dir), uri)
    except StorageError:
        _mark(client, dead)


def _mark(client: "MlflowClient", dead: DeadRun) -> None:
    client.set_terminated(dead.run_id, status="KILLED", end_time=int((time.time() - dead.silent_s) * 1000))


def _is_here(folder: Path, run: str) -> bool:
    """Whether a folder is that of a run, and ours to write; another machine may have another of the same name."""
    return os.access(folder, os.R_OK | os.W_OK) and run_id_of(folder) == run


def _running(client: "MlflowClient") -> "Iterator[Run]":
    """The runs of cromss that have not ended, of all experiments."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(
            experiments, f"attributes.status = 'RUNNING' AND tags.`{RUN_TAG}` LIKE '%'", max_results=1000, page_token=token
        )
        yield from page
        if not (token := page.token):
            return

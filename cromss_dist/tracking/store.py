"""Where the MLflow store is, and how to reach it.

MLflow is imported inside functions: the import takes seconds, and only rank 0 and the registry commands need it.
"""

import fcntl
import importlib
import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cromss_dist.errors import RegistryError, StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
# No usage reports to the vendor, no progress bars in logs, and a server that is down costs seconds, not MLflow's
# minutes. Values from the environment win.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def tracking_uri(uri: str | None = None) -> str:
    """The MLflow tracking URI in use, with an absolute path where it is a file.

    Args:
        uri: Wins if given; then `CROMSS_TRACKING_URI`, then `MLFLOW_TRACKING_URI`, then
            `sqlite:///<working directory>/runs/mlflow.db`.

    Raises:
        RegistryError: the URI is of a kind that cannot hold runs and a registry.
    """
    named = {
        "--tracking_uri": uri,
        "CROMSS_TRACKING_URI": os.environ.get("CROMSS_TRACKING_URI"),
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI"),
        "default": f"{_SQLITE}runs/mlflow.db",
    }
    source, chosen = next((source, value) for source, value in named.items() if value)
    if chosen.startswith(_SQLITE):
        return f"{_SQLITE}{Path(chosen.removeprefix(_SQLITE)).absolute()}"
    if chosen.split("://")[0] not in ("http", "https") and not chosen.startswith(("postgresql", "mysql")):
        raise RegistryError(
            f"Tracking URI {chosen!r} ({source}) is not allowed; give sqlite:///<file>, http(s)://<server> or a database URI "
            "(MLflow's plain folders hold no registry and are no longer supported)."
        )
    return chosen


def sqlite_path(uri: str) -> Path | None:
    """The database file of a `sqlite:///` URI, else None."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def artifact_root(uri: str) -> Path | None:
    """Folder of artifacts beside a SQLite store; None for servers, which choose themselves."""
    path = sqlite_path(uri)
    return None if path is None else path.parent / "artifacts"


def initialise_store(uri: str) -> None:
    """Creates a SQLite store that is not there yet; any number of processes may call it at once.

    MLflow itself creates tables without a lock: parallel first starts fail and can leave a half-built database. Here
    one process builds it under a lock, in a scratch file that takes its name when complete.

    Raises:
        StorageError: the folder or the disk does not take it.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        _import_mlflow()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
        from sqlalchemy.exc import OperationalError

        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            draft = Path(scratch) / path.name
            try:
                store = SqlAlchemyStore(f"{_SQLITE}{draft}", str(path.parent / "artifacts"))  # type: ignore[no-untyped-call]
            except OperationalError as error:
                raise StorageError(
                    f"No MLflow store can be created at {path}: {error.orig}. Check the disk's free space, or give another place "
                    "with tracking.uri or CROMSS_TRACKING_URI."
                ) from error
            store.engine.dispose()
            os.replace(draft, path)


def connect(uri: str) -> "MlflowClient":
    """A client of an existing store; a look-up never creates one.

    Raises:
        RegistryError: the SQLite file is missing or is no MLflow store.
    """
    path = sqlite_path(uri)
    if path is not None:
        _check_sqlite(path)
    _import_mlflow()
    from mlflow import MlflowClient

    with mlflow_errors(f"The store {uri} cannot be opened"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def mlflow_errors(problem: str) -> Iterator[None]:
    """Turns an exception of MLflow into a RegistryError that starts with `problem`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RegistryError(f"{problem}: {brief(error)}.") from error


def brief(error: Exception) -> str:
    """What an exception of MLflow says, in one line: a database's own words without the SQL around them."""
    words = getattr(error.__cause__, "orig", None) or error
    return str(words).splitlines()[0].rstrip(".")


def _check_sqlite(path: Path) -> None:
    if not path.is_file():
        raise RegistryError(
            f"No MLflow store at {path}. Give the store of your runs with --tracking_uri sqlite:///<file> or in "
            "CROMSS_TRACKING_URI; `cromss pretrain` creates one."
        )
    try:
        # Not mode=ro, with which a store whose writer was killed cannot be opened: SQLite first takes back what was half done.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as database:
            found = database.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('runs', 'model_versions')").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise RegistryError(
            f"{path} cannot be read as a SQLite database: {error}. Give another store with --tracking_uri."
        ) from error
    if found != 2:
        raise RegistryError(f"{path} is a SQLite database without MLflow's tables. Give another store with --tracking_uri.")


def _import_mlflow() -> None:
    """The first import of MLflow, made quiet: what it says there is not for our user to mend."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between MLflow and SQLAlchemy
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    for name in ("alembic", "mlflow"):  # INFO lines of every schema migration
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what is raised anyway

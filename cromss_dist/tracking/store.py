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

from cromss_dist.config.check import login_in
from cromss_dist.errors import RegistryError, StorageError
from cromss_dist.tracking import postgres

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
# No usage reports to the vendor, no progress bars and links in logs, and a server that is down costs seconds, not MLflow's
# minutes. Values from the environment win.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def tracking_uri(uri: str | None = None) -> str:
    """The MLflow tracking URI in use, with an absolute path where it is a file.

    Args:
        uri: Wins if given; then `CROMSS_TRACKING_URI`, then `MLFLOW_TRACKING_URI`, then
            `sqlite:///<working directory>/runs/mlflow.db`.

    Raises:
        RegistryError: the URI is of a kind that cannot hold runs and a registry, or has a password in it.
    """
    named = {
        "--tracking_uri": uri,
        "CROMSS_TRACKING_URI": os.environ.get("CROMSS_TRACKING_URI"),
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI"),
        "default": f"{_SQLITE}runs/mlflow.db",
    }
    source, chosen = next((source, value) for source, value in named.items() if value)
    if mend := login_in(chosen):
        raise RegistryError(f"The tracking URI ({source}) holds a login, which logs and run folders would show; {mend}.")
    if chosen.startswith(_SQLITE):
        return f"{_SQLITE}{Path(chosen.removeprefix(_SQLITE)).absolute()}"
    scheme, _, rest = chosen.partition("://")
    if scheme in ("postgres", "postgresql", "postgresql+psycopg2"):
        return f"{postgres.SCHEME}{rest}"
    if scheme not in ("http", "https"):
        raise RegistryError(
            f"Tracking URI {chosen!r} ({source}) is not allowed; give sqlite:///<file>, http(s)://<server> or "
            "postgresql://<user>@<host>/<database> (MLflow's plain folders hold no registry and are no longer supported)."
        )
    return chosen


def sqlite_path(uri: str) -> Path | None:
    """The database file of a `sqlite:///` URI, else None."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def artifact_root(uri: str) -> Path | None:
    """Folder of the artifacts of a store: beside a SQLite file; what a PostgreSQL store was created with; None for servers.

    Raises:
        RegistryError: the PostgreSQL store has no tables, or it is a server's and only that server has the artifacts.
    """
    if uri.startswith(postgres.SCHEME):
        return postgres.artifact_root(uri)
    path = sqlite_path(uri)
    return None if path is None else path.parent / "artifacts"


def initialise_store(uri: str) -> None:
    """Creates a SQLite store, or the tables of a PostgreSQL one, where they are missing; any number of processes may call it.

    MLflow itself creates tables without a lock: parallel first starts fail and can leave a half-built database. Here one
    process builds under a lock: SQLite's in a scratch file that takes its name when complete, PostgreSQL's under an advisory
    lock, which ends with its holder; what a dead holder left is completed by the next. Servers build their own. SQLite's journal
    stays as it is: a write-ahead log is shared memory, which network file systems do not have.

    Raises:
        StorageError: the folder or the disk does not take it.
        RegistryError: PostgreSQL cannot be reached, or `CROMSS_ARTIFACT_ROOT` does not say where its artifacts go.
    """
    if uri.startswith(postgres.SCHEME):
        postgres.initialise(uri, _build)
    elif (path := sqlite_path(uri)) and not path.exists():
        _initialise_sqlite(path)


def connect(uri: str) -> "MlflowClient":
    """A client of an existing store; a look-up never creates one.

    Raises:
        RegistryError: the SQLite file is missing or is no MLflow store; the same of a PostgreSQL database.
    """
    path = sqlite_path(uri)
    if path is not None:
        _check_sqlite(path)
    _import_mlflow()
    if uri.startswith(postgres.SCHEME):
        postgres.artifact_root(uri)  # MLflow itself would try for minutes, and create tables
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
    return next(iter(str(words).splitlines()), type(error).__name__).rstrip(".")


def _initialise_sqlite(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        from sqlalchemy.exc import OperationalError

        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            draft = Path(scratch) / path.name
            try:
                _build(f"{_SQLITE}{draft}", path.parent / "artifacts")
            except OperationalError as error:
                raise StorageError(
                    f"No MLflow store can be created at {path}: {error.orig}. Check the disk's free space, or give another place "
                    "with tracking.uri or CROMSS_TRACKING_URI."
                ) from error
            os.replace(draft, path)


def _build(uri: str, artifacts: Path) -> None:
    _import_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(uri, str(artifacts))  # type: ignore[no-untyped-call]
    store.engine.dispose()


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

"""MLflow stores in PostgreSQL: first start, and where their artifacts are.

SQLAlchemy is imported inside functions, as MLflow is.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cromss_dist.errors import RegistryError

if TYPE_CHECKING:
    from sqlalchemy import Connection

SCHEME = "postgresql+psycopg2://"  # named, because SQLAlchemy 2.1 takes postgresql:// for psycopg 3
_LOCK = int.from_bytes(b"cromss")  # key of the advisory lock; it holds for one database
_CONNECT_S = 20


def initialise(uri: str, build: Callable[[str, Path], None]) -> None:
    """Has the tables made where they are missing, by one of the processes that call it; the others wait.

    Args:
        uri: Starts with `SCHEME`.
        build: Makes all tables, also where some are there, of a store with a folder of artifacts. MLflow's own first
            experiment is its last act.

    Raises:
        RegistryError: PostgreSQL cannot be reached, or `CROMSS_ARTIFACT_ROOT` does not say where the artifacts go.
    """
    from sqlalchemy import text

    with _connection(uri) as connection:
        if _location(connection):
            return
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})  # until the connection ends, also by death
        if _location(connection):
            return
        root = os.environ.get("CROMSS_ARTIFACT_ROOT")
        if not root:
            raise RegistryError(
                f"{uri} has no MLflow tables yet, and a database does not hold artifacts: name a folder that all its users share "
                "in CROMSS_ARTIFACT_ROOT, or start `mlflow server` over the database and give the server's address."
            )
        build(uri, Path(root).absolute())


def artifact_root(uri: str) -> Path:
    """Folder of the artifacts of a store: what it was created with, for all its users.

    Raises:
        RegistryError: PostgreSQL cannot be reached, has no tables of MLflow's, or only an MLflow server has the artifacts.
    """
    with _connection(uri) as connection:
        location = _location(connection)
    if location is None:
        raise RegistryError(f"{uri} is a database without MLflow's tables. Give another store with --tracking_uri.")
    place = urlsplit(location)
    if place.scheme not in ("", "file"):
        raise RegistryError(
            f"{uri} is the database of an MLflow server, which alone has the artifacts ({location}): give the server's address."
        )
    return Path(unquote(place.path)).parent


@contextmanager
def _connection(uri: str) -> "Iterator[Connection]":
    """A connection of its own, each statement a transaction."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import DBAPIError

    try:
        engine = create_engine(uri, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": _CONNECT_S})
    except ModuleNotFoundError as error:
        raise RegistryError(f"{uri} needs {error.name}: pip install 'cromss-dist[postgres]'.") from error
    try:
        with engine.connect() as connection:
            yield connection
    except DBAPIError as error:
        raise RegistryError(
            f"{uri} cannot be used: {str(error.orig).splitlines()[0]}. Check that the server is up, and the password in "
            "~/.pgpass or the file that PGPASSFILE names."
        ) from error
    finally:
        engine.dispose()


def _location(connection: "Connection") -> str | None:
    """Where artifacts of MLflow's own first experiment go; None where it is not there, and so the tables may not be, either."""
    from sqlalchemy import text

    if connection.execute(text("SELECT to_regclass('experiments')")).scalar() is None:
        return None
    location = connection.execute(text("SELECT artifact_location FROM experiments WHERE experiment_id = 0")).scalar()
    return None if location is None else str(location)

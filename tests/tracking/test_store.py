import ast
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from cromss_dist.errors import RegistryError, StorageError
from cromss_dist.tracking.store import artifact_root, connect, initialise_store, tracking_uri
from tests.servers import MlflowServer, Postgres

# A process of its own: says when its imports are done, waits, and prints how often it finds what a run needs.
STARTER = """
import sys
from pathlib import Path
from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.run.spool import Spool
from cromss_dist.tracking import store
store._import_mlflow()
folder = Path(sys.argv[2])
folder.mkdir()
with Spool(folder) as spool:
    spool.begin(folder.name, "shared")
    spool.append("progress", step=1, samples=4, metrics={"train/loss/total": 1.0})
    spool.append("end", status="FINISHED", error="")
print("ready", flush=True)
sys.stdin.readline()
print([deliver(folder, sys.argv[1]).run_id])
"""


def run_ids_of_starts(uri: str, folder: Path, processes: int = 8) -> list[str]:
    """Runs of as many processes that start in one moment. Imports come first: the race is for the store, not for the disk."""
    command = [sys.executable, "-c", STARTER, uri]
    environment = os.environ | {"CROMSS_ARTIFACT_ROOT": str(folder / "artifacts")}
    started = [
        subprocess.Popen(
            [*command, str(folder / f"run-{number}")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * processes, "".join(errors for _, errors in told)
    return [run_id for output, _ in told for run_id in ast.literal_eval(output)]


def assert_one_experiment_with(uri: str, run_ids: list[str]) -> None:
    client = connect(uri)
    shared = [experiment for experiment in client.search_experiments() if experiment.name == "shared"]
    runs = client.search_runs([shared[0].experiment_id])
    assert len(shared) == 1
    assert sorted(run.info.run_id for run in runs) == sorted(run_ids)
    assert {(run.info.status, run.data.metrics["train/loss/total"]) for run in runs} == {("FINISHED", 1.0)}


@pytest.mark.slow
def test_eight_first_starts_in_one_moment_share_one_sqlite_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    run_ids = run_ids_of_starts(uri, tmp_path)
    assert_one_experiment_with(uri, run_ids)
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.slow
def test_eight_first_starts_in_one_moment_share_one_postgresql_store(postgres: Postgres, tmp_path: Path) -> None:
    uri = postgres.empty_database()
    assert_one_experiment_with(uri, run_ids_of_starts(uri, tmp_path))
    assert artifact_root(uri) == tmp_path / "artifacts"


@pytest.mark.slow
def test_eight_first_starts_in_one_moment_share_one_server(postgres: Postgres, tmp_path: Path) -> None:
    with MlflowServer(tmp_path / "server", postgres.empty_database()) as server:
        assert_one_experiment_with(server.uri, run_ids_of_starts(server.uri, tmp_path))


@pytest.mark.slow
def test_tables_that_a_killed_first_start_left_are_completed_by_the_next(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROMSS_ARTIFACT_ROOT", str(tmp_path))
    uri = postgres.empty_database()
    killed = """
import os, signal, sys
from cromss_dist.tracking import store
store._import_mlflow()
import mlflow.store.db.utils
mlflow.store.db.utils._upgrade_db = lambda engine: os.kill(os.getpid(), signal.SIGKILL)
store.initialise_store(sys.argv[1])
"""
    assert subprocess.run([sys.executable, "-c", killed, uri], check=False).returncode == -9
    with pytest.raises(RegistryError, match="without MLflow's tables"):
        connect(uri)
    initialise_store(uri)
    assert connect(uri).create_registered_model("encoder").name == "encoder"


@pytest.mark.slow
def test_a_postgresql_store_says_where_its_artifacts_are(postgres: Postgres, tmp_path: Path) -> None:
    uri = postgres.store()
    assert artifact_root(uri) == postgres.folder / "artifacts"
    with pytest.raises(RegistryError, match=r"name a folder that all its users share in CROMSS_ARTIFACT_ROOT"):
        initialise_store(postgres.empty_database())
    served = postgres.empty_database()
    with MlflowServer(tmp_path / "server", served):
        initialise_store(served)  # has its tables
        with pytest.raises(RegistryError, match=r"database of an MLflow server.*mlflow-artifacts.*give the server's address"):
            connect(served)


@pytest.mark.slow
def test_a_wrong_password_is_told_without_it(postgres: Postgres, tmp_path: Path) -> None:
    passwords = tmp_path / "pgpass"
    passwords.write_text("127.0.0.1:*:*:*:canary\n")
    passwords.chmod(0o600)
    with pytest.raises(RegistryError, match=r"password authentication failed.*~/\.pgpass") as caught:
        connect(postgres.store().replace(str(postgres.passfile), str(passwords)))
    assert "canary" not in str(caught.value)


def test_a_postgresql_that_is_down_is_told_at_once() -> None:
    pytest.importorskip("psycopg2")
    for call in (connect, initialise_store, artifact_root):
        with pytest.raises(RegistryError, match=r"u@127\.0\.0\.1:1/d cannot be used.*Connection refused\. Check that the server"):
            call(tracking_uri("postgresql://u@127.0.0.1:1/d"))


def test_a_missing_driver_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(RegistryError, match=r"needs psycopg2: pip install 'cromss-dist\[postgres\]'"):
        initialise_store("postgresql+psycopg2://u@127.0.0.1:1/d")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://u@h:5/d", "postgresql+psycopg2://u@h:5/d"),
        ("postgres://h/d?passfile=/f", "postgresql+psycopg2://h/d?passfile=/f"),
        ("postgresql+psycopg2:///d?host=/run/postgresql", "postgresql+psycopg2:///d?host=/run/postgresql"),
        ("https://mlflow.example:5000/prefix", "https://mlflow.example:5000/prefix"),
    ],
)
def test_uris_of_servers_and_databases(given: str, used: str) -> None:
    assert tracking_uri(given) == used


def test_the_uri_is_the_argument_then_ours_then_mlflows_then_runs_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CROMSS_TRACKING_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri() == "http://mlflow:5000"
    monkeypatch.setenv("CROMSS_TRACKING_URI", "sqlite:///a.db")
    assert tracking_uri() == f"sqlite:///{tmp_path / 'a.db'}"
    assert tracking_uri("postgresql+psycopg2://u@h/d") == "postgresql+psycopg2://u@h/d"


def test_a_full_disk_is_told_without_sql_and_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.tracking import sqlalchemy_store

    def refuse(*_: object) -> None:
        raise OperationalError("CREATE TABLE runs", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", refuse)
    with pytest.raises(StorageError, match=rf"created at {tmp_path / 'mlflow.db'}: database or disk is full. Check"):
        initialise_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("uri", ["runs", "file:///mlruns", "databricks", "mysql://h/d", "postgresql+asyncpg://h/d"])
def test_a_uri_that_cannot_hold_a_registry_is_refused(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"--tracking_uri.*give sqlite:///"):
        tracking_uri(uri)


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("https://ada:canary@h:5000/p", r"give https://h:5000/p and its login in MLFLOW_TRACKING_USERNAME and"),
        ("https://canary@h", r"give https://h and its login in MLFLOW_TRACKING_USERNAME and"),
        ("postgresql://ada:canary@h:5/d", r"give postgresql://ada@h:5/d and its password in ~/\.pgpass"),
        ("postgresql+psycopg2://h/d?user=ada&password=canary", r"give postgresql\+psycopg2://h/d and its password"),
        ("mysql://ada:canary@h/d", r"give "),
    ],
)
@pytest.mark.parametrize("source", ["--tracking_uri", "CROMSS_TRACKING_URI", "MLFLOW_TRACKING_URI"])
def test_a_login_in_a_uri_is_refused_and_not_repeated(
    uri: str, instead: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source != "--tracking_uri":
        monkeypatch.setenv(source, uri)
    with pytest.raises(RegistryError, match=instead) as caught:
        tracking_uri(uri if source == "--tracking_uri" else None)
    assert source in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_store_is_made_once_and_only_where_it_is_missing(store_uri: str, tmp_path: Path) -> None:
    client = connect(store_uri)
    client.create_experiment("kept")
    initialise_store(store_uri)
    assert connect(store_uri).get_experiment_by_name("kept") is not None
    assert artifact_root(store_uri) == tmp_path / "store" / "artifacts"


def test_another_database_is_not_taken_for_a_store(tmp_path: Path) -> None:
    def empty(path: Path) -> None:
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE runs (id)")

    kinds: dict[str, tuple[Callable[[Path], object], str]] = {
        "no tables": (empty, "without MLflow's tables"),
        "no database": (lambda path: path.write_bytes(b"x" * 4096), "cannot be read as a SQLite database"),
        "nothing": (lambda path: None, "No MLflow store at"),
    }
    for kind, (make, message) in kinds.items():
        make(tmp_path / kind)
        with pytest.raises(RegistryError, match=message):
            connect(f"sqlite:///{tmp_path / kind}")

import json
import math
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from cromss_dist.config import DataConfig, RunConfig
from cromss_dist.errors import RegistryError, StorageError
from cromss_dist.pretrain import record_config
from cromss_dist.tracking.run.runs import RunTracker, flatten
from cromss_dist.tracking.store import connect, sqlite_path, tracking_uri


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in connect(uri).get_metric_history(run_id, key)]


def test_everything_a_run_logs_is_in_the_store(store_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    with RunTracker(store_uri, "cromss", "first", tags={"world_size": "2"}) as run:
        run.log_params({"loss": {"ramp": "exp", "segmentation": ("ce", "dice")}, "seed": 0, "micro": None})
        for step in range(5):
            run.log_metrics({"train/loss": 1 / (step + 1), "lr": 0.1}, step)
        run.log_dataset("noldo", "f" * 64, "/data/shards")
        run.log_text("text", "notes/a.txt")
        run.log_dict({"a": 1}, "config.json")
        run.log_file(folder / "a.txt", "panels/a.txt")
        run.log_folder(folder, "report")
    client = connect(store_uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "first"
    assert client.get_experiment(stored.info.experiment_id).name == "cromss"
    assert stored.data.params == {"loss.ramp": "exp", "loss.segmentation": '["ce", "dice"]', "seed": "0", "micro": "null"}
    assert history(store_uri, run.run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(5)]
    assert stored.data.tags["world_size"] == "2"
    assert stored.data.tags["dataset/noldo"] == "f" * 64
    assert stored.inputs is not None
    assert [(i.dataset.name, i.dataset.digest) for i in stored.inputs.dataset_inputs] == [("noldo", "f" * 36)]
    artifacts = Path(str(sqlite_path(store_uri))).parent / "artifacts" / run.run_id / "artifacts"
    assert (artifacts / "notes/a.txt").read_text() == "text"
    assert json.loads((artifacts / "config.json").read_text()) == {"a": 1}
    assert (artifacts / "panels/a.txt").read_text() == "a"
    assert (artifacts / "report/a.txt").read_text() == "a"


def test_a_dataset_may_have_any_name(store_uri: str) -> None:
    with RunTracker(store_uri, "cromss", "r") as run:
        run.log_dataset("données (1)+2%", "a" * 64, "hf://datasets/o/données (1)+2%")
    stored = connect(store_uri).get_run(run.run_id)
    assert stored.data.tags["dataset/donn_es _1__2_"] == "a" * 64
    assert stored.inputs is not None
    assert [i.dataset.name for i in stored.inputs.dataset_inputs] == ["données (1)+2%"]


def test_a_mixture_of_any_places_can_be_recorded(store_uri: str) -> None:
    shards = {"https://host:8000/a": 0.7, "s3://bucket/a": 0.2, "../données+1": 0.1}
    config = replace(RunConfig(), data=DataConfig(shards=shards))
    with RunTracker(store_uri, "mixture", "run") as tracker:
        record_config(tracker, config, ["a" * 64, "b" * 64, "c" * 64])
    run = connect(store_uri).get_run(tracker.run_id)
    assert json.loads(run.data.params["data.shards"]) == [[*item] for item in shards.items()]
    assert run.data.params["data.window"] == "2048"
    tags = {key: value[0] for key, value in run.data.tags.items() if key.startswith("dataset/")}
    assert tags == {"dataset/a-0": "a", "dataset/a-1": "b", "dataset/donn_es_1": "c"}


def test_metrics_are_sent_when_the_buffer_is_full_or_old(store_uri: str) -> None:
    run = RunTracker(store_uri, "cromss", "r", flush_points=3, flush_s=1e9)
    run.log_metrics({"a": 0.0, "b": 0.0}, 0)
    assert history(store_uri, run.run_id, "a") == []
    run.log_metrics({"a": 1.0}, 1)
    assert history(store_uri, run.run_id, "a") == [(0, 0.0), (1, 1.0)]
    old = RunTracker(store_uri, "cromss", "r", flush_s=0.0)
    old.log_metrics({"a": 0.0}, 0)
    assert history(store_uri, old.run_id, "a") == [(0, 0.0)]


def test_non_finite_metrics_become_nan_and_the_first_is_noted(store_uri: str) -> None:
    with RunTracker(store_uri, "cromss", "r") as run:
        for step, value in enumerate((1.0, math.inf, math.nan)):
            run.log_metrics({"loss": value}, step)
    values = [value for _, value in history(store_uri, run.run_id, "loss")]
    assert values[0] == 1.0
    assert all(math.isnan(value) for value in values[1:])
    assert connect(store_uri).get_run(run.run_id).data.tags["nonfinite/loss"] == "inf at step 1"


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(75), "KILLED")]
)
def test_an_exception_ends_the_run_with_its_status_and_all_its_metrics(store_uri: str, error: BaseException, status: str) -> None:
    def train(run: RunTracker) -> None:
        with run:
            run.log_metrics({"loss": 1.0}, 3)
            raise error

    run = RunTracker(store_uri, "cromss", "r")
    with pytest.raises(type(error)):
        train(run)
    stored = connect(store_uri).get_run(run.run_id)
    assert stored.info.status == status
    assert stored.data.tags["error"].startswith(type(error).__name__)
    assert history(store_uri, run.run_id, "loss") == [(3, 1.0)]


def test_a_resumed_run_has_each_step_once(store_uri: str) -> None:
    run = RunTracker(store_uri, "cromss", "r")  # never closed: its process was killed after the flush
    run.log_params({"engine": {"micro_batch": 2}, "seed": 0})
    for step in range(5):
        run.log_metrics({"loss": float(step)}, step)
    run.flush()
    with RunTracker(store_uri, "cromss", "r", run_id=run.run_id) as again:
        assert connect(store_uri).get_run(run.run_id).info.status == "RUNNING"
        again.log_params({"engine": {"micro_batch": 4}, "seed": 0, "new": 1})
        for step in range(3, 8):  # from the checkpoint of step 3 on
            again.log_metrics({"loss": float(step), "val/loss": 0.0}, step)
    assert history(store_uri, run.run_id, "loss") == [(step, float(step)) for step in range(8)]
    assert [step for step, _ in history(store_uri, run.run_id, "val/loss")] == [3, 4, 5, 6, 7]
    stored = connect(store_uri).get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"engine.micro_batch": "2", "seed": "0", "new": "1"}
    assert stored.data.tags["resumed/engine.micro_batch"] == "4"


def test_metrics_wait_while_the_store_is_away(
    store_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def away(*_: object, **__: object) -> None:
        raise MlflowException("connection refused")

    run = RunTracker(store_uri, "cromss", "r", flush_points=1)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        run.log_metrics({"loss": 0.0}, 0)
        run.log_metrics({"loss": 1.0}, 1)
        with pytest.raises(RegistryError, match=r"2 metric points of run .* could not be sent"):
            run.close()
    assert "2 metric points wait to be sent" in caplog.text
    run.close()
    assert history(store_uri, run.run_id, "loss") == [(0, 0.0), (1, 1.0)]


def test_a_store_whose_writer_was_killed_in_the_middle_is_used_again(store_uri: str, tmp_path: Path) -> None:
    path = Path(store_uri.removeprefix("sqlite:///"))
    cut = tmp_path / "cut.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA cache_size = 1")  # so that half of what follows is in the file
        database.executemany("INSERT INTO tags VALUES (?, ?, 'no run')", [(str(n), "x" * 500) for n in range(100)])
        for suffix in ("", "-journal"):
            shutil.copyfile(f"{path}{suffix}", f"{cut}{suffix}")
    with RunTracker(f"sqlite:///{cut}", "cromss", "r") as run:
        run.log_metrics({"loss": 1.0}, 1)
    assert history(f"sqlite:///{cut}", run.run_id, "loss") == [(1, 1.0)]


def test_a_run_that_the_store_has_lost_goes_on_as_a_new_one(store_uri: str) -> None:
    deleted = RunTracker(store_uri, "cromss", "r").run_id
    connect(store_uri).delete_run(deleted)
    for lost in ("0" * 32, deleted):
        with RunTracker(store_uri, "cromss", "r", run_id=lost) as run:
            run.log_metrics({"loss": 1.0}, 1)
        assert run.run_id != lost
        assert history(store_uri, run.run_id, "loss") == [(1, 1.0)]


def test_a_full_disk_is_told_without_sql_and_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.tracking import sqlalchemy_store

    def refuse(*_: object) -> None:
        raise OperationalError("CREATE TABLE runs", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", refuse)
    with pytest.raises(StorageError, match=rf"created at {tmp_path / 'mlflow.db'}: database or disk is full. Check"):
        RunTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "cromss", "r")
    assert not (tmp_path / "mlflow.db").exists()


def test_a_store_that_refuses_a_write_is_told_in_the_databases_words(store_uri: str) -> None:
    with closing(sqlite3.connect(sqlite_path(store_uri) or "")) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(RegistryError, match=rf"Run 'r' cannot be started in {store_uri}: disk is full\.$"):
        RunTracker(store_uri, "cromss", "r")


def test_a_deleted_experiment_is_named(store_uri: str) -> None:
    client = connect(store_uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(RegistryError, match=r"Experiment 'gone'.*was deleted"):
        RunTracker(store_uri, "gone", "r")


def test_processes_that_start_together_share_one_store_and_experiment(tmp_path: Path) -> None:
    # Imports first, then a common start signal: the race is for the store, not for the disk cache.
    code = """
import sys, time, pathlib
from cromss_dist.pretrain import record_config
from cromss_dist.tracking.run.runs import RunTracker
from cromss_dist.tracking import store
store._import_mlflow()
print("ready", flush=True)
sys.stdin.readline()
with RunTracker(sys.argv[1], "shared", "r") as run:
    run.log_metrics({"loss": 1.0}, 0)
"""
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    command = [sys.executable, "-c", code, uri]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    with closing(sqlite3.connect(tmp_path / "new" / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'shared'").fetchone() == (1,)
        tables = "runs JOIN metrics USING (run_uuid) JOIN experiments USING (experiment_id)"
        query = f"SELECT runs.status, metrics.value FROM {tables} WHERE experiments.name = ?"
        rows = database.execute(query, ("shared",))
        assert rows.fetchall() == [("FINISHED", 1.0)] * 2
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_the_uri_is_the_argument_then_ours_then_mlflows_then_runs_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri() == "http://mlflow:5000"
    monkeypatch.setenv("CROMSS_TRACKING_URI", "sqlite:///a.db")
    assert tracking_uri() == f"sqlite:///{tmp_path / 'a.db'}"
    assert tracking_uri("postgresql+psycopg2://u@h/d") == "postgresql+psycopg2://u@h/d"


@pytest.mark.parametrize("uri", ["runs", "file:///tmp/mlruns", "databricks"])
def test_a_uri_without_registry_is_refused(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"--tracking_uri.*give sqlite:///"):
        tracking_uri(uri)


def test_nested_parameters_get_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": True}, "e": [1, 2]}) == {"a.b.c": "1", "a.d": "true", "e": "[1, 2]"}

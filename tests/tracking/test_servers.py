"""What a real MLflow server over PostgreSQL must hold: the whole life of an encoder, and the rows of security."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import psutil
import pytest

from cromss_dist.config import TrackingConfig
from cromss_dist.errors import RegistryError
from cromss_dist.parse import CONFIG_FILE, write_yaml
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import connect
from tests.servers import MlflowServer, Postgres, server_lacking
from tests.tracking.life import live
from tests.whole_runs import of_steps, small_run

Runs = tuple[Path, Path]
CROMSS = "import sys; from cromss_dist.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def guarded(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that asks for passwords."""
    if reason := server_lacking():
        pytest.skip(reason)
    with MlflowServer(tmp_path_factory.mktemp("guarded"), postgres.store(), auth=True) as running:
        yield running


@pytest.fixture
def login(guarded: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in guarded.credentials.items():
        monkeypatch.setenv(name, value)


def test_encoders_are_sent_found_promoted_fetched_and_rolled_back_on_sqlite(
    store_uri: str, trained_runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(store_uri, trained_runs, tmp_path / "life", monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("login")
def test_encoders_are_sent_found_promoted_fetched_and_rolled_back_on_a_server(
    guarded: MlflowServer, trained_runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(guarded.uri, trained_runs, tmp_path / "life", monkeypatch)
    written = list(guarded.folder.rglob("*"))
    assert [path.name for path in written if path.name == "encoder.safetensors"]
    assert not [path for path in written if path.stat().st_mode & 0o077]  # of other users


@pytest.mark.slow
def test_encoders_are_sent_found_promoted_fetched_and_rolled_back_on_postgresql_alone(
    postgres: Postgres, trained_runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(postgres.store(), trained_runs, tmp_path / "life", monkeypatch)


@pytest.mark.slow
def test_a_run_logs_in_to_a_server_and_tells_its_password_nowhere(
    guarded: MlflowServer, postgres: Postgres, synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = TrackingConfig(uri=guarded.uri, model_prefix="canary")
    config = replace(of_steps(small_run(synthetic_shards, guarded.uri), 2), tracking=tracking, output=str(tmp_path / "runs"))
    write_yaml(config, tmp_path / CONFIG_FILE)
    command = [sys.executable, "-c", CROMSS, "pretrain", f"--config={tmp_path / CONFIG_FILE}"]
    arguments: set[str] = set()
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | guarded.credentials)
        while run.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
                    arguments.update(process.cmdline())
            time.sleep(0.2)
    assert run.returncode == 0, (tmp_path / "output").read_text()

    for name, value in guarded.credentials.items():
        monkeypatch.setenv(name, value)
    registry = Registry(guarded.uri)
    assert [entry.ref for entry in registry.list("name LIKE 'canary-%'")] == ["canary-resnet18-s1/1", "canary-resnet18-s2/1"]
    metrics = registry.client.get_run(registry.resolve("canary-resnet18-s2@candidate").run_id).data.metrics
    assert "train/loss/total" in metrics

    secrets = [guarded.credentials["MLFLOW_TRACKING_PASSWORD"], postgres.passfile.read_text().strip().rpartition(":")[2]]
    told = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in told if path.name == "events.jsonl"]
    for secret in map(str.encode, secrets):
        assert not [path for path in [*told, guarded.log, postgres.folder / "log"] if secret in path.read_bytes()]
        assert not [word for word in arguments if secret in word.encode()]


@pytest.mark.slow
def test_a_server_lets_nobody_in_without_a_login(guarded: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="cannot be read"):
        Registry(guarded.uri).list()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary")
    with pytest.raises(RegistryError, match="cannot be read") as caught:
        Registry(guarded.uri).list()
    assert "canary" not in str(caught.value)


def status_of(url: str, data: bytes | None = None, method: str | None = None, **headers: str) -> int:
    request = Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()}, method=method)
    try:
        with urlopen(request, timeout=60) as reply:
            return int(reply.status)
    except HTTPError as error:
        return error.code


@pytest.mark.slow
def test_a_web_page_under_another_name_reaches_nothing(server: MlflowServer) -> None:
    search = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status_of(search) == 200
    for host in ("evil.example", "10.1.2.3", f"evil.example:{server.port}", "127.0.0.1.evil.example"):
        assert status_of(search, Host=host) == 403
    create = f"{server.uri}/api/2.0/mlflow/experiments/create"
    body = b'{"name": "evil"}'
    assert status_of(create, body, Origin="https://evil.example", Content_Type="application/json") == 403
    assert connect(server.uri).get_experiment_by_name("evil") is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_no_artifact_path_leaves_the_folder_of_artifacts(server: MlflowServer, method: str) -> None:
    outside = server.folder / "outside.txt"
    outside.write_text("secret")
    data = b"overwritten" if method == "PUT" else None
    api = f"{server.uri}/api/2.0/mlflow-artifacts/artifacts"
    for path in ("../outside.txt", "..%2Foutside.txt", "%2e%2e/outside.txt", "a/../../outside.txt", quote(str(outside), safe="")):
        assert status_of(f"{api}/{path}", data, method) // 100 in (3, 4)  # 308: to the path without its first slash
    assert outside.read_text() == "secret"


@pytest.mark.slow
def test_a_version_cannot_be_made_of_files_elsewhere_on_the_server(server: MlflowServer) -> None:
    client = connect(server.uri)
    client.create_registered_model("evil")
    for source in ("/etc", "file:///etc", "../../etc", "http://evil.example/x"):
        with pytest.raises(Exception, match=r"Invalid model version source|INVALID_PARAMETER_VALUE"):
            client.create_model_version("evil", source, await_creation_for=0)

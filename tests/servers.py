"""Servers that MLflow keeps runs on: PostgreSQL of Debian's packages, `mlflow server`. Each for a `with` block, on loopback."""

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from unittest import mock
from urllib.parse import urlsplit

from cromss_dist.tracking.store import initialise_store

_PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=Path())
_START_S = 120  # this machine may be shared
_TRIES = 3  # of a port that was free a moment ago


def postgres_lacking() -> str | None:
    """Why there can be no PostgreSQL here, None where there can."""
    if not (_PROGRAMS / "initdb").is_file():
        return "PostgreSQL is not installed (Debian package postgresql)"
    if not shutil.which("setpriv"):
        return "PostgreSQL's harness needs setpriv (package util-linux)"
    return None if find_spec("psycopg2") else "psycopg2 is not installed (extra `postgres`)"


def server_lacking() -> str | None:
    """Why there can be no `mlflow server` that asks for passwords here, None where there can."""
    if not shutil.which("setpriv"):
        return "the server's harness needs setpriv (package util-linux)"
    return None if find_spec("flask_wtf") else "Flask-WTF is not installed (extra `server`)"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Postgres:
    """A PostgreSQL of its own. It does not run as root: root's tests run it as Debian's user `postgres`.

    Passwords lie in `passfile`, which the URIs name, so no URI has one and the environment need not.

    Args:
        durable: Waits for the disk at each commit, as servers do and tests need not; for benchmarks.
    """

    def __init__(self, durable: bool = False) -> None:
        self._durable = durable
        self._count = 0

    def __enter__(self) -> "Postgres":
        self.folder = Path(tempfile.mkdtemp(prefix="cromss-pg-"))  # pytest's folders are root's own
        self._user = []
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self._user = ["--reuid=postgres", "--regid=postgres", "--clear-groups"]
        try:
            secret = secrets.token_urlsafe(24)
            self.passfile = self.folder / "pgpass"
            _write_private(self.passfile, f"127.0.0.1:*:*:*:{secret}\n")
            self._initialise(secret)
            self.port = _on_free_port(self._start)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def empty_database(self) -> str:
        """URI of a new database without tables, owned by the role `mlflow`."""
        return self._create("template0")

    def store(self) -> str:
        """URI of a new, empty MLflow store: a copy of one that is made once, which takes seconds."""
        return self._create(self._template)

    def start(self) -> None:
        """Starts it again on its port."""
        self._start(self.port)

    def stop(self) -> None:
        """Ends it; whoever is connected loses the connection."""
        if process := vars(self).pop("_process", None):
            _end(process, signal.SIGINT)  # PostgreSQL's fast shutdown

    def _initialise(self, secret: str) -> None:
        words = self.folder / "secret"
        _write_private(words, secret)
        if self._user:
            shutil.chown(words, "postgres")
        options = [
            "--username=postgres",
            "--auth-host=scram-sha-256",
            "--auth-local=peer",  # the system's users by the socket, as Debian's own; whoever runs the tests is both
            f"--pwfile={words}",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        ]
        command = [*self._as_user(), str(_PROGRAMS / "initdb"), *options, str(self.folder / "data")]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder)
        words.unlink()
        rights, users = self.folder / "data" / "pg_hba.conf", self.folder / "data" / "pg_ident.conf"
        rights.write_text(re.sub(r"(?m)^(local .* peer)$", r"\1 map=tests", rights.read_text()))
        users.write_text("".join(f"tests {pwd.getpwuid(os.getuid()).pw_name} {role}\n" for role in ("postgres", "mlflow")))

    def _start(self, port: int) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": self.folder,
            "log_min_error_statement": "panic",  # a batch that is sent again is a statement of pages
        }
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        command = [*self._as_user(), str(_PROGRAMS / "postgres"), "-D", str(self.folder / "data"), *settings]
        self._process = _start(command, self.folder / "log", dict(os.environ), self.folder)
        _wait_until(lambda: self._answers(port), self._process, self.folder / "log")
        self.port = port

    def _answers(self, port: int) -> bool:
        ready = [str(_PROGRAMS / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
        return subprocess.run(ready, check=False).returncode == 0

    def _as_user(self) -> list[str]:
        return ["setpriv", "--pdeathsig=INT", *self._user, "--"]

    @cached_property
    def _template(self) -> str:
        uri = self.empty_database()
        with mock.patch.dict(os.environ, CROMSS_ARTIFACT_ROOT=str(self.folder / "artifacts")):
            initialise_store(uri)
        return urlsplit(uri).path.removeprefix("/")

    def _create(self, template: str) -> str:
        self._count += 1
        if self._count == 1:
            self._administer(
                "CREATE ROLE mlflow LOGIN PASSWORD '{}'".format(self.passfile.read_text().strip().rpartition(":")[2])
            )
        name = f"mlflow_{self._count}"
        self._administer(f"CREATE DATABASE {name} OWNER mlflow TEMPLATE {template}")
        return self._uri("mlflow", name)

    def _administer(self, statement: str) -> None:
        from sqlalchemy import create_engine, text

        engine = create_engine(self._uri("postgres", "postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def _uri(self, role: str, database: str) -> str:
        return f"postgresql+psycopg2://{role}@127.0.0.1:{self.port}/{database}?passfile={self.passfile}"


class MlflowServer:
    """`mlflow server`: allowed hosts, no jobs, one worker; its artifacts, users and log are in `folder`.

    Args:
        folder: New or empty.
        store: Backend store; `mlflow server` makes the tables if they are missing.
        auth: Asks for a user and password: those of `credentials`, an administrator.
    """

    def __init__(self, folder: Path, store: str, auth: bool = False) -> None:
        self.folder, self.log, self.artifacts = folder, folder / "server.log", folder / "artifacts"
        self.credentials: dict[str, str] = {}  # for the environment of clients
        self._environment = {
            "MLFLOW_BACKEND_STORE_URI": store,  # not in argv, which every user of the machine can read
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._options: list[str] = []
        if auth:
            self._ask_for_passwords()

    def __enter__(self) -> "MlflowServer":
        _on_free_port(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def uri(self) -> str:
        """For clients."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it again on its port, and waits until it answers."""
        self._start(self.port)

    def stop(self) -> None:
        """Ends it and its workers."""
        if process := vars(self).pop("_process", None):
            _end(process, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and its workers at once."""
        if process := vars(self).pop("_process", None):
            _end(process, signal.SIGKILL)

    def _start(self, port: int) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        hosts = f"127.0.0.1:{port},localhost:{port}"
        command = [str(Path(sysconfig.get_path("scripts")) / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--allowed-hosts", hosts, "--artifacts-destination", str(self.artifacts), *self._options]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "_MLFLOW_"))}
        launch = ["setpriv", "--pdeathsig=TERM", "--", sys.executable, *command]
        self._process = _start(launch, self.log, environment | self._environment, self.folder)
        self.port = port
        _wait_until(self._answers, self._process, self.log)

    def _answers(self) -> bool:
        with (
            suppress(urllib.error.URLError, TimeoutError, ConnectionError),
            urllib.request.urlopen(f"{self.uri}/health", timeout=5),
        ):
            return True
        return False

    def _ask_for_passwords(self) -> None:
        secret = secrets.token_urlsafe(24)
        self.credentials = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secret}
        settings = self.folder / "auth.ini"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        values = {
            "default_permission": "READ",
            "database_uri": f"sqlite:///{self.folder / 'users.db'}",
            "admin_username": "admin",
            "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
            "auth_cache_ttl_seconds": "60",  # or each request hashes the password again: 0.5 s
        }
        _write_private(settings, "[mlflow]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))
        self._environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": secret,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        }
        self._options += ["--app-name", "basic-auth"]


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _start(command: list[str], log: Path, environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=folder, start_new_session=True, umask=0o077
        )


def _on_free_port(start: Callable[[int], None]) -> int:
    for left in reversed(range(_TRIES)):
        port = free_port()
        try:
            start(port)
            return port
        except ChildProcessError as error:
            if left == 0 or "ddress already in use" not in str(error):
                raise
    raise AssertionError("unreachable")


def _wait_until(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not answers():
        if process.poll() is not None:
            raise ChildProcessError(f"the server ended with {process.returncode}: {log.read_text()[-3000:]}")
        if time.monotonic() > deadline:
            _end(process, signal.SIGKILL)
            raise TimeoutError(f"the server does not answer: {log.read_text()[-3000:]}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes], sig: signal.Signals) -> None:
    """Ends the process, which ends what it started; what is left of its session after a while is killed."""
    if sig == signal.SIGKILL:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
    process.send_signal(sig)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

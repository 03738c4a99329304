"""Each check fails when its subject is broken, and no other does."""

import errno
import fcntl
import http.server
import os
import resource
import socket
import sqlite3
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import DataConfig, EngineConfig, LaunchConfig, RunConfig, TrackingConfig
from cromss_dist.doctor import access, gpus, machine, services, storage
from cromss_dist.doctor.gpus import Gpu, Gpus
from cromss_dist.doctor.subject import Subject
from tests.doctor.conftest import LevelsOf

GIB = 2**30
Break = Callable[[Subject, pytest.MonkeyPatch], Subject | None]
Listener = namedtuple("Listener", "status laddr pid")
Address = namedtuple("Address", "ip port")


def test_nothing_is_wrong_where_all_is_well_and_nothing_is_left(well: Subject, levels_of: LevelsOf) -> None:
    assert levels_of(well) == {}
    assert list(Path(well.config.output).iterdir()) == []


def test_nothing_is_wrong_on_a_cluster(on_a_cluster: Subject, levels_of: LevelsOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("10.0.0.1", 0))])
    assert levels_of(on_a_cluster) == {}


def run_with(subject: Subject, **changes: Any) -> Subject:
    return replace(subject, config=replace(subject.config, **changes))


def refuse(number: int, only: Callable[..., bool] = lambda *_, **__: True, otherwise: Any = None) -> Callable[..., Any]:
    """A system call that fails for some arguments."""

    def call(*arguments: Any, **options: Any) -> Any:
        if only(*arguments, **options):
            raise OSError(number, os.strerror(number))
        return otherwise(*arguments, **options)

    return call


def old_torch(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    return replace(subject, floors=(*subject.floors, "torch>=99"))


def missing_package(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    return replace(subject, floors=(*subject.floors, "no-such-package-here>=1"))


def no_floors(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    return replace(subject, floors=())


def more_workers_than_cores(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    return replace(subject, kind="slurm", workers=len(os.sched_getaffinity(0)) + 1)


def small_shm(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    small = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))  # 64 MiB, as containers have it
    true = os.statvfs
    patch.setattr(os, "statvfs", lambda path: small if path == machine.SHARED_MEMORY else true(path))


def few_files(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    true = resource.getrlimit
    patch.setattr(resource, "getrlimit", lambda which: (256, 256) if which == resource.RLIMIT_NOFILE else true(which))


def nameless(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")


def few_ports(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    narrow = Path(subject.config.output).parent / "range"
    narrow.write_text("40000\t40010\n")
    patch.setattr(access, "PORT_RANGE", narrow)


def taken_ports(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(psutil, "net_connections", lambda kind: [Listener("TIME_WAIT", Address("::", i), None) for i in range(65536)])


def readable_token(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    Path(os.environ["RAY_AUTH_TOKEN_PATH"]).chmod(0o644)


def disabled_token(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("RAY_AUTH_MODE", "disabled")


def no_token_to_join_with(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    Path(os.environ["RAY_AUTH_TOKEN_PATH"]).unlink()
    return replace(subject, kind="ray")


def no_mode_to_join_with(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    return replace(subject, kind="ray")


def no_data(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    return run_with(subject, data=replace(subject.config.data, shards=f"{subject.config.output}/none"))


def no_mlflow_server(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return run_with(subject, tracking=TrackingConfig(uri="http://127.0.0.1:9"))


def other_database(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    path = Path(subject.config.output).parent / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE cats (name TEXT)")
    database.close()
    return run_with(subject, tracking=TrackingConfig(uri=f"sqlite:///{path}"))


def output_is_read_only(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        tempfile, "TemporaryDirectory", refuse(errno.EROFS, lambda *_, **options: "dir" in options, tempfile.TemporaryDirectory)
    )


def no_replace(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "replace", refuse(errno.EIO))


def replace_in_two_steps(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    """As mounted object stores do."""

    def rename(source: Path, target: Path) -> None:
        target.unlink()
        time.sleep(0.002)
        source.rename(target)

    patch.setattr(os, "replace", rename)


def no_fsync_of_folders(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", refuse(errno.EINVAL, lambda file: os.path.isdir(f"/proc/self/fd/{file}"), lambda file: None))


def create_twice(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    true = os.open

    def forgiving(path: Any, flags: int, *mode: int, **options: Any) -> int:
        return true(path, flags & ~os.O_EXCL if Path(path).name == "only-once" else flags, *mode, **options)

    patch.setattr(os, "open", forgiving)


def no_locks(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fcntl, "flock", refuse(errno.ENOLCK))


def locks_without_effect(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fcntl, "flock", lambda file, operation: None)


def storage_of_tomorrow(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(time, "time", lambda true=time.time: true() - 86400)


def full_disk(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "needed_bytes", lambda config: 2**60)


def failing_disk(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fdatasync", refuse(errno.EIO))


def breaks_off(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(access, "PORT_RANGE", Path("/proc/no-such-file"))


BREAKS: list[tuple[Break, str]] = [
    (old_torch, "versions"),
    (missing_package, "versions"),
    (no_floors, "versions"),
    (more_workers_than_cores, "cores"),
    (small_shm, "shared memory"),
    (few_files, "limits"),
    (nameless, "hostname"),
    (few_ports, "ports"),
    (breaks_off, "ports"),
    (readable_token, "token"),
    (disabled_token, "token"),
    (no_token_to_join_with, "token"),
    (no_mode_to_join_with, "token"),
    (no_data, "data"),
    (no_mlflow_server, "mlflow"),
    (other_database, "mlflow"),
    (output_is_read_only, "output"),
    (no_replace, "rename"),
    (replace_in_two_steps, "rename"),
    (no_fsync_of_folders, "fsync"),
    (create_twice, "exclusive create"),
    (no_locks, "locks"),
    (locks_without_effect, "locks"),
    (storage_of_tomorrow, "storage clock"),
    (full_disk, "free space"),
    (failing_disk, "write speed"),
]


@pytest.mark.parametrize(("spoil", "check"), BREAKS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_is_broken_fails_and_nothing_else(
    well: Subject, levels_of: LevelsOf, monkeypatch: pytest.MonkeyPatch, spoil: Break, check: str
) -> None:
    subject = spoil(well, monkeypatch) or well
    assert levels_of(subject) == {check: "fail"}


def test_a_full_port_range_fails(well: Subject, levels_of: LevelsOf, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_ports(well, monkeypatch)
    assert levels_of(well) == {"ports": "fail"}


def on_nfs(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(services, "file_system", lambda path: "nfs4")


def token_in_the_environment(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("RAY_AUTH_TOKEN", "secret")


def old_python(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("platform.python_version", lambda: "3.11.7")


def too_many_threads(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("OMP_NUM_THREADS", "4096")


def little_to_lock(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    card = Path(subject.config.output).parent / "infiniband"
    (card / "mlx5_0").mkdir(parents=True)
    patch.setattr(machine, "INFINIBAND", card)
    true = resource.getrlimit
    patch.setattr(resource, "getrlimit", lambda which: (65536, 65536) if which == resource.RLIMIT_MEMLOCK else true(which))


def nothing_asked_for(subject: Subject, patch: pytest.MonkeyPatch) -> Subject:
    return replace(subject, has_data=False)


def slow_disk(subject: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "SLOW_MIB_PER_S", 1e9)


@pytest.mark.parametrize(
    ("strain", "check"),
    [
        (on_nfs, "mlflow"),
        (token_in_the_environment, "token"),
        (old_python, "python"),
        (too_many_threads, "cores"),
        (little_to_lock, "limits"),
        (nothing_asked_for, "data"),
        (slow_disk, "write speed"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_doubtful_is_told_and_fails_nothing(
    well: Subject, levels_of: LevelsOf, monkeypatch: pytest.MonkeyPatch, strain: Break, check: str
) -> None:
    subject = strain(well, monkeypatch) or well
    assert levels_of(subject) == {check: "warn"}


def test_a_name_that_is_loopback_is_told_where_there_are_other_machines(
    on_a_cluster: Subject, levels_of: LevelsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("127.0.1.1", 0))])
    assert levels_of(on_a_cluster) == {"hostname": "warn"}


GPU = Gpu("H200", free=139 * GIB, total=140 * GIB, bf16=True, works=True)
DRIVER = ("H200, 570.1",) * 2


@pytest.mark.parametrize(
    ("found", "config", "gpus_per_node", "level"),
    [
        (Gpus("12.8", DRIVER, (GPU, GPU)), EngineConfig(), 2, None),
        (Gpus("12.8", DRIVER, (GPU,)), EngineConfig(), 2, "fail"),  # one of two is missing
        (Gpus(None, (), ()), EngineConfig(device="cuda"), 0, "fail"),
        (Gpus(None, DRIVER, ()), EngineConfig(), 0, "fail"),  # torch without CUDA
        (Gpus(None, DRIVER, ()), EngineConfig(device="cpu"), 0, None),
        (Gpus(None, (), (), "torch had not answered"), EngineConfig(), 1, "fail"),
        (Gpus("12.8", DRIVER, (GPU, replace(GPU, works=False))), EngineConfig(), 2, "fail"),
        (Gpus("12.8", DRIVER, (GPU, replace(GPU, bf16=False))), EngineConfig(precision="bf16"), 2, "fail"),
        (Gpus("12.8", DRIVER, (GPU, replace(GPU, free=50 * GIB))), EngineConfig(), 2, "warn"),
        (Gpus("12.8", DRIVER, (GPU, replace(GPU, name="A100"))), EngineConfig(), 2, "warn"),
    ],
)
def test_gpus_are_as_many_as_needed_and_work_and_are_free(
    well: Subject,
    levels_of: LevelsOf,
    monkeypatch: pytest.MonkeyPatch,
    found: Gpus,
    config: EngineConfig,
    gpus_per_node: int,
    level: str | None,
) -> None:
    monkeypatch.setattr(gpus, "look", lambda: found)
    subject = replace(run_with(well, engine=config), gpus=gpus_per_node)
    assert levels_of(subject) == ({"gpus": level} if level else {})


class _Answer(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Not to the test's output."""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """Starts what listens as Ray's dashboard on an address, and answers with a status."""
    servers: list[http.server.HTTPServer] = []

    def start(status: int, address: str) -> None:
        server = http.server.HTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"status": status}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(access, "DASHBOARD_PORT", server.server_port)
        listener = Listener(psutil.CONN_LISTEN, Address(address, server.server_port), None)
        monkeypatch.setattr(psutil, "net_connections", lambda kind: [listener])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "address", "expected"),
    [
        (401, "127.0.0.1", {}),
        (200, "127.0.0.1", {"dashboard": "fail"}),
        (401, "0.0.0.0", {"dashboard": "warn"}),
        (200, "0.0.0.0", {"dashboard": "fail"}),
    ],
)
def test_a_dashboard_asks_for_a_token_and_is_seen_here_alone(
    well: Subject,
    levels_of: LevelsOf,
    dashboard: Callable[[int, str], None],
    status: int,
    address: str,
    expected: dict[str, str],
) -> None:
    dashboard(status, address)
    assert levels_of(well) == expected


def test_a_subject_is_the_same_on_another_machine(well: Subject) -> None:
    assert Subject.from_dict(well.to_dict()) == well


def test_a_cluster_says_what_its_machines_must_have() -> None:
    config = RunConfig(engine=EngineConfig(device="cuda"), launch=LaunchConfig(workers=2), data=DataConfig(shards="x"))
    here = Subject.of(config, ClusterConfig())
    assert (here.workers, here.gpus) == (2, 2)
    many = Subject.of(replace(config, launch=LaunchConfig()), ClusterConfig(kind="slurm", nodes=4, gpus_per_node=8))
    assert (many.workers, many.gpus, many.nodes) == (8, 8, 4)
    assert any(text.startswith("torch>=2.10") for text in many.floors)

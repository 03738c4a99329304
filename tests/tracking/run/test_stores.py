"""The same spool on every kind of store: equal points are kept once, servers go and come back, replies are lost (K2, K5)."""

import math
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cromss_dist.errors import RegistryError
from cromss_dist.tracking.run import shipper
from cromss_dist.tracking.run.replica import SHIPPED_FILE, read_watermark
from cromss_dist.tracking.run.shipper import Shipper, deliver
from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool
from tests.servers import MlflowServer, Postgres
from tests.tracking.run.recorded import end, expected_points, stored_points, stored_run, write_attempt


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow), pytest.param("server", marks=pytest.mark.slow)]
)
def test_a_store_keeps_one_of_equal_points(
    kind: str, run_dir: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the idempotence of all sending rests on, NaN included."""
    monkeypatch.setenv("CROMSS_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    stores = {
        "sqlite": lambda: request.getfixturevalue("store_uri"),
        "postgresql": lambda: request.getfixturevalue("postgres").store(),
        "server": lambda: request.getfixturevalue("server").uri,
    }
    uri = stores[kind]()
    write_attempt(run_dir, range(1, 1500))
    with Spool(run_dir) as spool:
        for step in range(1500, 1510):
            spool.append("progress", step=step, samples=0, metrics={"train/lr": math.nan})
    for _ in range(3):  # the second and third over what is there, in part and whole
        deliver(run_dir, uri, again=True)
        assert stored_points(run_dir, uri) == expected_points(run_dir)
        write_attempt(run_dir, range(1510, 1520), number=2)
    stored_run(run_dir, uri)


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_gets_everything(
    postgres: Postgres, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper, "INTERVAL_S", 0.1)
    told: list[str] = []
    with MlflowServer(tmp_path / "server", postgres.store()) as server:
        server.stop()
        sending = Shipper(run_dir, server.uri, told.append)
        write_attempt(run_dir, range(1, 200))
        assert _within(120, lambda: len(told) == 1)
        server.start()
        assert _within(120, lambda: len(told) == 2)
        write_attempt(run_dir, range(200, 400), number=2)
        server.kill()
        write_attempt(run_dir, range(400, 600), number=3)
        end(run_dir)
        assert _within(120, lambda: len(told) == 3)
        server.start()
        assert sending.close(120).problem is None
        assert stored_points(run_dir, server.uri) == expected_points(run_dir)
        assert stored_run(run_dir, server.uri).info.status == "FINISHED"


@pytest.mark.slow
def test_a_connection_that_drops_replies_leaves_nothing_twice(server: MlflowServer, run_dir: Path) -> None:
    write_attempt(run_dir, range(1, 600))
    with Spool(run_dir) as spool:
        spool.append("params", values={"seed": 0})
        spool.append("dataset", name="a", digest="f" * 64, source="/shards")
    end(run_dir)
    host, _, port = server.uri.removeprefix("http://").partition(":")
    with _dropping_replies((host, int(port))) as (uri, dropped):
        for _ in range(40):
            (run_dir / SHIPPED_FILE).unlink(missing_ok=True)  # each try begins at the start
            with suppress(RegistryError):
                deliver(run_dir, uri)
                break
        else:
            pytest.fail("never delivered")
    assert dropped, "else nothing was tried"
    assert stored_points(run_dir, server.uri) == expected_points(run_dir)
    run = stored_run(run_dir, server.uri)
    assert (run.info.status, run.data.params, len(run.inputs.dataset_inputs)) == ("FINISHED", {"seed": "0"}, 1)
    mark = read_watermark(run_dir, uri)
    assert mark
    assert mark.offset == (run_dir / EVENTS_FILE).stat().st_size


def _within(seconds: float, condition: "object") -> bool:
    assert callable(condition)
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        threading.Event().wait(0.05)
    return False


@contextmanager
def _dropping_replies(server: tuple[str, int]) -> Iterator[tuple[str, list[int]]]:
    """A proxy that hands requests on and closes some connections in place of the reply. Gives its address and what it dropped."""
    draws, dropped = random.Random(0), []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(server) as upstream:
            threading.Thread(target=_copy, args=(client, upstream), daemon=True).start()
            while reply := upstream.recv(1 << 16):
                if draws.random() < 0.4:
                    dropped.append(len(reply))
                    client.shutdown(socket.SHUT_RDWR)  # a close alone waits for the other thread
                    upstream.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(reply)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", dropped
    finally:
        listener.close()


def _copy(source: socket.socket, to: socket.socket) -> None:
    here, there = (b"Host: 127.0.0.1:%d" % port for port in (source.getsockname()[1], to.getpeername()[1]))
    with suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data.replace(here, there))  # the server takes no other host

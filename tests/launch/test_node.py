"""One machine of a cluster, with a Ray that is made up: a process that stays, and one below it that does not want to end."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cromss_dist.errors import ClusterError, ConfigError
from launch import node
from tests.launch.conftest import ROOT

NODE = """
import sys
from pathlib import Path
from cromss_dist.errors import main_guard
from launch import node
ray = sys.argv.pop()
node.GRACE_S = 0.3
node.check_closed = lambda address: None
node.ray_command = lambda options, head, temp_dir: [sys.executable, "-c", ray, str(temp_dir)]
sys.exit(main_guard(node.main))
"""
# Leaves a process behind in a session of its own, which ignores the request to end, then answers as Ray does.
STAYS = """
import subprocess, sys, time
from pathlib import Path
Path(sys.argv[1]).mkdir(exist_ok=True)
Path(sys.argv[1]).chmod(0o777)  # as Ray does
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
left = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True, stdout=subprocess.PIPE)
left.stdout.readline()
Path(sys.argv[1], "pids").write_text(str(left.pid))
Path(sys.argv[1], "ray_current_cluster").write_text("127.0.0.1:4321")
time.sleep(600)
"""
FAILS = "import sys; print('Head of 127.0.0.1 says no.'); sys.exit(1)"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Short enough for the paths of sockets."""
    path = Path(f"/tmp/n{os.getpid()}-{time.monotonic_ns() % 10**6}")
    path.mkdir(mode=0o700)
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts launch.node; `folder/token` is its token, `folder/ray` its folder."""
    started = []

    def run(*arguments: str, ray: str = STAYS) -> "subprocess.Popen[str]":
        common = ["--token-file", str(folder / "token"), "--temp-dir", str(folder / "ray"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", NODE, *common, ray], cwd=ROOT, text=True, **pipes))  # type: ignore[call-overload]
        return started[-1]  # type: ignore[no-any-return]

    yield run
    for process in started:
        process.kill()
        process.communicate()


HEAD = ("--head", "--address", "127.0.0.1")


def pids_left(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "ray" / "r" / "pids").read_text().split() if psutil.pid_exists(int(pid))]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_head_makes_a_token_tells_where_it_is_and_ends_with_all_below_it(
    start: Start, folder: Path, number: signal.Signals
) -> None:
    announced = folder / "head"
    announced.write_text("127.0.0.1:1\n")  # of a cluster that is gone
    head = start(*HEAD, "--announce", str(announced))
    assert head.stdout is not None
    assert head.stdout.readline() == f"Ray runs on this machine; cluster 127.0.0.1:4321; logs below {folder / 'ray'}.\n"
    assert announced.read_text() == "127.0.0.1:4321\n"
    token = folder / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    below = psutil.Process(head.pid).children(recursive=True)
    assert token.read_text() not in " ".join(word for process in below for word in process.cmdline())
    head.send_signal(number)
    assert head.wait(60) == 0
    assert not pids_left(folder), "nor who left the session and ignores SIGTERM"
    assert not announced.exists()
    assert (folder / "ray").stat().st_mode & 0o777 == 0o700


def test_ray_ends_with_a_node_that_is_killed(start: Start, folder: Path) -> None:
    head = start(*HEAD)
    assert head.stdout is not None
    head.stdout.readline()
    (ray,) = psutil.Process(head.pid).children()
    head.kill()
    assert ray.wait(60) is None or not ray.is_running()


@pytest.mark.parametrize("by_nohup", [False, True], ids=["plain", "nohup"])
def test_a_node_ends_with_the_process_that_started_it_unless_that_was_nohup(folder: Path, by_nohup: bool) -> None:
    arguments = [*HEAD, "--token-file", str(folder / "token"), "--temp-dir", str(folder / "ray")]
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)" if by_nohup else ""
    parent = (
        f"import signal, subprocess, time; {ignore}\nprint(subprocess.Popen({[sys.executable, '-c', NODE, *arguments, STAYS]!r}"
    )
    parent += ", stdout=subprocess.DEVNULL).pid, flush=True); time.sleep(600)"
    starter = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    started = psutil.Process(int(starter.stdout.readline()))
    wait_until(lambda: (folder / "ray" / "r" / "ray_current_cluster").exists())
    starter.kill()
    starter.communicate()
    if by_nohup:
        time.sleep(2 * node._POLL_S)
        assert started.is_running()
        started.terminate()
    wait_until(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE)
    assert not pids_left(folder)


def test_a_ray_that_ends_by_itself_has_the_last_word(start: Start, folder: Path) -> None:
    head = start(*HEAD, ray=FAILS)
    _, error = head.communicate(timeout=60)
    assert head.returncode == ClusterError.exit_code
    assert error.startswith("ClusterError: Ray on this machine did not start. Its last words: Head of 127.0.0.1 says no.")
    assert str(folder / "ray" / "node.log") in error


def test_who_joins_waits_for_a_head_that_answers(start: Start, folder: Path) -> None:
    node.make_token(folder / "token")
    announced = folder / "head"
    announced.write_text("127.0.0.1:1\n")  # a head that is gone
    late = start("--join-announced", str(announced))
    with socket.create_server(("127.0.0.1", 0)) as head:
        time.sleep(0.3)
        assert late.poll() is None
        announced.write_text(f"127.0.0.1:{head.getsockname()[1]}\n")
        assert late.stdout is not None
        assert late.stdout.readline().startswith("Ray runs on this machine")


def test_who_joins_says_which_head_is_not_there(start: Start, folder: Path) -> None:
    node.make_token(folder / "token")
    for arguments, told in (
        (("--join", "127.0.0.1:1"), "127.0.0.1:1"),
        (("--join-announced", str(folder / "x")), "no such file"),
    ):
        alone = start(*arguments, "--wait", "0.2")
        _, error = alone.communicate(timeout=60)
        assert alone.returncode == ClusterError.exit_code
        assert "No head of a cluster was there within 0 s" in error
        assert told in error


def test_a_taken_port_is_told(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for arguments in (("--port", str(port)), ("--dashboard", f"127.0.0.1:{port}")):
            head = start(*HEAD, *arguments)
            _, error = head.communicate(timeout=60)
            assert head.returncode == ClusterError.exit_code
            assert f"The port {port} of 127.0.0.1 is taken" in error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--head",), "--head needs --address"),
        ((*HEAD[:2], "here"), "'here' does not appear to be an IPv4 or IPv6 address"),
        ((*HEAD, "--dashboard", "8265"), "--dashboard needs HOST:PORT"),
        (("--join", "a:1", "--announce", "x"), "are the head's"),
        (("--head", "--join", "a:1"), "not allowed with argument"),
    ],
)
def test_arguments_that_do_not_fit_are_told(start: Start, arguments: tuple[str, ...], told: str) -> None:
    refused = start(*arguments)
    assert told in refused.communicate(timeout=60)[1]
    assert refused.returncode == 2


def test_a_token_that_others_can_read_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    with pytest.raises(ConfigError, match="There is no token"):
        node.check_token(token)
    node.make_token(token)
    node.check_token(token)
    before = token.read_text()
    node.make_token(token)
    assert token.read_text() == before, "the cluster's other machines have it"
    for mode in (0o640, 0o604, 0o620):
        token.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
            node.check_token(token)


def test_a_folder_that_others_prepared_is_refused(folder: Path) -> None:
    (folder / "own").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "own")
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    for name, told in (("link", "could be changed by others"), ("open", "could be changed by others"), ("n" * 60, "60|sockets")):
        with pytest.raises(ConfigError, match=told), node.private_folder(folder / name):
            pass
    with node.private_folder(folder / "new") as made:
        assert made.stat().st_mode & 0o777 == 0o700
    assert made.exists()
    with node.private_folder(None) as private:
        assert private.stat().st_mode & 0o777 == 0o700
    assert not private.exists()


def test_ray_is_started_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    environment = node.ray_environment(tmp_path / "token", "10.0.0.1")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert not {"RAY_AUTH_TOKEN", "RAY_ADDRESS"} & environment.keys()
    plain = {"address": "10.0.0.1", "port": 0, "dashboard": None, "cpus": 2, "gpus": None}
    command = node.ray_command(argparse.Namespace(**plain), None, tmp_path)
    assert "--include-dashboard=false" in command
    joined = node.ray_command(argparse.Namespace(**plain), "10.0.0.9:6379", tmp_path)
    assert {"--address=10.0.0.9:6379", "--node-ip-address=10.0.0.1", "--num-cpus=2"} <= set(joined)
    assert not {"--head", "--no-monitor"} & set(joined)
    hook = argparse.Namespace(ray_client_server_port=10001)
    node.without_client_server(hook, head=True)
    assert hook.ray_client_server_port is None

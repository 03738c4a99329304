"""One machine of a Ray cluster that only those with its token can use: `python -m launch.node --head --token-file FILE`.

Layer 5. Runs in the foreground; Ray's processes end with it, whatever ends it. Slurm starts it on each node of a job, and
people with ssh and a few machines start it themselves.
"""

import argparse
import ctypes
import ipaddress
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import ClusterError, ConfigError, main_guard
from launch.probe import check_closed
from launch.session import write_token

DESCRIPTION = """Starts one machine of a Ray cluster and keeps it until SIGTERM, Ctrl-C, the end of the process that started
it (unless by nohup), or of the cluster. Every machine needs the same token file, readable by its user alone; --head makes
it where there is none. Ray's processes listen on the address and on loopback, and answer nobody without the token."""

# So that a machine that falls silent is missed after some 10 s, one whose processes were killed after 4; Ray's own: 45 and 15.
WATCHFUL = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # a machine that has lost its head ends; Ray's own: 60
}
LONGEST_TEMP_DIR = 40  # bytes: the paths of Ray's sockets below must stay under 107
GRACE_S = 10.0  # for Ray's processes to end by themselves
_POLL_S = 0.5
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m launch.node", description=DESCRIPTION, allow_abbrev=False)
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--head", action="store_true", help="start a cluster")
    role.add_argument("--join", metavar="HOST:PORT", help="join the cluster whose head is there")
    role.add_argument("--join-announced", metavar="FILE", type=Path, help="join the cluster that FILE names; waits for it")
    parser.add_argument("--address", metavar="IP", help="of this machine, for the others; default: its way to the head")
    parser.add_argument("--token-file", metavar="FILE", type=Path, required=True, help="the cluster's token, mode 0600")
    parser.add_argument("--port", type=int, default=0, help="of the head; default: a free one")
    parser.add_argument("--announce", metavar="FILE", type=Path, help="where --head writes HOST:PORT once it answers")
    parser.add_argument("--dashboard", metavar="HOST:PORT", help="of --head: takes jobs there; best on 127.0.0.1; default: none")
    parser.add_argument("--cpus", type=int, help="that Ray may give away; default: all")
    parser.add_argument("--gpus", type=int, help="likewise")
    parser.add_argument("--temp-dir", metavar="DIR", type=Path, help="for Ray's logs and sockets, kept; default: a private one")
    parser.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="for the head (default %(default)s)")
    options = parser.parse_args()
    if options.head and not options.address:
        parser.error("--head needs --address, the address of this machine that the others reach it at")
    if options.address:
        try:
            ipaddress.ip_address(options.address)
        except ValueError as error:
            parser.error(f"--address: {error}")
    if options.dashboard and not re.fullmatch(r"[A-Za-z0-9.\[\]:-]+:[0-9]+", options.dashboard):
        parser.error("--dashboard needs HOST:PORT, such as 127.0.0.1:8265")
    if not options.head and (options.announce or options.dashboard or options.port):
        parser.error("--announce, --dashboard and --port are the head's")
    with stopping() as asked_to_stop, private_folder(options.temp_dir) as temp_dir:
        serve(options, temp_dir, asked_to_stop)
    return 0


def serve(options: argparse.Namespace, temp_dir: Path, asked_to_stop: Callable[[], bool]) -> None:
    """Starts Ray here and returns when it was asked to stop and all of Ray's processes have ended.

    Raises:
        ConfigError: the token file is not there, or open to others.
        ClusterError: the cluster to join lets anyone in; a port is taken; Ray does not start, or ended by itself, and the message
            has its last words.
    """
    if options.head:
        make_token(options.token_file)
        if options.announce:
            options.announce.unlink(missing_ok=True)  # of a cluster that is gone
        check_free(options.address, options.port)
        if options.dashboard:
            host, _, port = options.dashboard.rpartition(":")
            check_free(host.strip("[]"), int(port))
    check_token(options.token_file)
    head = None if options.head else find_head(options, asked_to_stop)
    if asked_to_stop():
        return
    if head:
        check_closed(head)
    ray_dir = (
        temp_dir / "r"
    )  # Ray lets everyone write to its folder, so that it has one within ours; the name is short for sockets
    current = ray_dir / "ray_current_cluster"  # Ray writes HOST:PORT here when the node is up
    current.unlink(missing_ok=True)
    log = temp_dir / "node.log"
    # Whoever outlives its parent becomes our child, and the end of this process is the end of Ray's first.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with log.open("wb") as output:
        ray = subprocess.Popen(
            ray_command(options, head, ray_dir),
            env=ray_environment(options.token_file, options.address),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    try:
        announced = False
        while not asked_to_stop():
            if ray.poll() is not None:
                raise ClusterError(_last_words(log, started=announced))
            if not announced and current.exists() and (address := current.read_text()):
                if options.announce:
                    write_atomically(options.announce, f"{address}\n".encode())
                where = f", dashboard at {options.dashboard}" if options.dashboard else ""
                print(f"Ray runs on this machine; cluster {address}{where}; logs below {temp_dir}.", flush=True)
                announced = True
            time.sleep(_POLL_S)
    finally:
        if options.announce:
            options.announce.unlink(missing_ok=True)
        end_all_children()


def ray_command(options: argparse.Namespace, head: str | None, temp_dir: Path) -> list[str]:
    """The command that starts Ray's processes and waits for them: the token is not in it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--temp-dir={temp_dir}"]
    command += ["--dashboard-agent-listen-port=0", "--include-log-monitor=false"]
    if head is None:
        command += ["--head", f"--port={options.port}", "--no-monitor", "--disable-usage-stats"]
        command += [f"--include-dashboard={str(bool(options.dashboard)).lower()}"]
        if options.dashboard:
            host, _, port = options.dashboard.rpartition(":")
            command += [f"--dashboard-host={host}", f"--dashboard-port={port}"]
    else:
        command += [f"--address={head}"]
    if options.address:
        command += [f"--node-ip-address={options.address}"]
    command += [f"--num-{kind}={n}" for kind, n in (("cpus", options.cpus), ("gpus", options.gpus)) if n is not None]
    return command


def ray_environment(token_file: Path, address: str | None) -> dict[str, str]:
    """Of Ray's processes on a machine of a cluster: with the token's place, without what would turn it off."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    if address and ipaddress.ip_address(address).is_loopback:
        kept["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # off: Ray takes the loopback address as its node's
    return kept | {
        **WATCHFUL,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file.absolute()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",  # `python` of a job's command is this one
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",  # its ports answer without a token; this and the next keep them closed
        "DASHBOARD_METRIC_PORT": "-1",
        "RAY_START_HOOK": "launch.node.without_client_server",
    }


def without_client_server(parameters: Any, head: bool) -> None:
    """Ray calls this before it starts: no server of the Ray client, which `ray start` has no option for."""
    parameters.ray_client_server_port = None


def make_token(path: Path) -> None:
    """Writes a new token for this user alone, unless there is one."""
    with suppress(FileExistsError):
        write_token(path, secrets.token_hex(32))


def check_token(path: Path) -> None:
    """Raises ConfigError unless the file of the token is there, and only its user can read it."""
    if not path.is_file():
        raise ConfigError(f"There is no token in {path}: copy that of the head there, and `chmod 600` it.")
    found = path.stat()
    if found.st_mode & 0o077 or found.st_uid != os.geteuid():
        raise ConfigError(
            f"The token in {path} is not this user's alone (mode {found.st_mode & 0o777:04o}), and whoever reads it can run code "
            f"on the cluster: `chmod 600 {path}`, and better have --head make a new one."
        )


def check_free(address: str, port: int) -> None:
    """Raises ClusterError unless a port of this machine is free: Ray would say so deep in its logs; 0 always is."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ClusterError(
                f"The port {port} of {address} is taken, or the address is not this machine's ({error.strerror}); end what "
                "listens there, give another --port or --dashboard, or leave --port out for a free one."
            ) from error


def find_head(options: argparse.Namespace, asked_to_stop: Callable[[], bool]) -> str:
    """HOST:PORT of the head, as soon as something answers there.

    Raises:
        ClusterError: nothing does in the time.
    """
    deadline = time.monotonic() + options.wait
    address, why = options.join, "there is no such file"
    while not asked_to_stop():
        if options.join_announced:
            with suppress(FileNotFoundError):
                address = options.join_announced.read_text().strip()
        if address:
            try:  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                return str(address)
            except (OSError, ValueError, OverflowError) as error:
                why = f"{address}: {error}"
        if time.monotonic() > deadline:
            raise ClusterError(
                f"No head of a cluster was there within {options.wait:.0f} s ({options.join_announced or 'by --join'}; {why}). "
                "Start it with --head first, give its HOST:PORT, or wait longer with --wait."
            )
        time.sleep(_POLL_S)
    return ""


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields a question: whether this process was told to end, or the one that started it has ended."""
    parent, told = os.getppid(), False
    outlives = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True

    for name in (signal.SIGTERM, signal.SIGINT) if outlives else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, stop)
    yield lambda: told or (os.getppid() != parent and not outlives)


@contextmanager
def private_folder(path: Path | None) -> Iterator[Path]:
    """A folder that only this user can write: the one given, or a new one that goes with the block unless it fails.

    Raises:
        ConfigError: the folder is another user's, a link, open to others, or its name too long for Ray's sockets.
    """
    folder = Path(tempfile.mkdtemp(prefix="cromss-node-")) if path is None else path.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(f"--temp-dir={folder} could be changed by others; give a folder that is new, or yours with mode 0700.")
    if len(os.fsencode(folder)) > LONGEST_TEMP_DIR:
        raise ConfigError(
            f"--temp-dir={folder} is {len(os.fsencode(folder))} bytes long, and the paths of Ray's sockets in it would not fit; "
            f"give one of up to {LONGEST_TEMP_DIR} bytes, such as /tmp/ray-1."
        )
    yield folder
    if path is None:
        shutil.rmtree(folder, ignore_errors=True)


def end_all_children() -> None:
    """Ends every process below this one: with a request first, unless they are held off from it as we are, then without."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process().children():
            child.terminate()
    held = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # launch.slurm.node does
    deadline = time.monotonic() + (0 if held else GRACE_S)
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def _last_words(log: Path, started: bool) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    what = "ended by itself: its head is gone, or a process of Ray's died" if started else "did not start"
    return f"Ray on this machine {what}. Its last words: {' | '.join(lines[-3:]) or 'none'}. All of them are in {log}."


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


if __name__ == "__main__":
    sys.exit(main_guard(main))

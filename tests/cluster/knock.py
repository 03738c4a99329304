"""Someone without a token at every port of a host: `python -m tests.cluster.knock ADDRESS:PORT ...` prints what each answers.

Ray's own servers tell by their binary which calls they have: all of them are tried, each with an empty request.
"""

import http.client
import json
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc
import ray

from tests.cluster.hosts import Host

TIMEOUT_S = 10.0
METHODS = ("GET", "POST", "DELETE")
PATHS = (
    *("/", "/api/version", "/api/jobs/", "/api/jobs/x/stop", "/api/job_agent/jobs/", "/nodes?view=summary", "/logical/actors"),
    *("/api/v0/nodes", "/api/v0/logs", "/api/cluster_status", "/api/packages/gcs/x", "/api/gcs_healthz", "/api/healthz"),
    *("/api/local_raylet_healthz", "/events", "/metrics", "/worker/traceback", "/get_or_create_runtime_env"),
)
HEALTH = "/grpc.health.v1.Health/Check"
CRASHES = "/ray.rpc.syncer.RaySyncer/StartSync"  # the stream of nodes: one that names no node ends Ray 2.60's head, token or not


@dataclass(frozen=True)
class Listener:
    """A port that a host's process listens at."""

    address: str  # '*' is any
    port: int
    process: str  # with `ray::` where Ray has named it


def listeners(host: Host) -> list[Listener]:
    """All TCP ports of a host."""
    names = host.pids()
    found = []
    for line in host.run("ss", "--no-header", "-ltnp").stdout.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        pids = [int(pid) for pid in re.findall(r"pid=(\d+)", line)]
        inside = {_inside(pid): command for pid, command in names.items()}
        command = next((inside[pid] for pid in pids if pid in inside), "?")
        address = {"0.0.0.0": "*", "[::]": "*"}.get(address, address)
        found.append(Listener(address, int(port), _role(command)))
    return sorted(set(found), key=lambda listener: (listener.process, listener.port))


def _inside(pid: int) -> int:
    """The number of a process on its own host."""
    status = Path(f"/proc/{pid}/status")
    numbers = re.search(r"^NSpid:\s+(.*)$", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(numbers[1].split()[-1]) if numbers else pid


def _role(command: str) -> str:
    words = command.split()
    if "ray/dashboard/dashboard.py" in command:
        return "dashboard"
    return words[0].rpartition("/")[2] if words else "?"


def answers(address: str, port: int) -> list[str]:
    """What a port answers without a token: of HTTP `METHOD PATH CODE`, of gRPC `CALL CODE`, `closed` of one that hangs up."""
    try:
        with socket.create_connection((address, port), timeout=TIMEOUT_S) as talk:
            talk.sendall(f"GET / HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
            first = talk.recv(16)
    except OSError:
        return ["closed"]
    if first.startswith(b"HTTP/1"):
        return [f"{method} {path} {_http(address, port, method, path)}" for method in METHODS for path in PATHS]
    if not first:
        return ["closed"]
    return _grpc(address, port)


def _http(address: str, port: int, method: str, path: str) -> int | str:
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body=b"{}" if method == "POST" else None)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return "closed"
    finally:
        connection.close()


def _grpc(address: str, port: int) -> list[str]:
    binary = (Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    calls = sorted({call.decode() for call in re.findall(rb"/ray\.rpc\.[A-Za-z.]+/[A-Za-z]+", binary)} - {CRASHES})
    assert len(calls) > 50, "Ray's binary names its calls"
    codes = []
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        for call in (HEALTH, *calls):
            try:
                channel.unary_unary(call)(b"", timeout=TIMEOUT_S)
                codes.append(f"{call} OK")
            except grpc.RpcError as error:
                codes.append(f"{call} {error.code().name}")
    return codes


def knock(host: Host, places: list[tuple[str, int]]) -> dict[str, list[str]]:
    """What ports answer to a process on a host that has no token."""
    places_text = [f"{address}:{port}" for address, port in places]
    clean = ["env", "-u", "RAY_AUTH_TOKEN_PATH", "-u", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE=disabled"]
    done = host.run(*clean, sys.executable, "-m", "tests.cluster.knock", *places_text, timeout_s=300, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[str]] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    print(json.dumps({place: answers(place.rpartition(":")[0], int(place.rpartition(":")[2])) for place in sys.argv[1:]}))

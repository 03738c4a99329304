"""Who could get in, and the ports that a run takes: Ray's token, its dashboard, free ports.

Layer 4.
"""

import errno
import http.client
import ipaddress
import os
import socket
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from cromss_dist.cluster import token_path
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.subject import Subject

PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
PORTS_OF_A_WORKER = 16  # generously: of Ray's process, of the collectives' connections
PORTS_OF_A_NODE = 64  # of Ray's daemons and idle workers
DASHBOARD_PORT = 8265  # Ray's default
_DASHBOARDS = ("ray/dashboard/dashboard.py", "ray-dashboard")


def check_token(subject: Subject) -> Finding:
    """Whether Ray asks for a token, and nobody else can read it: whoever has it runs code as this user."""
    mode, path = os.environ.get("RAY_AUTH_MODE"), token_path()
    if mode not in (None, "token"):
        return Finding("token", "fail", f"RAY_AUTH_MODE={mode}: Ray lets anyone in", "export RAY_AUTH_MODE=token")
    try:
        found = path.stat()
    except OSError as error:
        if subject.kind != "ray":
            return Finding("token", "ok", "a run makes one of its own")
        fix = "Copy the token of the cluster there, with mode 0600, or say with RAY_AUTH_TOKEN_PATH where it is."
        return Finding("token", "fail", f"none at {path} ({error.strerror})", fix)
    told = f"{path}, mode {found.st_mode & 0o777:04o}"
    if found.st_uid not in (os.geteuid(), 0):
        return Finding("token", "fail", f"{told}, is of user {found.st_uid}", f"Make one of your own in place of {path}.")
    if found.st_mode & 0o077:
        fix = f"chmod 600 {path}, and a new token for every cluster that uses it: others could read this one."
        return Finding("token", "fail", f"{told}: others can read it", fix)
    if os.environ.get("RAY_AUTH_TOKEN"):
        fix = "Put it into a file with mode 0600 and name that in RAY_AUTH_TOKEN_PATH: every process inherits the environment."
        return Finding("token", "warn", "the token is in RAY_AUTH_TOKEN", fix)
    if subject.kind == "ray" and mode is None:
        return Finding("token", "fail", f"{told}, and RAY_AUTH_MODE is unset", "export RAY_AUTH_MODE=token")
    return Finding("token", "ok", told)


def check_dashboard() -> Finding:
    """Whether a dashboard of Ray on this machine can be used without a token, or from other machines."""
    places = _dashboards()
    opened = [place for place in places if not _asks_for_token(*place)]
    told = ", ".join(f"{host}:{port}" for host, port in places) or "none on this machine"
    if opened:
        where = ", ".join(f"{host}:{port}" for host, port in opened)
        fix = "Stop that Ray and start it with RAY_AUTH_MODE=token; look for jobs that you do not know."
        return Finding("dashboard", "fail", f"{where} answers without a token: who reaches it runs code here", fix)
    if any(not ipaddress.ip_address(host).is_loopback for host, _ in places):
        fix = "Start it with --dashboard-host 127.0.0.1, and reach it through ssh -L 8265:127.0.0.1:8265: it has no TLS."
        return Finding("dashboard", "warn", f"{told}, seen by other machines", fix)
    return Finding("dashboard", "ok", told)


def check_ports(subject: Subject) -> Finding:
    """Whether the system has ports to give; those of a run are all chosen free ones."""
    low, high = map(int, PORT_RANGE.read_text().split())
    needed = PORTS_OF_A_NODE + PORTS_OF_A_WORKER * subject.workers
    taken = {entry.laddr.port for entry in psutil.net_connections("tcp") if entry.laddr and low <= entry.laddr.port <= high}
    free = high - low + 1 - len(taken)
    told = f"{free} free of {low}-{high}"
    fix = f"Widen net.ipv4.ip_local_port_range (1024 65000), or end what holds ports; {needed} are needed."
    if free < needed:
        return Finding("ports", "fail", told, fix)
    with ExitStack() as held:
        try:
            for _ in range(needed):
                held.enter_context(socket.socket()).bind(("127.0.0.1", 0))
        except OSError as error:
            if error.errno == errno.EMFILE:
                return Finding("ports", "warn", f"{told}; {error.strerror}", "Raise the limit of open files: ulimit -n 65536")
            return Finding("ports", "fail", f"{told}; binding to 127.0.0.1: {error.strerror}", f"ip link set lo up. {fix}")
    return Finding("ports", "ok", told)


def _dashboards() -> list[tuple[str, int]]:
    """Host and port of what listens where Ray's dashboard does, or is one by its command."""
    found = set()
    for entry in psutil.net_connections("tcp"):
        if entry.status != psutil.CONN_LISTEN or not entry.laddr:
            continue
        if entry.laddr.port == DASHBOARD_PORT or _is_dashboard(entry.pid):
            found.add((entry.laddr.ip, entry.laddr.port))
    return sorted(found)


def _is_dashboard(pid: int | None) -> bool:
    with suppress(psutil.Error):
        command = " ".join(psutil.Process(pid).cmdline()) if pid else ""
        return any(name in command for name in _DASHBOARDS)
    return False


def _asks_for_token(host: str, port: int) -> bool:
    """Whether a request without a token is refused; what does not speak HTTP refuses, too."""
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/api/version"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return False
    except urllib.error.HTTPError as refusal:
        return refusal.code in (401, 403, 404)  # 404: not Ray's
    except (OSError, ValueError, http.client.HTTPException):
        return True

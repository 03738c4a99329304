"""Hosts on one machine: namespaces of network, names, processes and mounts, joined by a bridge. Needs root, iproute2, util-linux.

As alike to machines as tests need: each has its own address, name, /etc/hosts, processes, /dev/shm and /tmp/ray; all see the
same files otherwise, as a cluster sees its shared storage. What a host lacks are cores and a clock of its own.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

BOOT = 'mount --bind "$1" /etc/hosts && mount -t tmpfs shm /dev/shm && mount -t tmpfs ray /tmp/ray && hostname "$2" && echo up'
# Process 1 adopts orphans and must reap them: bash does.
INIT = BOOT + "; while :; do sleep 1000 & wait; done"
ROOT_ADDRESS = 254  # of this machine on the bridge


def lacking() -> str | None:
    """Why hosts cannot be made here, None where they can."""
    if os.geteuid():
        return "hosts are namespaces, which need root"
    missing = [name for name in ("ip", "nsenter", "unshare", "setpriv", "bash") if not shutil.which(name)]
    if missing:
        return f"hosts need {', '.join(missing)} (packages iproute2 and util-linux)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else f"this kernel refuses namespaces: {tried.stderr.decode().strip()}"


class Process(subprocess.Popen[str]):
    """A process on a host; signals reach itself, not the `nsenter` that started it."""

    def send_signal(self, sig: int) -> None:
        """Sends it, unless the process has ended."""
        while self.poll() is None:
            if inside := _children(self.pid):
                with suppress(ProcessLookupError):
                    os.kill(inside[0], sig)
                return
            time.sleep(0.01)  # nsenter has not forked yet


class Host:
    """One host: `name`, `address`, and what is done to it."""

    def __init__(self, name: str, address: str, link: str, names: Path) -> None:
        self.name, self.address, self.link = name, address, link
        self._names = names  # /etc/hosts
        self._machine: subprocess.Popen[str] | None = None
        self._started: list[Process] = []

    def power_on(self) -> None:
        """Boots; nothing runs on it yet."""
        assert self._machine is None, f"{self.name} is on"
        spaces = [f"--net=/run/netns/{self.name}", "--", "unshare", "--uts", "--pid", "--mount", "--mount-proc", "--fork"]
        command = ["setpriv", "--pdeathsig", "KILL", "nsenter", *spaces, "--kill-child", "bash", "-c", INIT, "init"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._machine = subprocess.Popen([*command, str(self._names), self.name], **pipes)
        assert self._machine.stdout is not None
        if self._machine.stdout.readline() != "up\n":
            raise RuntimeError(f"{self.name} did not boot: {self._machine.communicate(timeout=10)[1]}")

    def power_off(self) -> None:
        """Ends all its processes at once by SIGKILL; their peers' connections are reset, unless it was `cut` before."""
        if self._machine is None:
            return
        for pid in _children(self._machine.pid):  # process 1 takes all others with it
            os.kill(pid, signal.SIGKILL)
        self._machine.communicate(timeout=30)
        self._machine = None
        for process in self._started:  # all ended; so that none waits for us as a zombie
            process.wait(30)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._started.clear()

    def cut(self) -> None:
        """Takes its link down: nothing comes or goes, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """Puts its link up again."""
        _ip("link", "set", self.link, "up")

    def popen(self, *command: str, **options: Any) -> Process:
        """Starts a command; options are those of `subprocess.Popen`."""
        self._started.append(Process([*self._entering(), *command], **({"text": True} | options)))
        return self._started[-1]

    def run(self, *command: str, timeout_s: float = 60, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Runs a command; options are those of `subprocess.run`."""
        defaults = {"capture_output": True, "text": True, "check": True, "timeout": timeout_s}
        return subprocess.run([*self._entering(), *command], **(defaults | options))

    def pids(self) -> dict[int, str]:
        """Its processes, as this machine numbers them, with their command lines; process 1 is left out."""
        if self._machine is None:
            return {}
        space = os.readlink(f"/proc/{self._init()}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if os.readlink(folder / "ns" / "pid") == space and int(folder.name) != self._init():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if command and command != "sleep 1000":  # zombies have none
                        found[int(folder.name)] = command
        return found

    def _entering(self) -> list[str]:
        return ["nsenter", f"--target={self._init()}", "--net", "--uts", "--pid", "--mount", f"--wdns={os.getcwd()}", "--"]

    def _init(self) -> int:
        assert self._machine is not None, f"{self.name} is off"
        return _children(self._machine.pid)[0]


class Hosts:
    """Hosts that are there within a `with` block; nothing of them stays.

    Args:
        num: How many; their addresses end in 1, 2, ...
        subnet: N of 10.N.0.0/24; None takes a free one, so that tests can run side by side.
        prefix: Of their names, at most 4 letters; None makes one of the subnet.
    """

    def __init__(self, num: int = 2, subnet: int | None = None, prefix: str | None = None) -> None:
        self._subnets = [subnet] if subnet is not None else random.sample(range(100, 250), 150)
        self._num, self._prefix = num, prefix
        self._stack = ExitStack()

    def __enter__(self) -> "Hosts":
        with ExitStack() as stack:
            self.subnet, self.prefix, self.bridge = self._claim(stack)
            self.gateway = f"10.{self.subnet}.0.{ROOT_ADDRESS}"
            _ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cromss-hosts-")))
            self._hosts = [
                Host(f"{self.prefix}n{i}", f"10.{self.subnet}.0.{i}", f"{self.prefix}v{i}", self.folder / "hosts")
                for i in range(1, self._num + 1)
            ]
            lines = ["127.0.0.1 localhost", f"{self.gateway} {socket.gethostname()}", *(f"{h.address} {h.name}" for h in self)]
            (self.folder / "hosts").write_text("\n".join(lines) + "\n")
            if not Path("/tmp/ray").exists():  # each host mounts its own there
                Path("/tmp/ray").mkdir()
                stack.callback(_remove_empty, Path("/tmp/ray"))
            for host in self:
                self._wire(host, stack)
                stack.callback(host.power_off)
                host.power_on()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def _claim(self, stack: ExitStack) -> tuple[int, str, str]:
        """Makes the bridge: the kernel lets one of two sessions have its name."""
        taken = _ip("-brief", "-4", "addr")
        for subnet in self._subnets:
            prefix = self._prefix or f"h{subnet}"
            with suppress(subprocess.CalledProcessError):
                if f" 10.{subnet}.0." not in taken:
                    _ip("link", "add", f"{prefix}br", "type", "bridge")
                    stack.callback(_ip, "link", "del", f"{prefix}br")
                    return subnet, prefix, f"{prefix}br"
        raise RuntimeError(f"No free subnet of 10.N.0.0/24 for hosts, N of {sorted(self._subnets)[:3]} ...")

    def _wire(self, host: Host, stack: ExitStack) -> None:
        _ip("netns", "add", host.name)
        stack.callback(_ip, "netns", "del", host.name)
        _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        stack.callback(_ip, "link", "del", host.link)  # with its namespace it would go, but later
        _ip("link", "set", host.link, "master", self.bridge)
        _ip("link", "set", host.link, "up")
        for command in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip("-n", host.name, *command.split())
        _ip("-n", host.name, "route", "add", "default", "via", self.gateway)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()

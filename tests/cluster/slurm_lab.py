"""A Slurm cluster on one machine, with `Hosts` as its nodes. Needs root and Debian's packages slurm-wlm and munge.

Nothing of a Slurm that the machine may have is touched: sockets, ports, keys and states are the lab's own.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from tests.cluster import hosts
from tests.cluster.hosts import Host, Hosts, Process

CPUS = 2  # of each node, as Slurm is told
CONF = """
ClusterName=cromss{subnet}
SlurmctldHost={machine}({gateway})
SlurmctldPort={port}
FirstJobId={subnet}001
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=15
KillWait=30
SchedulerParameters=sched_interval=5,bf_interval=5
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str | None:
    """Why there can be no Slurm here, None where there can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name, path=_PATH)]
    return hosts.lacking() or (f"Slurm needs {', '.join(missing)} (packages slurm-wlm and munge)" if missing else None)


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class SlurmLab:
    """Slurm on two nodes, for a `with` block.

    Args:
        subnet: As for `Hosts`.
        prefix: As for `Hosts`.
    """

    def __init__(self, subnet: int | None = None, prefix: str | None = None) -> None:
        self.hosts = Hosts(2, subnet, prefix)
        self._slurmd: dict[str, Process] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "SlurmLab":
        with ExitStack() as stack:
            stack.callback(self._reap)  # after the hosts have ended them
            stack.enter_context(self.hosts)
            self.folder = self.hosts.folder / "slurm"
            self.folder.mkdir(mode=0o755)
            os.chmod(self.hosts.folder, 0o755)  # munge's user must get through
            values = {"CPUs": CPUS, "Boards": 1, "SocketsPerBoard": 1, "CoresPerSocket": CPUS, "ThreadsPerCore": 1}
            shape = " ".join(f"{key}={value}" for key, value in values.items())
            nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address} {shape} RealMemory=8000" for host in self.hosts)
            subnet, gateway = self.hosts.subnet, self.hosts.gateway
            self.conf = self.folder / "slurm.conf"
            self.conf.write_text(
                CONF.format(
                    subnet=subnet,
                    gateway=gateway,
                    machine=socket.gethostname(),
                    port=16000 + subnet,
                    folder=self.folder,
                    nodes=nodes,
                )
            )
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=yes\n")
            self._start_munge(stack)
            self._start(stack, "slurmctld", "-D", "-f", str(self.conf))
            for host in self.hosts:
                self._boot(host)
            wait_for(lambda: self.nodes() == {host.name: "idle" for host in self.hosts}, 60, "idle nodes")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands."""
        return os.environ | {"SLURM_CONF": str(self.conf), "PATH": _PATH}

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=True)
        return done.stdout.strip()

    def nodes(self) -> dict[str, str]:
        """State of each node: `idle`, `mixed`, `down*`."""
        with suppress(subprocess.CalledProcessError):  # the controller is still starting
            return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        return {}

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def scratch_folders(self) -> set[Path]:
        """Those of its jobs, whose ids no other lab has."""
        return set(Path("/tmp").glob(f"cromss-{self.hosts.subnet}[0-9][0-9][0-9]-*"))

    def power_off(self, host: Host) -> None:
        """Ends a node at once."""
        host.power_off()
        self._slurmd.pop(host.name).wait(timeout=30)

    def power_on(self, host: Host) -> None:
        """Boots it again."""
        host.power_on()
        self._boot(host)

    def _reap(self) -> None:
        for process in self._slurmd.values():
            process.wait(timeout=30)
        self._slurmd.clear()

    def _boot(self, host: Host) -> None:
        log = (self.folder / f"slurmd-{host.name}.out").open("ab")
        with log:
            self._slurmd[host.name] = host.popen(
                "slurmd", "-D", "-N", host.name, "-f", str(self.conf), env=self.environment, stdout=log, stderr=log
            )

    def _start_munge(self, stack: ExitStack) -> None:
        folder = self.folder / "munge"
        folder.mkdir()
        (folder / "key").write_bytes(secrets.token_bytes(1024))
        (folder / "key").chmod(0o400)
        places = [f"--{name}={folder / name.removesuffix('-file')}" for name in ("key-file", "pid-file", "log-file", "seed-file")]
        self._start(stack, "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *places)
        wait_for(lambda: (folder / "socket").exists(), 20, "munge")

    def _start(self, stack: ExitStack, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)


def wait_for(there: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Returns when it is there.

    Raises:
        TimeoutError: it was not in the time.
    """
    deadline = time.monotonic() + timeout_s
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} not there after {timeout_s:.0f} s")
        time.sleep(0.5)

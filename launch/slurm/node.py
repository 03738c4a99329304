"""The program of a Slurm job on each of its nodes: `python -m launch.slurm.node FOLDER MEETING`, which `job.py` starts by srun.

Layer 5. It starts the node's part of a Ray cluster of the job's own; on the first node also the run's driver, whose end is the
end of all. Slurm signals every process of a step at once: those below this one never see it, so that Ray lives until the run
is saved.
"""

import fcntl
import os
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

import psutil

from cromss_dist.cluster import ClusterConfig, ipv4_of
from cromss_dist.errors import ClusterError, ConfigError, main_guard
from cromss_dist.train.safety.stop import holding_signals
from launch.session import write_token
from launch.slurm.job import HEAD_FILE, POLL_S, TOKEN, keep_asking, noticing_signals, read_cluster, read_end, write_end

ORPHANED_S = 60.0  # that a node waits for word of the driver after the cluster has ended: files of others come late over NFS
_RAY_ENDS_S = 30.0
_PAUSE_S = 10.0
_LOCK_FILE = "lock"


def main() -> int:
    """The command; returns the driver's exit code on the first node."""
    folder, meeting = Path(sys.argv[1]), Path(sys.argv[2])
    token = os.environ.pop(TOKEN)
    cluster = read_cluster(folder)
    is_head = os.environ["SLURM_PROCID"] == "0"
    with noticing_signals() as asked, scratch_folder() as scratch:
        token_file = scratch / "token"
        write_token(token_file, token)
        command = ray_command(cluster, meeting, scratch, head=is_head)
        if is_head:
            with running(command) as ray:
                return lead(folder, meeting, token_file, ray, asked)
        serve(meeting, command)
    if read_end(meeting) is None:
        end_job(requeue=cluster.slurm.requeue)
    return 0


def ray_command(cluster: ClusterConfig, meeting: Path, scratch: Path, *, head: bool) -> list[str]:
    """The command that runs this node's part of the Ray cluster.

    Raises:
        ConfigError: see `address_of`.
    """
    command = [sys.executable, "-m", "launch.node", f"--token-file={scratch / 'token'}", f"--temp-dir={scratch / 'ray'}"]
    command += [f"--cpus={os.environ['SLURM_CPUS_PER_TASK']}", f"--gpus={cluster.gpus_per_node}"]
    interface = cluster.slurm.interface
    if head:  # of srun, which runs on the first node, Slurm knows the address that all nodes reach
        address = address_of(interface) if interface else os.environ["SLURM_LAUNCH_NODE_IPADDR"]
        return [*command, "--head", f"--address={address}", f"--announce={meeting / HEAD_FILE}"]
    command += [f"--join-announced={meeting / HEAD_FILE}", f"--wait={cluster.wait_s}"]
    return [*command, f"--address={address_of(interface)}"] if interface else command


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this node.

    Raises:
        ConfigError: there is none.
    """
    if address := ipv4_of(interface):
        return address
    raise ConfigError(
        f"cluster.slurm.interface={interface!r} is no interface with an IPv4 address of {socket.gethostname()}, which has "
        f"{', '.join(sorted(psutil.net_if_addrs()))}; choose one of these, or null for that of the node's address."
    )


def lead(folder: Path, meeting: Path, token_file: Path, ray: "subprocess.Popen[bytes]", asked: Callable[[], bool]) -> int:
    """Runs the driver, once the cluster's head is there; returns its exit code, and leaves it for all nodes."""
    code = ClusterError.exit_code
    try:
        address = wait_for_head(meeting / HEAD_FILE, ray)
        environment = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
        with holding_signals():
            driver = subprocess.Popen([sys.executable, "-m", "launch.job", str(folder)], env=os.environ | environment)
        while (ended := driver.poll()) is None:
            keep_asking(folder.parent, asked())
            time.sleep(POLL_S)
        code = ended if ended >= 0 else 128 - ended
    finally:
        write_end(meeting, code, asked())
    return code


def wait_for_head(announced: Path, ray: "subprocess.Popen[bytes]") -> str:
    """HOST:PORT of this node's Ray.

    Raises:
        ClusterError: it does not start; it has said why.
    """
    while not announced.exists():
        if ray.poll() is not None:
            raise ClusterError(f"Ray did not start on {socket.gethostname()}, the job's first node; what it said stands above.")
        time.sleep(POLL_S)
    return announced.read_text().strip()


def serve(meeting: Path, command: list[str]) -> None:
    """Keeps this node's Ray in the cluster until the driver has ended, or its node is lost."""
    while True:
        with running(command) as ray:
            while ray.poll() is None and read_end(meeting) is None:
                time.sleep(2 * POLL_S)
        deadline = time.monotonic() + ORPHANED_S
        while not head_answers(meeting):
            if read_end(meeting) is not None or time.monotonic() > deadline:
                return
            time.sleep(2 * POLL_S)
        if read_end(meeting) is not None:
            return
        time.sleep(_PAUSE_S)  # only this node's Ray has died


def head_answers(meeting: Path) -> bool:
    """Whether the cluster's head can be reached."""
    try:
        host, _, port = (meeting / HEAD_FILE).read_text().strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def end_job(*, requeue: bool) -> None:
    """Ends the job on behalf of its first node, which is lost: without it nobody else does, and the nodes stay taken."""
    job = os.environ["SLURM_JOB_ID"]
    print(f"The first node of job {job} is lost; the job {'is queued again' if requeue else 'ends'}.", flush=True)
    subprocess.run(["scontrol", "requeue", job] if requeue else ["scancel", job], check=False)


@contextmanager
def running(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block."""
    with holding_signals():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # the others are held off
        try:
            process.wait(_RAY_ENDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder on this node for token, logs and sockets; it goes with the block.

    In /tmp whatever TMPDIR says: the paths of Ray's sockets must be short. Folders of jobs that were killed go, too.
    """
    for left in Path("/tmp").glob("cromss-[0-9]*-*"):
        with suppress(OSError):  # it goes just now, or is a link to nowhere that somebody else has left
            if left.lstat().st_uid != os.geteuid() or left.is_symlink() or _is_held(left):
                continue
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"cromss-{os.environ['SLURM_JOB_ID']}-", dir="/tmp"))  # mode 0700
    lock = os.open(folder / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(lock)


def _is_held(folder: Path) -> bool:
    """Whether a process still has a scratch folder, or it is none."""
    try:
        with (folder / _LOCK_FILE).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main_guard(main))

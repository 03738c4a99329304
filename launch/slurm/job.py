"""The program of a Slurm job on its first node: `python -m launch.slurm.job FOLDER`, which the job's script becomes.

Layer 5. It starts `node.py` on all nodes and waits. A run that the scheduler asked to stop, by a signal, has the job queued
again, and goes on there; one that its user asked to stop, by the file `stop`, has not.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cromss_dist.cluster import CLUSTER_FILE, ClusterConfig
from cromss_dist.errors import PreemptedError, main_guard
from cromss_dist.parse import parse_run
from cromss_dist.train.safety.stop import handling_signals, request_stop
from launch.slurm.submit import state_of

HEAD_FILE = "head"  # HOST:PORT of the Ray cluster, in the folder of a start
END_FILE = "end.json"  # how the driver ended, likewise
TOKEN = "CROMSS_CLUSTER_TOKEN"  # by environment: it is never in an argument or in a file that is shared
POLL_S = 0.5


def main() -> int:
    """The command; returns the exit code of the run's driver."""
    folder = Path(sys.argv[1])
    cluster = read_cluster(folder)
    job, start = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    meeting = folder / f"{job}-{start}"  # of the nodes: another one for each start, so that none meets the last one's
    meeting.mkdir(mode=0o700, exist_ok=True)
    environment = os.environ | {TOKEN: secrets.token_hex(32)}
    with noticing_signals() as asked:
        step = subprocess.Popen(srun_command(folder, meeting, os.environ), env=environment)
        while (code := step.poll()) is None:
            keep_asking(folder.parent, asked())
            time.sleep(POLL_S)
        end = read_end(meeting)
        if end is not None:
            code, told = end
        else:
            code, told = code if code > 0 else 128 - code or 1, False  # the node's program did not come to its end
        if code == PreemptedError.exit_code and (told or asked()) and cluster.slurm.requeue:
            queue_again(job)
    return code


def srun_command(folder: Path, meeting: Path, environment: "os._Environ[str] | dict[str, str]") -> list[str]:
    """The command that runs `node.py` once on each node of the job."""
    num_nodes = environment["SLURM_JOB_NUM_NODES"]
    return [
        *("srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1"),
        f"--cpus-per-task={environment['SLURM_CPUS_PER_TASK']}",  # a step does not inherit it
        *("--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mpi=none"),  # the loss of a node is the driver's to mend
        *(sys.executable, "-m", "launch.slurm.node", str(folder), str(meeting)),
    ]


def queue_again(job: str) -> None:
    """Has Slurm start the job again, unless it was cancelled or Slurm does that by itself."""
    state = state_of(job)
    if state is None or state.name != "RUNNING":
        return
    tried = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    done = f"Job {job} is queued again, and goes on." if tried.returncode == 0 else f"scontrol requeue: {tried.stderr.strip()}"
    print(done, flush=True)


@contextmanager
def noticing_signals() -> Iterator[Callable[[], bool]]:
    """Yields a question: whether SIGTERM or SIGUSR1 came, which end this process no more."""
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True

    with handling_signals(note):
        yield lambda: seen


def keep_asking(run_dir: Path, asked: bool) -> None:
    """Asks the run to save and to stop; again and again, since a run that just starts clears what stopped an earlier one."""
    if asked:
        request_stop(run_dir)


def write_end(meeting: Path, code: int, asked: bool) -> None:
    """Leaves how the driver ended: its exit code, and whether a signal had asked it to."""
    partial = meeting / f".{END_FILE}.tmp"
    partial.write_text(json.dumps({"code": code, "asked": asked}))
    partial.replace(meeting / END_FILE)


def read_end(meeting: Path) -> tuple[int, bool] | None:
    """How the driver ended, None where it did not yet."""
    try:
        end = json.loads((meeting / END_FILE).read_text())
    except FileNotFoundError:
        return None
    return int(end["code"]), bool(end["asked"])


def read_cluster(folder: Path) -> ClusterConfig:
    """The cluster's config in a job's folder."""
    return parse_run([f"--cluster={folder / CLUSTER_FILE}"], clusters=True).cluster


if __name__ == "__main__":
    sys.exit(main_guard(main))

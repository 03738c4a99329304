"""Jobs of a real Slurm on two nodes, which are namespaces of this machine: what ends them, and how they go on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cromss_dist.cluster import CLUSTER_FILE, ClusterConfig, SlurmConfig
from cromss_dist.config import LaunchConfig
from cromss_dist.errors import ClusterError
from cromss_dist.parse import to_yaml
from cromss_dist.tracking.run.spool import read_events
from launch.slurm.script import write_job
from launch.slurm.submit import submit
from tests.cluster.hosts import Host
from tests.cluster.slurm_lab import SlurmLab, lacking, wait_for
from tests.cluster.slurm_stub import JOB, NODE
from tests.launch.conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 480.0  # for anything: a loaded machine is slow


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmLab]:
    """Two idle nodes."""
    if why := lacking():
        pytest.skip(why)
    with SlurmLab() as lab:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, lab.environment[name])
        yield lab
        for folder in lab.scratch_folders():  # of nodes that lost power: the next job of a node takes them away
            shutil.rmtree(folder)


class StubJob:
    """A job of the real script and programs, with stubs for Ray and the driver."""

    def __init__(self, slurm: SlurmLab, run_dir: Path, cluster: ClusterConfig) -> None:
        self.slurm, self.run_dir = slurm, run_dir
        code = run_dir / "code"
        shutil.copytree(ROOT / "launch", code / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        (code / "cromss_dist").symlink_to(ROOT / "cromss_dist")
        (code / "tests").symlink_to(ROOT / "tests")
        (code / "launch" / "job.py").write_text(JOB)
        (code / "launch" / "node.py").write_text(NODE)
        self.script = write_job(run_dir, {CLUSTER_FILE: to_yaml(cluster).encode()}, cluster, LaunchConfig(), code)
        self.number = submit(self.script)

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    @property
    def output(self) -> str:
        return self.script.with_name(f"job-{self.number}.out").read_text()

    def wait_for_start(self, start: int) -> int:
        """Waits until the driver runs for the n-th time and all nodes of the job are there; returns their number."""
        began, meeting = self.run_dir / f"started-{start}", self.script.with_name(f"{self.number}-{start}")
        wait_for(lambda: began.exists() and began.read_text() != "", TIMEOUT_S, f"start {start}")
        num_nodes = int(began.read_text())
        wait_for(lambda: len(list(meeting.glob("joined-*"))) == num_nodes - 1, TIMEOUT_S, "the other nodes")
        return num_nodes

    def finish(self) -> None:
        """Lets the driver end, and waits for the end of the job."""
        (self.run_dir / "finish").touch()
        self.wait_for_end("COMPLETED")

    def wait_for_end(self, state: str) -> None:
        wait_for(lambda: self.state == state, TIMEOUT_S, f"{state}, now {self.state}: {self.output}")


MakeJob = Callable[..., StubJob]


@pytest.fixture
def make_job(slurm: SlurmLab, tmp_path: Path) -> MakeJob:
    """Sends a job for two nodes, in a folder whose name has a blank."""

    def make(min_nodes: int | None = None, **settings: object) -> StubJob:
        run_dir = tmp_path / "my run"
        run_dir.mkdir()
        config = ClusterConfig(kind="slurm", nodes=2, min_nodes=min_nodes, slurm=SlurmConfig(notice_s=30, **settings))  # type: ignore[arg-type]
        return StubJob(slurm, run_dir, config)

    return make


def nothing_is_left(slurm: SlurmLab) -> bool:
    """Whether nothing but Slurm's own daemon runs on a node, and no scratch folder is there."""
    running = [command for host in slurm.hosts for command in host.pids().values() if not command.startswith("slurmd ")]
    return not running and not slurm.scratch_folders()


@pytest.mark.parametrize(
    "how", [("--signal=USR1",), ("--signal=TERM",), ("--batch", "--signal=USR1"), ()], ids=["USR1", "TERM", "notice", "limit"]
)
def test_a_job_that_the_scheduler_stops_is_queued_again_and_goes_on(
    slurm: SlurmLab, make_job: MakeJob, how: tuple[str, ...]
) -> None:
    job = make_job(1, time=None if how else "1:00")
    assert job.wait_for_start(0) == 2
    if how:
        slurm.run("scancel", *how, job.number)
    assert job.wait_for_start(1) == 2
    assert "is queued again" in job.output
    job.finish()
    assert slurm.job(job.number)["ExitCode"] == "0:0"
    wait_for(lambda: nothing_is_left(slurm), TIMEOUT_S, "silence on the nodes")


def test_a_job_that_its_user_stops_is_not_queued_again(slurm: SlurmLab, make_job: MakeJob) -> None:
    job = make_job()
    job.wait_for_start(0)
    (job.run_dir / "stop").touch()
    job.wait_for_end("FAILED")
    assert slurm.job(job.number)["ExitCode"] == "75:0"
    wait_for(lambda: nothing_is_left(slurm), TIMEOUT_S, "silence on the nodes")


def test_a_job_that_is_cancelled_ends_and_the_next_one_clears_what_it_left(slurm: SlurmLab, make_job: MakeJob) -> None:
    job = make_job()
    job.wait_for_start(0)
    slurm.run("scancel", job.number)
    job.wait_for_end("CANCELLED")
    (job.run_dir / "started-0").unlink()
    job.number = submit(job.script)
    job.wait_for_start(0)
    job.finish()
    wait_for(lambda: nothing_is_left(slurm), TIMEOUT_S, "silence on the nodes")


def test_a_job_outlives_a_node_when_fewer_are_enough(slurm: SlurmLab, make_job: MakeJob) -> None:
    job = make_job(1)
    job.wait_for_start(0)
    slurm.power_off(slurm.hosts[1])
    wait_for(lambda: slurm.nodes()[slurm.hosts[1].name].startswith("down"), TIMEOUT_S, "the loss of the node")
    job.finish()
    assert slurm.job(job.number)["Restarts"] == "0"


@pytest.mark.parametrize(("lost", "min_nodes"), [(0, 1), (1, None)], ids=["the first of which one is enough", "one of all"])
def test_a_job_that_lost_a_node_which_it_needs_is_queued_again(
    slurm: SlurmLab, make_job: MakeJob, lost: int, min_nodes: int | None
) -> None:
    job = make_job(min_nodes)
    job.wait_for_start(0)
    host: Host = slurm.hosts[lost]
    slurm.power_off(host)
    wait_for(lambda: slurm.nodes()[host.name].startswith("down"), TIMEOUT_S, "the loss of the node")
    if min_nodes is None:
        slurm.power_on(host)
    assert job.wait_for_start(1) == (min_nodes or 2)
    job.finish()


def test_what_slurm_does_not_have_is_refused_in_its_words(slurm: SlurmLab, tmp_path: Path) -> None:
    cluster = ClusterConfig(kind="slurm", slurm=SlurmConfig(partition="nowhere"))
    with pytest.raises(ClusterError, match=r"refuses the job .*invalid partition specified: nowhere"):
        submit(write_job(tmp_path, {}, cluster, LaunchConfig(), tmp_path))


def test_a_run_trains_across_both_nodes_is_preempted_goes_on_and_ends(
    slurm: SlurmLab, synthetic_shards: Path, tmp_path: Path
) -> None:
    """Everything is real but the machines; all figures but the time come from events, whose steps have no gap and no double."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(to_yaml(ClusterConfig(kind="slurm", nodes=2, wait_s=TIMEOUT_S)))
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *SMALL, "--cluster", str(cluster), "--detach"]
    command += ["--output", str(tmp_path / "runs"), "--data.shards", str(synthetic_shards), "--tracking.register", "false"]
    command += ["--train.epochs", "240", "--train.validate_every_epochs", "1000", "--engine.global_batch", "4"]
    # Both nodes have the memory of this machine, whose other users must not have Ray kill ranks.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").glob("demo-*")
    (output,) = run_dir.glob("slurm-1/job-*.out")
    number = output.stem.removeprefix("job-")

    def steps() -> list[int]:
        return [event["step"] for event in read_events(run_dir) if event["event"] == "progress"]

    wait_for(lambda: len(steps()) > 5, TIMEOUT_S, "steps")
    slurm.run("scancel", "--signal=USR1", number)
    wait_for(lambda: slurm.job(number)["JobState"] == "COMPLETED", 2 * TIMEOUT_S, "the end of the run")
    assert slurm.job(number)["Restarts"] == "1", output.read_text()
    assert steps() == list(range(1, 601)), output.read_text()  # ten locations: 2.5 steps an epoch
    worlds = [event["text"] for event in read_events(run_dir) if event["event"] == "stage" and " x cpu" in event["text"]]
    assert [text.partition(" x ")[0] for text in worlds] == ["2", "2"]
    assert [event["event"] for event in read_events(run_dir)].count("resumed") == 1
    wait_for(lambda: nothing_is_left(slurm), TIMEOUT_S, "silence on the nodes")

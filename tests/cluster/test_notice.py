"""A run on machines that announce that they will be taken back, or that are too few: catalogue R6 and R7."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cromss_dist.errors import ClusterError
from cromss_dist.tracking.run.spool import read_events
from tests.cluster.conftest import Cluster, StartJob, wait_for
from tests.cluster.hosts import Host, Hosts
from tests.launch.conftest import ROOT, environment
from tests.whole_runs import Trace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NOTICE_S = 60
# As a cloud's agent or an autoscaler does it; Ray's own command is hidden and wants a node's id.
DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
address, host, seconds = sys.argv[1:]
gcs = GcsClient(address=address)
(node,) = [node for node, info in gcs.get_all_node_info().items() if info.node_manager_address == host and info.state == 0]
deadline_ms = int((time.time() + float(seconds)) * 1000)
accepted, why = gcs.drain_node(node.hex(), autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "for a test", deadline_ms)
assert accepted, why
"""


def announce_the_end_of(host: Host, cluster: Cluster) -> None:
    command = (sys.executable, "-c", DRAIN, cluster.address, host.address, str(NOTICE_S))
    done = cluster.hosts[0].run(*command, env=cluster.environment, timeout_s=120)
    assert done.returncode == 0, done.stderr


def test_a_host_that_will_be_taken_back_costs_no_step_and_is_no_failure(
    hosts: Hosts, cluster: Cluster, start_job: StartJob, undisturbed: Trace
) -> None:
    job = start_job(hosts[0], min_nodes=1)
    announced_s = time.monotonic()
    announce_the_end_of(hosts[1], cluster)
    wait_for("the run is saved", lambda: any(event["event"] == "stopping" for event in read_events(job.run_dir)), job.driver)
    print(f"saved {time.monotonic() - announced_s:.1f} s after the notice")
    assert time.monotonic() < announced_s + NOTICE_S
    job.wait_for_steps(1, attempt=1)
    job.finish()
    assert [attempt.world for attempt in job.attempts] == [2, 1]
    assert job.accounted().num_computed == len(undisturbed.losses), "no step was computed twice"
    told = [event["text"] for event in read_events(job.run_dir) if event["event"] == "stage"]
    assert not [text for text in told if "restarts that are left" in text]
    assert [text for text in told if text.startswith(f"{hosts[1].address} will be taken back. The run was asked to stop")]
    assert not list(job.run_dir.glob("failure-*"))


def test_a_cluster_without_room_ends_the_run_in_time_with_what_it_lacks(tmp_path: Path) -> None:
    token, head, run_dir = tmp_path / "token", tmp_path / "head", tmp_path / "run"
    run_dir.mkdir()
    command = [sys.executable, "-m", "launch.node", "--head", "--address", "127.0.0.1", "--cpus", "0"]
    command += ["--token-file", str(token), "--announce", str(head)]
    node = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        wait_for("the cluster", head.exists)
        ran = subprocess.run(
            [sys.executable, "-m", "tests.launch.stub", str(run_dir), "ok", head.read_text().strip(), "2"],
            cwd=ROOT,
            env=environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        node.terminate()
        node.communicate()
    assert ran.returncode == ClusterError.exit_code, ran.stderr
    assert "ClusterError: The cluster has had no room for the run for 2 s. It asks for 1 worker with 1 CPU each" in ran.stderr
    assert "there is room for 0: 127.0.0.1 0 CPUs, 0 GPUs free. Add machines" in ran.stderr
    assert "It goes on with: python launch/pretrain.py --resume" in ran.stderr

"""What becomes of a run on two hosts, each with one worker, when a part of them is lost: catalogue R1 to R5.

The hosts share the cores of this machine, so that nothing here says how fast it would go on real ones; the seconds that are
printed are upper bounds (`pytest -s`).
"""

import os
import signal
import time

import pytest

from cromss_dist.errors import ClusterError
from cromss_dist.tracking.run.spool import read_events
from cromss_dist.train.run.folder import read_summary
from tests.cluster.conftest import Cluster, Job, StartJob, wait_for
from tests.cluster.hosts import Host, Hosts
from tests.cluster.knock import listeners
from tests.whole_runs import Trace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ORPHANS_S = 30.0  # after which nothing of a lost driver is left
# Beside agents and empty workers, what Ray Train keeps on the head without a CPU: one coordinator for a cluster, and a cleaner
# that learns of its driver's end from a dashboard alone. They end with the cluster.
OF_THE_CLUSTER = ("ray::IDLE", "ray::Dashboard", "ray::RuntimeEnv", "ray::_AutoscalingCoord", "ray::PlacementGroupCleaner")


def kill_worker(host: Host) -> None:
    (rank,) = (pid for pid, command in host.pids().items() if "TrainWorker" in command)
    os.kill(rank, signal.SIGKILL)


def wait_for_silence(host: Host) -> None:
    wait_for(f"nothing runs on {host.name}", lambda: not host.pids())


def check_samples(job: Job, whole: Trace) -> Trace:
    """Each step was made once, of the samples that it is made of in the run that nothing happened to."""
    ours = job.accounted()
    assert sorted(ours.losses) == sorted(whole.losses)
    assert {step: sorted(ids) for step, ids in ours.ids.items()} == {step: sorted(ids) for step, ids in whole.ids.items()}
    summary = read_summary(job.run_dir)
    assert summary is not None
    assert summary.samples == sum(map(len, whole.ids.values()))
    return ours


def told(job: Job) -> list[str]:
    return [event["text"] for event in read_events(job.run_dir) if event["event"] == "stage"]


def test_a_lost_worker_and_a_lost_host_that_returns_do_not_show_in_the_losses(
    cluster: Cluster, start_job: StartJob, undisturbed: Trace
) -> None:
    first, second = cluster.hosts
    job = start_job(first, min_nodes=2)
    kill_worker(second)
    print(f"killed worker: {job.wait_for_steps(4, attempt=1):.1f} s to the fourth step after it")

    second.power_off()
    lost_s = time.monotonic()
    wait_for("the loss of the host is noticed", lambda: "restarts that are left" in told(job)[-1] and len(job.attempts) == 2)
    print(f"killed host: noticed after {time.monotonic() - lost_s:.1f} s")
    second.power_on()
    cluster.join(second)
    joined_s = time.monotonic()
    job.wait_for_steps(1, attempt=2)
    print(f"host returned: {time.monotonic() - joined_s:.1f} s to the next step")

    job.finish()
    assert [attempt.world for attempt in job.attempts] == [2, 2, 2]
    assert check_samples(job, undisturbed).losses == undisturbed.losses, "to the bit"


def test_a_run_goes_on_with_the_hosts_that_are_left_and_takes_in_one_that_joins(
    cluster: Cluster, start_job: StartJob, undisturbed: Trace
) -> None:
    first, second = cluster.hosts
    job = start_job(first, min_nodes=1)
    second.cut()  # nobody is told: neither Ray nor the collectives get as much as a reset
    print(f"cut host: {job.wait_for_steps(1, attempt=1):.1f} s to the next step on the other")
    second.power_off()
    second.mend()
    second.power_on()
    cluster.join(second)
    joined_s = time.monotonic()
    job.wait_for_steps(1, attempt=2)
    print(f"host joined: {time.monotonic() - joined_s:.1f} s to the next step on both")
    job.finish()

    assert [attempt.world for attempt in job.attempts] == [2, 1, 2]
    _, alone, both = job.attempts
    assert min(both.trace.losses) == max(alone.trace.losses) + 1, "what joins costs no step"
    assert any("there is room for 2 workers, 1 were running" in text for text in told(job))
    ours = check_samples(job, undisturbed)
    for step, loss in undisturbed.losses.items():
        near = 1e-3 if step <= min(alone.trace.losses) + 5 else 5e-2  # sums in another order drift apart
        assert ours.losses[step] == pytest.approx(loss, rel=near)


def test_when_the_head_dies_all_ends_and_the_same_command_goes_on(
    cluster: Cluster, start_job: StartJob, undisturbed: Trace
) -> None:
    first, second = cluster.hosts
    job = start_job(second, min_nodes=2)
    first.power_off()
    lost_s = time.monotonic()
    assert job.driver.wait(300) != 0
    print(f"head lost: the driver ended with {job.driver.returncode} after {time.monotonic() - lost_s:.1f} s")
    assert cluster.nodes[second.name].wait(300) == ClusterError.exit_code
    assert "ended by itself: its head is gone" in cluster.said_by(second)
    assert not second.pids(), "no orphans"

    first.power_on()
    cluster.start_head()
    cluster.join(second)
    job.start(second)
    job.finish()
    assert check_samples(job, undisturbed).losses == undisturbed.losses, "to the bit"


def test_nothing_of_a_killed_driver_is_left_and_the_same_command_goes_on(
    cluster: Cluster, start_job: StartJob, undisturbed: Trace
) -> None:
    first, second = cluster.hosts
    idle = {host.name: {listener.port for listener in listeners(host)} for host in cluster.hosts}
    job = start_job(second, min_nodes=2)
    for host in cluster.hosts:
        for listener in listeners(host):
            ours = "TrainWorker" in listener.process and listener.address != "*"
            assert not ours or listener.address == host.address, "ranks meet on the host's address alone"
    job.driver.kill()
    job.driver.wait(60)
    deadline = time.monotonic() + ORPHANS_S

    def left() -> list[str]:
        rays = [command for host in cluster.hosts for command in host.pids().values() if command.startswith("ray::")]
        return [command for command in rays if not command.startswith(OF_THE_CLUSTER)]

    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left()
    print(f"killed driver: its processes were gone after {ORPHANS_S - (deadline - time.monotonic()):.1f} s")

    job.start(first)  # wherever
    job.finish()
    assert check_samples(job, undisturbed).losses == undisturbed.losses, "to the bit"
    for host in cluster.hosts:
        now = {listener.port for listener in listeners(host) if not listener.process.startswith(OF_THE_CLUSTER)}
        assert now <= idle[host.name], "ports are free again"


def test_a_killed_node_leaves_nothing_running_and_starts_again_in_what_it_left(hosts: Hosts, cluster: Cluster) -> None:
    first, second = cluster.hosts
    for host in (second, first):
        cluster.nodes[host.name].kill()  # which cannot clean up
        wait_for_silence(host)
        assert not listeners(host)
        host.run("touch", "/dev/shm/plasmaAbCdEf")
    port = cluster.address.rpartition(":")[2]
    cluster.start_head("--port", port)
    assert cluster.address == f"{first.address}:{port}"
    cluster.join(second)

    taken = cluster.node(first, "--head", "--port", port, "--temp-dir", "/tmp/ray/other")
    assert taken.wait(120) == ClusterError.exit_code
    assert f"The port {port} of {first.address} is taken" in cluster.said_by(first)


def test_a_node_with_another_token_does_not_get_in(hosts: Hosts, cluster: Cluster) -> None:
    second = hosts[1]
    cluster.nodes[second.name].terminate()
    assert cluster.nodes[second.name].wait(60) == 0
    assert not second.pids()
    other = cluster.folder / "other"
    other.touch(0o600)
    other.write_text("0" * 64)
    intruder = cluster.node(second, "--join-announced", str(cluster.announced), "--token-file", str(other))
    assert intruder.wait(180) == ClusterError.exit_code
    assert cluster.said_by(second).count("Ray runs") == 1
    assert "did not start" in cluster.said_by(second)

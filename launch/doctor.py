"""Examines every machine of a cluster: `python launch/doctor.py --cluster configs/cluster/ray.yaml --config ...`.

Layer 5. Each machine does what `cromss doctor` does, and all of them together what shows only between machines.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cromss_dist.cluster import ClusterConfig
from cromss_dist.doctor.command import Request, parse_request, print_reports
from cromss_dist.doctor.examine import examine
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.node import MARK, Report, report_of
from cromss_dist.doctor.storage import nearest
from cromss_dist.errors import ClusterError, ConfigError, StorageError, main_guard
from launch.session import ROOT, cluster
from launch.slurm.script import resources

PROG = "python launch/doctor.py"
DESCRIPTION = """Examines every machine of a cluster for a run: each one as `cromss doctor` does, and together whether they share
the folder of runs with its locks, agree on the time, sum over each other, and run the same code. Takes what launch/pretrain.py
takes (--config FILE, --cluster FILE, --output DIR, dotted keys), and --json. Starts no run, and leaves nothing. Exits with 1 if
a check fails."""
TIMEOUT_S = 600.0  # of all checks; those that hang end before, each by itself
_SHOW_GPUS = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}  # to tasks that take none for themselves


def examine_cluster(request: Request) -> list[Report]:
    """The reports of all machines, the cluster's own first.

    Raises:
        ConfigError: machines of this kind are not reached from here.
        ClusterError: the cluster does not answer, or refuses.
    """
    config = request.parsed.cluster
    if config.kind == "here":
        return [Report("this machine", tuple(examine(request.subject)))]
    if config.kind == "kuberay":
        raise ConfigError(
            "cluster.kind='kuberay' has no machines before its job runs; examine one of its pods from within: "
            "kubectl exec POD -- cromss doctor --config FILE --cluster FILE."
        )
    output = Path(request.subject.config.output)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".cromss-doctor-", dir=nearest(output), ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError.of(error) from error
    with scratch as folder:
        return on_ray(request, folder) if config.kind == "ray" else on_slurm(request, folder)


def on_ray(request: Request, folder: str) -> list[Report]:
    """One task on each machine of a Ray cluster."""
    address = request.parsed.cluster.ray.address
    if "://" in address:
        raise ConfigError(
            f"cluster.ray.address={address} is a dashboard, which takes jobs alone; give HOST:PORT of the cluster's head, and "
            "the command on one of its machines."
        )
    with cluster(0, address, allow_insecure=request.parsed.allow_insecure):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = sorted((node for node in known if node["Alive"]), key=lambda node: str(node["NodeManagerAddress"]))
        task: Any = ray.remote(num_cpus=0, max_retries=0, runtime_env=_SHOW_GPUS)(report_of)
        subject = request.subject.to_dict()
        running = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                subject, folder, rank, len(nodes), node["NodeManagerAddress"]
            )
            for rank, node in enumerate(nodes)
        ]
        done = set(ray.wait(running, num_returns=len(running), timeout=TIMEOUT_S)[0])
        reports = []
        for node, answer in zip(nodes, running, strict=True):
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            try:
                reports.append(Report.from_dict(ray.get(answer)) if answer in done else _silent(name, "no answer in the time"))
            except ray.exceptions.RayError as error:
                reports.append(_silent(name, str(error).strip().splitlines()[-1]))
    return [_attendance(request.parsed.cluster, len(nodes)), *reports]


def on_slurm(request: Request, folder: str) -> list[Report]:
    """One task on each machine of a Slurm step."""
    config = request.parsed.cluster
    summons = {"subject": request.subject.to_dict(), "folder": folder, "interface": config.slurm.interface}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            srun_command(config, request.subject.workers * request.subject.config.launch.cpus_per_worker),
            input=json.dumps(summons),
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=config.wait_s + TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError("There is no srun here; give the command on a machine of the Slurm cluster.") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"srun had not ended after {error.timeout:.0f} s; see squeue, and ask for fewer nodes.") from error
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    reports = [Report.from_dict(json.loads(line)) for line in lines]
    words = " | ".join(line.strip() for line in done.stderr.splitlines()[-3:])
    if not reports:
        raise ClusterError(
            f"Slurm ran nothing (exit {done.returncode}): {words or 'without a word'}. See sinfo and cluster.slurm."
        )
    lost = [_silent(f"{config.nodes - len(reports)} of {config.nodes} machines", words)] if len(reports) < config.nodes else []
    return [_attendance(config, len(reports)), *sorted(reports, key=lambda report: report.node), *lost]


def srun_command(config: ClusterConfig, cpus: int) -> list[str]:
    """The step: one task on each machine, with what a run would take there."""
    command = ["srun", f"--nodes={config.nodes}", f"--ntasks={config.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    command += ["--job-name=cromss-doctor", "--time=20", f"--immediate={max(1, int(config.wait_s))}", "--kill-on-bad-exit=0"]
    command += [f"--{name}={value}" for name, value in resources(config).items()]
    return [*command, sys.executable, "-m", "cromss_dist.doctor.node"]


def _attendance(config: ClusterConfig, num: int) -> Report:
    """Whether enough machines are there."""
    told = f"{num} of {config.nodes}"
    if num >= config.nodes:
        return Report("cluster", (Finding("machines", "ok", told),))
    fix = "See which did not start, or lower cluster.nodes or cluster.min_nodes."
    enough = config.min_nodes is not None and num >= config.min_nodes
    return Report("cluster", (Finding("machines", "warn" if enough else "fail", told, fix),))


def _silent(node: str, why: str) -> Report:
    fix = "See that this code, and the same Python, are on that machine under the same path, and that it is up."
    return Report(node, (Finding("report", "fail", why, fix),))


def main() -> int:
    """The command."""
    request = parse_request(sys.argv[1:], PROG, DESCRIPTION)
    return print_reports(examine_cluster(request), request.as_json)


if __name__ == "__main__":
    sys.exit(main_guard(main))

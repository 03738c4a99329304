"""The script of a run's Slurm job.

Layer 5. What `sbatch` is asked for stands in its `#SBATCH` lines, where a cluster's people look for it and change it; what the
job does is `job.py`.
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import LaunchConfig
from cromss_dist.data.staging import replacing
from cromss_dist.errors import ConfigError
from cromss_dist.train.safety.failure import first_free

SCRIPT_FILE = "job.sh"
OUTPUT_FILE = "job-{job}.out"  # of the job, beside its script
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def write_job(run_dir: Path, files: Mapping[str, bytes], cluster: ClusterConfig, launch: LaunchConfig, code: Path) -> Path:
    """Makes the folder `slurm-<n>` of a job in a run's folder: what the job reads, and its script.

    Args:
        run_dir: Seen at this place by all nodes.
        files: Those of `launch.job.Job.files`, which each start of the job reads.
        cluster: Of kind slurm.
        launch: Of the run.
        code: Folder of the code that the job runs.

    Returns:
        The script, for `sbatch`.

    Raises:
        ConfigError: see `job_script`.
    """
    folder = first_free(run_dir / "slurm")
    script = job_script(cluster, launch, run_dir.name, folder, code)
    with replacing(folder) as fresh:
        for name, content in {**files, SCRIPT_FILE: script.encode()}.items():
            (fresh / name).write_bytes(content)
    return folder / SCRIPT_FILE


def job_script(
    cluster: ClusterConfig, launch: LaunchConfig, name: str, folder: Path, code: Path, python: str = sys.executable
) -> str:
    """The script of a job.

    Args:
        cluster: Of kind slurm.
        launch: Of the run: its workers and their CPUs.
        name: Of the job. No two of the same name and user run at a time, so it should be that of the run's folder.
        folder: Of the job's files.
        code: Folder with the packages.
        python: Interpreter, on the nodes.

    Raises:
        ConfigError: the time limit leaves no time before its notice, more workers are asked for than there are, or a path has
            signs that Slurm would take for its own.
    """
    slurm = cluster.slurm
    if not re.fullmatch(r"""[^\x00-\x1f\x7f"'\\%#]+""", str(folder)):
        raise ConfigError(
            f"The run folder {folder.parent!s} has quotes, '%', '#', backslashes or control characters, which Slurm reads as its "
            "own in the name of the job's output; set output to another folder."
        )
    limit_s = seconds_of(slurm.time)
    if limit_s is not None and limit_s <= slurm.notice_s:
        raise ConfigError(
            f"cluster.slurm.time={slurm.time!r}, {limit_s:.0f} s, is not longer than cluster.slurm.notice_s={slurm.notice_s}, "
            "the seconds before its end at which the run saves itself: it would train nothing; set time higher or notice_s lower."
        )
    least, most = nodes_of(cluster, launch)
    options = {
        "job-name": re.sub(r"[^A-Za-z0-9._-]+", "-", name),
        "dependency": "singleton",  # the run's folder is for one job at a time
        # No number of tasks: Slurm would give no more nodes than the least of them need.
        "nodes": f"{least}-{most}" if least < most else str(most),
        "cpus-per-task": str(cluster.workers_on_each_node() * launch.cpus_per_worker),
        **resources(cluster),
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.notice_s}",
        "open-mode": "append",  # a job that is queued again goes on in its output
        "output": f'"{folder / OUTPUT_FILE.format(job="%j")}"',
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue")
    if least < most:
        lines.append("#SBATCH --no-kill")  # the job outlives the loss of a node
    place = shlex.quote(str(code))
    return "\n".join(
        [
            "#!/bin/bash",
            "# The job of a CromSS pretraining. Each start of it goes on from the run's newest checkpoint.",
            *lines,
            "set -eu",
            f"cd {place}",
            f"export PYTHONPATH={place}${{PYTHONPATH:+:${{PYTHONPATH}}}}",
            f"exec {shlex.quote(python)} -m launch.slurm.job {shlex.quote(str(folder))}",
            "",
        ]
    )


def resources(cluster: ClusterConfig) -> dict[str, str]:
    """Options that say which nodes a job or a step takes, and what of each, beside CPUs; those that are null are left out."""
    slurm = cluster.slurm
    gres = ":".join(["gpu", *([slurm.gpu_type] if slurm.gpu_type else []), str(cluster.gpus_per_node)])
    options = {
        "gres": gres if cluster.gpus_per_node else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "mem": slurm.memory,
    }
    return {name: value for name, value in options.items() if value is not None}


def nodes_of(cluster: ClusterConfig, launch: LaunchConfig) -> tuple[int, int]:
    """Nodes that are enough, and those that the run makes use of.

    Raises:
        ConfigError: more workers are asked for than the nodes have.
    """
    crew, each = cluster.crew(launch), cluster.workers_on_each_node()
    most = math.ceil(crew.most / each)
    return min(cluster.min_nodes or math.ceil(crew.least / each), most), most


def seconds_of(time: str | None) -> float | None:
    """Seconds of a time limit as Slurm has it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if time is None:
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        units: tuple[int, ...] = (_HOUR_S, _MINUTE_S, 1)
    else:
        units = {1: (_MINUTE_S,), 2: (_MINUTE_S, 1), 3: (_HOUR_S, _MINUTE_S, 1)}[len(parts)]
    return float(int(days or 0) * _DAY_S + sum(part * unit for part, unit in zip(parts, units, strict=False)))

"""Sends a job to Slurm, and follows it.

Layer 5.
"""

import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cromss_dist import errors
from cromss_dist.errors import ClusterError, CromssError
from cromss_dist.train.run.folder import read_summary
from cromss_dist.train.run.watch import watching
from launch.slurm.script import OUTPUT_FILE

_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
_POLL_S = 2.0
_PATIENCE_S = 600.0  # with a controller that does not answer


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Args:
        name: `PENDING`, `RUNNING`, ..., `COMPLETED`.
        reason: Why it is in this state; `None` where there is nothing to say.
        exit_code: Of its script.
    """

    name: str
    reason: str
    exit_code: int


def submit(script: Path) -> str:
    """Sends a job; returns its id.

    Raises:
        ClusterError: there is no `sbatch` here, or Slurm refuses the job; with its words.
    """
    told = _slurm("sbatch", "--parsable", str(script), cwd=script.parent)
    if told.returncode:
        raise ClusterError(
            f"Slurm refuses the job {script}: {_words(told.stderr)} Change cluster.slurm.*, cluster.nodes, "
            "cluster.gpus_per_node or launch.cpus_per_worker to what `sinfo` says is there."
        )
    return told.stdout.strip().partition(";")[0]  # a federation adds the cluster's name


def state_of(job: str) -> JobState | None:
    """What Slurm says of a job, None where it knows of none (any more).

    Raises:
        ClusterError: Slurm does not answer.
    """
    told = _slurm("scontrol", "--oneliner", "show", "job", job)
    if told.returncode:
        if "Invalid job id" in told.stderr:
            return None
        raise ClusterError(f"Slurm does not say how job {job} is: {_words(told.stderr)} Look with: squeue --job {job}")
    fields = dict(re.findall(r"(JobState|Reason|ExitCode)=(\S+)", told.stdout))
    return JobState(fields["JobState"], fields["Reason"], int(fields["ExitCode"].partition(":")[0]))


def follow(job: str, script: Path, console: Console) -> None:
    """Shows a job's states and its run's progress until the job has ended. Ctrl-C leaves the job, and says how to go on with it.

    Args:
        job: Its id.
        script: As it was sent.
        console: Where progress goes.

    Raises:
        CromssError: the run's own error, with its exit code.
        ClusterError: Slurm ended the job, or does not answer for ten minutes.
    """
    run_dir, output = script.parents[1], script.with_name(OUTPUT_FILE.format(job=job))
    try:
        with watching(run_dir, console):
            state = _wait_for_end(job, console)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{describe(job, script)} The job goes on without this command.")
        raise
    if state is None and read_summary(run_dir) is None:
        raise ClusterError(f"Slurm knows job {job} no more, and its run has not finished; its last words are in {output}.")
    if state is not None and (state.name != "COMPLETED" or state.exit_code):
        raise _error_of(job, state, output)


def describe(job: str, script: Path) -> str:
    """What can be done with a job, as commands."""
    output = shlex.quote(str(script.with_name(OUTPUT_FILE.format(job=job))))
    stop = shlex.quote(str(script.parents[1] / "stop"))
    return (
        f"Look: squeue --job {job}; follow: tail -F {output}; save and end: touch {stop}; save and queue again: scancel "
        f"--batch --signal=USR1 {job}; end at once: scancel {job}."
    )


def _wait_for_end(job: str, console: Console) -> JobState | None:
    """The last state of a job, None where Slurm forgot it."""
    shown, answered_s = "", time.monotonic()
    while True:
        try:
            state = state_of(job)
            answered_s = time.monotonic()
        except ClusterError:
            if time.monotonic() > answered_s + _PATIENCE_S:
                raise
        else:
            if state is None or state.name in _ENDED:
                return state
            text = f"job {job} is {state.name.lower()}" + (f" ({state.reason})" if state.reason != "None" else "")
            if text != shown:
                console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
                shown = text
        time.sleep(_POLL_S)


def _error_of(job: str, state: JobState, output: Path) -> CromssError:
    """The error that a job's driver ended with, from the last line of its output that names one; else what Slurm says."""
    text = output.read_text(errors="replace") if output.is_file() else ""
    for name, message in reversed(re.findall(r"^([A-Z]\w*Error): (.*)$", text, re.MULTILINE)):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, CromssError) and kind.exit_code == state.exit_code:
            return kind(message)
    reason = "" if state.reason == "None" else f" ({state.reason})"
    return ClusterError(
        f"Slurm ended job {job}: {state.name}{reason}, exit code {state.exit_code}; its output is {output}. The run goes on from "
        "its newest checkpoint when the job is sent again."
    )


def _slurm(*command: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs a command of Slurm.

    Raises:
        ClusterError: it is not there, or does not answer.
    """
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError as error:
        raise ClusterError(
            f"There is no `{command[0]}` on this machine; run this where Slurm's commands are, on a login node of the cluster, "
            "or choose another cluster.kind than slurm."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"Slurm has not answered `{command[0]}` for {error.timeout:.0f} s; try again, or ask who runs it."
        ) from error


def _words(text: str) -> str:
    """Slurm's message as one sentence."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in text.strip().splitlines()]
    return "; ".join(line for line in lines if line).rstrip(".") + "."

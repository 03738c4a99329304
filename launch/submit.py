"""Sends a run as a job to the dashboard of a Ray cluster, and follows it.

Layer 5.
"""

import asyncio
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cromss_dist.cluster import has_private_token, token_path
from cromss_dist.config import RunConfig
from cromss_dist.errors import ClusterError, PreemptedError
from cromss_dist.parse import ParsedRun
from launch.job import Job
from launch.probe import check_closed
from launch.snapshot import Snapshot

ENTRYPOINT = "python -m launch.job"  # of every job: nothing of a config may reach the shell that runs it
STOP_WAIT_S = 600  # from the job's SIGTERM to its SIGKILL; Ray gives 3 s, in which no run is saved
OUT_OF_REACH_S = 300.0  # of the dashboard, after which a job is not followed any more
_RETRY_S = 2.0


def submit(run: ParsedRun[RunConfig], job: Job) -> Any:
    """Sends code, config and what the job is told; the cluster starts it.

    Returns:
        Ray's client of the cluster, for `follow`.

    Raises:
        ClusterError: the cluster lets anyone in, is out of reach or refuses the job, or there is no token for it.
    """
    url = run.cluster.ray.address.rstrip("/")
    headers = {}
    check_closed(url, run.allow_insecure)
    if not run.allow_insecure:
        headers = {"Authorization": f"Bearer {read_token()}"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray would send the job, and the token, there
    from ray.dashboard.modules import dashboard_sdk
    from ray.dashboard.modules.job import sdk

    for module in (dashboard_sdk, sdk):
        module.logger.setLevel("WARNING")
    with tempfile.TemporaryDirectory(prefix="cromss-job-") as folder:  # mode 0700
        package = Path(folder) / f"{job.name}.zip"
        package.write_bytes(Snapshot.take().zipped(job.files(run)))
        try:
            client = sdk.JobSubmissionClient(url, headers=headers)
            client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=job.name,
                runtime_env={"working_dir": str(package), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
            )
        except (OSError, RuntimeError, ValueError) as error:  # requests' are OSErrors, and no fault of a disk
            raise ClusterError(
                f"The Ray cluster at {url} takes no job: {' '.join(str(error).split())} Check that {token_path()} holds its "
                "token, and that it has the same version of Ray as this machine."
            ) from error
    return client


def read_token() -> str:
    """The token of the cluster, from the file where Ray looks for it.

    Raises:
        ClusterError: there is none, or others can read it.
    """
    path = token_path()
    if not has_private_token():
        raise ClusterError(
            f"A job is sent only with a token in a file that nobody else can read: put that of the cluster into {path}, or "
            f"say with RAY_AUTH_TOKEN_PATH where it is, and: chmod 600 {shlex.quote(str(path))}"
        )
    return path.read_text().strip()


def follow(client: Any, job: Job) -> None:
    """Prints what the job prints until it ends.

    Raises:
        SystemExit: the run ended with an error, which it printed; the code is the run's.
        PreemptedError: the job was stopped.
        ClusterError: the job ended without a word, or its cluster is out of reach.
    """
    status = asyncio.run(_print_logs(client, job.name))
    if status == "STOPPED":
        raise PreemptedError(f"The job {job.name} was stopped; its last lines say whether it was saved before.")
    if status == "FAILED":
        details = client.get_job_info(job.name)
        if details.driver_exit_code:
            raise SystemExit(details.driver_exit_code)
        raise ClusterError(f"The job {job.name} was lost: {' '.join((details.message or 'Ray gives no reason.').split())}")


async def _print_logs(client: Any, name: str) -> str:
    """Follows the log, over broken connections, too; returns the status that the job ended with."""
    from aiohttp import ClientError

    printed, reached_s = 0, time.monotonic()
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(name):  # each time from its start
                new = text[max(0, printed - position) :]
                position += len(text)
                printed = max(printed, position)
                sys.stdout.write(new)
                sys.stdout.flush()
            status = client.get_job_status(name)
            if status.is_terminal():
                return str(status.value)
            reached_s = time.monotonic()
        except (OSError, RuntimeError, ClientError) as error:
            if time.monotonic() > reached_s + OUT_OF_REACH_S:
                raise ClusterError(
                    f"The dashboard that the job {name} was sent to has been out of reach for {OUT_OF_REACH_S:.0f} s "
                    f"({error}); the job may go on."
                ) from error
        await asyncio.sleep(_RETRY_S)


def describe(run: ParsedRun[RunConfig], job: Job) -> str:
    """What `--dry-run` prints: the job as it would be sent."""
    code = Snapshot.take()
    files = job.files(run)
    return "\n".join(
        [
            f"job                 {job.name}, to {run.cluster.ray.address}",
            f"entrypoint          {ENTRYPOINT}",
            f"run folder          {job.run_dir}, as the cluster sees it",
            f"working_dir         {len(code.zipped(files)) / 2**10:.0f} KiB: {len(code.files)} files of {code.revision}, sha256 "
            f"{code.sha256[:12]}, {', '.join(files)}",
        ]
    )


def tell_commands(run: ParsedRun[RunConfig], job: Job, console: Console) -> None:
    """Prints how to follow, stop and go on with the job."""
    place = f"--address {shlex.quote(run.cluster.ray.address)}"
    lines = {
        "follow": f"RAY_AUTH_MODE=token ray job logs {place} --follow {job.name}",
        "stop": f"RAY_AUTH_MODE=token ray job stop {place} --no-wait {job.name}  # it saves itself",
        "go on": f"{job.command} --resume {shlex.quote(job.run_dir)}",
    }
    console.print(f"  job {job.name}, run folder {job.run_dir}", highlight=False, soft_wrap=True)
    for what, command in lines.items():
        console.print(f"  {what:<7} {command}", highlight=False, markup=False, soft_wrap=True)

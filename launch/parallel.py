"""Many jobs on Ray: the cores of this machine, or a cluster of machines that see the same folders.

Layer 5. Ray's processes unpickle references to this module, so it imports nothing heavy.
"""

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cromss_dist.errors import ConfigError, WorkerError

if TYPE_CHECKING:  # heavy, and Ray's processes need none of it
    from cromss_dist.data.conversion.convert import Runner

MAX_RETRIES = 2  # of a job whose process died
JOBS_PER_WORKER = 2  # in flight, so that no worker waits for the driver

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")


def ray_runner(workers: int, address: str | None = None) -> "Runner":
    """A runner on Ray: the function must be importable, and what the jobs share travels once.

    Args:
        workers: Jobs at a time.
        address: Of a running cluster, such as `10.0.0.1:6379`, whose machines have this code and see the same files; None:
            a private one on this machine, which ends with the run.

    Raises (when it runs):
        ConfigError: the cluster is to be joined without a token, or is not there, or has another one.
        WorkerError: the process of a job died three times.
    """

    def run(function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]) -> Generator[Result, None, None]:
        with cluster(workers, address) as logs:
            import ray

            task: Any = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_attempt)
            stored = ray.put(shared)
            waiting = list(reversed(jobs))
            running: dict[Any, Job] = {}
            while waiting or running:
                while waiting and len(running) < JOBS_PER_WORKER * workers:
                    job = waiting.pop()
                    running[task.remote(function, stored, job)] = job
                (done,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done)
                try:
                    result, error = ray.get(done)
                except ray.exceptions.RayError as died:
                    raise WorkerError(
                        f"The process that worked on part {job} died {MAX_RETRIES + 1} times: "
                        f"{str(died).strip().splitlines()[0]} Often memory ran out: take fewer workers or smaller shards. Ray's "
                        f"logs are in {logs}."
                    ) from died
                if error is not None:
                    raise error
                yield result

    return run


def _attempt(function: Callable[[Shared, Job], Result], shared: Shared, job: Job) -> tuple[Result | None, Exception | None]:
    """A job in a worker; errors travel as values, so that they arrive as what they are and without Ray's traceback."""
    try:
        return function(shared, job), None
    except Exception as error:  # noqa: BLE001 - raised again by the driver
        return None, error


@cache
def _new_token() -> str:
    """One for all clusters that this process starts: Ray reads the file once and keeps what it read."""
    return secrets.token_hex(32)


@contextmanager
def cluster(num_cpus: int, address: str | None = None, setup_hook: Callable[[], None] | None = None) -> Iterator[str]:
    """A Ray cluster: of this machine, needing a token, listening on loopback and ending with the block; or one to join.

    Args:
        num_cpus: Of the cluster that is started.
        address: Of the cluster that is joined; None: starts one.
        setup_hook: Called in each of Ray's processes before anything else.

    Yields:
        The folder of its logs.
    """
    with tempfile.TemporaryDirectory(prefix="cromss-ray-") as private:  # mode 0700
        if address is None:
            token = Path(private) / "token"
            with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(_new_token())
            os.environ |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # off: Ray takes the loopback address as its node's
            }
        else:
            check_joinable(address)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray  # Ray reads these when it is imported, so the import comes after

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if setup_hook:
            options["runtime_env"] = {"worker_process_setup_hook": setup_hook}
        if address is None:
            options |= {"num_cpus": num_cpus, "include_dashboard": False}
        try:
            try:
                context: Any = ray.init(address=address or "local", **options)
            except ConnectionError as error:  # an OSError, and no fault of the disk
                raise ConfigError(
                    f"No Ray cluster lets us in at {address} ({error}). Check that it runs, that the address is "
                    f"right, and that its token is the one in {token_path()}."
                ) from error
            yield str(Path(context["session_dir"]) / "logs")
        finally:
            ray.shutdown()


def token_path() -> Path:
    """The file in which Ray looks for the token of a cluster."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()


def check_joinable(address: str) -> None:
    """Raises ConfigError unless there is a token that only this user can read, and something answers at `address`."""
    path = token_path()
    if os.environ.get("RAY_AUTH_MODE") != "token" or not path.is_file() or path.stat().st_mode & 0o077:
        raise ConfigError(
            "A Ray cluster is joined only with a token, since whoever reaches it without one can run code on it: start it with "
            f"RAY_AUTH_MODE=token, set that here too, and give its token in a file that only you can read (chmod 600 {path})."
        )
    host, _, port = address.rpartition(":")
    try:  # Ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"Nobody answers at {address} ({error}). Give the address of a running Ray cluster, HOST:PORT, such as 10.0.0.1:6379."
        ) from error

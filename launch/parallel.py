"""Many jobs on Ray: the cores of this machine, or a cluster of machines that see the same folders.

Layer 5. Ray's processes unpickle references to this module, so it imports nothing heavy.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cromss_dist.errors import WorkerError
from launch.session import cluster

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
        ClusterError: the cluster is to be joined without a token, or is not there, or has another one.
        WorkerError: the process of a job died three times.
    """

    def run(function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]) -> Generator[Result, None, None]:
        with cluster(workers, address) as logs:
            for job, result, error in outcomes(function, shared, jobs, JOBS_PER_WORKER * workers):
                if isinstance(error, DiedError):
                    raise WorkerError(
                        f"The process that worked on part {job} {error} Often memory ran out: take fewer workers or smaller "
                        f"shards. Ray's logs are in {logs}."
                    ) from error
                if error is not None:
                    raise error
                yield cast(Result, result)

    return run


class DiedError(Exception):
    """The process of a job died again and again; the message goes on after 'The process'."""


def outcomes(
    function: Callable[[Shared, Job], Result], shared: Shared, jobs: Iterable[Job], at_once: int, **options: Any
) -> Generator[tuple[Job, Result | None, Exception | None], None, None]:
    """Runs jobs on the Ray that this process is connected to, and gives each as it ends: the job, its result or its error.

    Args:
        function: Of what is shared and a job; importable.
        shared: Travels once.
        jobs: In the order in which they are begun; the next one is asked for when there is room for it.
        at_once: Jobs that are given to Ray; those for which there is no room wait there.
        options: Of Ray's tasks, such as `num_gpus`.
    """
    import ray

    task: Any = ray.remote(**{"num_cpus": 1, "max_retries": MAX_RETRIES} | options)(_attempt)
    stored = ray.put(shared)
    waiting = iter(jobs)
    running: dict[Any, Job] = {}
    while True:
        for job in islice(waiting, at_once - len(running)):
            running[task.remote(function, stored, job)] = job
        if not running:
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(done)
        try:
            result, error = ray.get(done)
        except ray.exceptions.RayError as died:
            result, error = None, DiedError(f"died {MAX_RETRIES + 1} times: {str(died).strip().splitlines()[0]}")
        yield job, result, error


def _attempt(function: Callable[[Shared, Job], Result], shared: Shared, job: Job) -> tuple[Result | None, Exception | None]:
    """A job in a worker; errors travel as values, so that they arrive as what they are and without Ray's traceback."""
    try:
        return function(shared, job), None
    except Exception as error:  # noqa: BLE001 - raised again by the driver
        return None, error

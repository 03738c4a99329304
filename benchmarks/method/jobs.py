"""Runs jobs in other processes, and keeps what each returns, so that what was cut goes on."""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import WorkerError
from cromss_dist.noise.processes import end_with_parent

Json = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Args:
        name: Its place in the work folder, without suffix: results/<name>.json, logs/<name>.log.
        function: Top-level, called in another process with `arguments` and a console for what it tells; returns JSON.
        arguments: What it works on.
    """

    name: str
    function: Callable[..., Json]
    arguments: tuple[Any, ...]


def result_of(work: Path, name: str) -> Json:
    """What a job has returned, with `seconds`, that it took."""
    told: Json = json.loads(_result_file(work, name).read_text())
    return told


def run_jobs(work: Path, jobs: Sequence[Job], processes: int, tell: Callable[[str], None]) -> None:
    """Runs the jobs that have no result yet, in their order.

    Args:
        work: Folder of results and logs.
        jobs: None needs another's result.
        processes: Of them at a time.
        tell: Gets a line for each that ends.

    Raises:
        CromssError, OSError: of the first that fails; those that run are waited for, no other is begun.
        WorkerError: a process died.
    """
    missing = [job for job in jobs if not _result_file(work, job.name).exists()]
    started, ended = time.monotonic(), 0
    # spawn: no threads or locks of this process. Ctrl-C reaches the workers too: runs save themselves and stop.
    with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent) as pool:
        running: dict[Future[Json], str] = {}
        waiting = iter(missing)
        while True:
            # No more are handed over than run: the others are not begun once one fails.
            while len(running) < processes and (job := next(waiting, None)) is not None:
                running[pool.submit(_run, work, job)] = job.name
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    told = future.result()
                except BrokenProcessPool as error:
                    raise WorkerError(
                        f"A process died while {' and '.join(running.values())} ran, most likely for lack of memory. The same "
                        f"command goes on from there, with --processes 1 in half the memory; logs are in {work / 'logs'}."
                    ) from error
                name = running.pop(future)
                ended += 1
                left_min = (time.monotonic() - started) / ended * (len(missing) - ended) / 60
                number = ended + len(jobs) - len(missing)
                tell(f"{number} of {len(jobs)}: {name}, {told['seconds']:.0f} s; about {left_min:.0f} min left of this stage")


def _result_file(work: Path, name: str) -> Path:
    return work / "results" / f"{name}.json"


def _log_file(work: Path, name: str) -> Path:
    return work / "logs" / f"{name}.log"


def _run(work: Path, job: Job) -> Json:
    log, result = _log_file(work, job.name), _result_file(work, job.name)
    for path in (log, result):
        path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a") as file:
        try:
            told = job.function(*job.arguments, Console(file=file, width=130))
        except BaseException as error:
            error.add_note(f"Log: {os.path.relpath(log)}")
            raise
    told["seconds"] = round(time.monotonic() - started, 1)
    write_atomically(result, (json.dumps(told, indent=1) + "\n").encode())
    return told

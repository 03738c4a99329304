"""Real processes that run a test's program as the ranks of one gloo group on this machine.

def program(world: World, folder: Path, steps: int) -> None: ...  # of a test module, not nested

assert run_ranks(program, 2, tmp_path, 3) == [0, 0]

with Ranks(program, 2, tmp_path, 3) as ranks:
    ranks.kill(1, signal.SIGKILL)
    assert ranks.wait() == [1, -signal.SIGKILL]
"""

import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from cromss_dist.errors import CromssError
from cromss_dist.world import join
from tests.forkserver import FORKSERVER, preload

OWN_FOLDER = ".rendezvous"
preload("pytest", "tests.ranks_preload", "tests.ranks")

Program = Callable[..., None]
"""`program(world: World, folder: Path, *args)`, a function of a module."""


def run_ranks(program: Program, world: int, folder: Path, *args: Any, timeout_s: float = 120) -> list[int]:
    """Runs `program` on `world` ranks to the end.

    Returns:
        The exit code of each rank: 0, the code of a CromssError, 1 for other errors, -N for signal N.
    """
    with Ranks(program, world, folder, *args, timeout_s=timeout_s) as ranks:
        return ranks.wait()


class Ranks:
    """The same, one step at a time, for tests that kill; none is left when the block ends.

    Args:
        program: What a rank runs.
        world: Number of ranks.
        folder: The program's second argument; the hidden `OWN_FOLDER` in it is this class's own.
        args: The program's further arguments.
        timeout_s: A rank that runs longer ends with 1 after printing the stacks of its threads.
    """

    def __init__(self, program: Program, world: int, folder: Path, *args: Any, timeout_s: float = 120) -> None:
        self.timeout_s = timeout_s
        self._own = folder / OWN_FOLDER / uuid.uuid4().hex
        self._told = False
        self._processes: list[BaseProcess] = [
            FORKSERVER.Process(target=_rank, args=(program, rank, world, folder, self._own, timeout_s, dict(os.environ), args))
            for rank in range(world)
        ]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
        self.wait()

    def start(self) -> None:
        """Starts the ranks."""
        self._own.mkdir(parents=True)
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid or 0 for process in self._processes]

    @property
    def running(self) -> bool:
        """Whether every rank still runs."""
        return all(process.is_alive() for process in self._processes)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one rank."""
        os.kill(self.pids[rank], number)

    def wait(self) -> list[int]:
        """Waits for all ranks, then prints what they wrote.

        Returns:
            Exit codes, as `run_ranks` does.
        """
        deadline = time.monotonic() + self.timeout_s + 5
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:  # stopped by a signal, or the interpreter's lock is held
                process.kill()
                process.join()
        self._tell()
        return [process.exitcode if process.exitcode is not None else -signal.SIGKILL for process in self._processes]

    def output(self, rank: int) -> str:
        """What a rank has written to stdout and stderr so far."""
        path = self._own / f"rank-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _tell(self) -> None:
        if self._told:
            return
        self._told = True
        for rank in range(len(self._processes)):
            if text := self.output(rank):
                print(f"--- rank {rank}\n{text}", file=sys.stderr, flush=True)


def _rank(
    program: Program,
    rank: int,
    world: int,
    folder: Path,
    own: Path,
    timeout_s: float,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    """One rank: joins the group, runs the program, leaves."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the server, and so with the tests
    log = os.open(own / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=2)
    os.environ.clear()  # the server has those of its start
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    rendezvous, timeout = f"file://{own / 'rendezvous'}", timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timeout)
    try:
        program(join("cpu"), folder, *args)
    except CromssError as error:
        traceback.print_exc()
        raise SystemExit(error.exit_code) from error
    dist.destroy_process_group()

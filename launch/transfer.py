"""Many transfer runs in parallel: `python launch/transfer.py --config configs/sweep.yaml [--cluster FILE]`.

Layer 5. Each run is a task of Ray, in a process of its own with its own cores and GPUs; `--workers 0` does without Ray and runs
one after another in this process, with the same numbers.
"""

import sys
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import takewhile
from os import cpu_count
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cromss_dist.commands.compare import print_comparison, print_lines
from cromss_dist.commands.printing import print_table, shown
from cromss_dist.errors import ConfigError, CromssError, PreemptedError, ResultError, TrainingError, main_guard
from cromss_dist.parse import ParsedRun, parse_run_of
from cromss_dist.tracking.run.spool import EVENTS_FILE, Tail
from cromss_dist.train.safety.stop import forget_stop, handling_signals, holding_signals, request_stop, stop_requested
from cromss_dist.transfer.compare import compare, summarise
from cromss_dist.transfer.results import read_result
from cromss_dist.world import choose_device
from launch.parallel import DiedError, outcomes
from launch.session import cluster
from launch.sweep import Cell, SweepConfig, cells_of, run_quietly

PROG = "python launch/transfer.py"
DESCRIPTION = """Runs a grid of transfer runs, several at a time, and compares them. What is done is skipped and what is half-way
goes on, so that the same command goes on with a sweep that was stopped or in which runs failed. A run that fails does not stop
the others. --dry-run lists the runs and how far each is. SIGTERM, SIGUSR1 and a file `stop` in the sweep's folder: no further run
is begun, and after a signal those that are at work save themselves. Exits with 0 if all runs are done, with 70 if some failed,
with 75 if it was stopped."""
Outcome: TypeAlias = tuple[Cell, Exception | None]
NUM_TOLD = 3  # errors in the last message; all are told as they come
GOES_ON = "The same command goes on with these alone."


def main() -> int:
    """The command."""
    parsed = parse_run_of(SweepConfig, prog=PROG, description=DESCRIPTION, clusters=True)
    address = address_of(parsed)
    sweep = replace(parsed.config, output=str(Path(parsed.config.output).expanduser().absolute()))
    if sweep.gpus is None:
        has_gpus = parsed.cluster.gpus_per_node > 0 if address else choose_device("auto").type == "cuda"
        sweep = replace(sweep, gpus=float(has_gpus))
    cells = cells_of(sweep)
    for cell in cells:
        cell.check()
    if parsed.dry_run:
        print_table(f"{len(cells)} runs in {sweep.output}", ("run", "state"), [(cell.name, cell.state) for cell in cells])
        return 0
    console = Console()
    told = ", ".join(f"{number} {state}" for state, number in Counter(cell.state for cell in cells).items())
    _say(console, f"{len(cells)} runs in {sweep.output}: {told}")
    failed = run_all(sweep, [cell for cell in cells if cell.state != "done"], console, address, parsed.allow_insecure)
    done = [cell for cell in cells if cell.state == "done"]
    wrong = verdict(len(cells), len(done), failed, stop_requested(Path(sweep.output)))
    show_results(sweep, done, console)
    if wrong is not None:
        raise wrong
    return 0


def verdict(runs: int, done: int, failed: Sequence[tuple[Cell, Exception]], stopped: bool) -> CromssError | None:
    """What a sweep ends with; None: all is done.

    Args:
        runs: Of the sweep.
        done: Of these.
        failed: Those that ended with an error.
        stopped: Whether the sweep was asked to stop.
    """
    if stopped:
        return PreemptedError(f"The sweep was asked to stop; {runs - done} of {runs} runs are not done. {GOES_ON}")
    if not failed:
        return None
    told = "; ".join(f"{cell.name}: {told_of(error)}" for cell, error in failed[:NUM_TOLD])
    more = f"; and {len(failed) - NUM_TOLD} more" if len(failed) > NUM_TOLD else ""
    return TrainingError(f"{len(failed)} of {runs} runs failed: {told}{more}. {GOES_ON}")


def address_of(parsed: ParsedRun[SweepConfig]) -> str | None:
    """The Ray cluster that is joined; None: this machine.

    Raises:
        ConfigError: a flag or kind of cluster has no meaning for a sweep.
    """
    flags = {"resume": parsed.resume, "fresh": parsed.fresh, "profile": parsed.profile, "detach": parsed.detach}
    if given := [f"--{name}" for name, value in flags.items() if value]:
        raise ConfigError(f"{', '.join(given)} has no meaning for a sweep, which goes on by itself; leave it out.")
    kind = parsed.cluster.kind
    if kind not in ("here", "ray") or parsed.cluster.elsewhere:
        raise ConfigError(
            f"cluster.kind={kind!r} takes no sweep from here; give a Ray cluster by HOST:PORT, on a machine of it, as in "
            "configs/cluster/ray.yaml."
        )
    if kind == "ray" and parsed.config.workers == 0:
        raise ConfigError("workers=0 runs in this process, and not on cluster.kind='ray'; set workers to 1 or more, or null.")
    return parsed.cluster.ray.address if kind == "ray" else None


def run_all(
    sweep: SweepConfig, cells: Sequence[Cell], console: Console, address: str | None = None, allow_insecure: bool = False
) -> list[tuple[Cell, Exception]]:
    """Runs the cells, and tells of each as it ends.

    Args:
        sweep: Theirs.
        cells: That are not done.
        console: Where it is told.
        address: Of the Ray cluster that is joined.
        allow_insecure: Whether one is joined that lets anyone in.

    Returns:
        Those that failed or were stopped, with their errors.
    """
    output = Path(sweep.output)
    output.mkdir(parents=True, exist_ok=True)
    forget_stop(output)
    failed: list[tuple[Cell, Exception]] = []
    ended = run_here(sweep, cells, console) if sweep.workers == 0 else run_on_ray(sweep, cells, console, address, allow_insecure)
    for number, (cell, error) in enumerate(ended, 1):
        if error is None:
            result = read_result(cell.run_dir)
            text = f"mIoU {100 * result.scores.mean_iou:.2f} %, {result.seconds:.0f} s"
        else:
            failed.append((cell, error))
            text = told_of(error)
        _say(console, f"[{number}/{len(cells)}] {cell.name}: {text}")
    return failed


def run_here(sweep: SweepConfig, cells: Sequence[Cell], console: Console) -> Generator[Outcome, None, None]:
    """One cell after another in this process."""
    output = Path(sweep.output)
    for cell in cells:
        if stop_requested(output):
            return
        try:
            cell.run(console)
        except PreemptedError as error:  # by a signal, which is for all
            request_stop(output)
            yield cell, error
        except Exception as error:  # noqa: BLE001 - told by who asks for the outcome
            yield cell, error
        else:
            yield cell, None


def run_on_ray(
    sweep: SweepConfig, cells: Sequence[Cell], console: Console, address: str | None, allow_insecure: bool
) -> Generator[Outcome, None, None]:
    """Several cells at a time, each in a process of its own, so that one that dies takes nothing with it."""
    if not cells:
        return
    output = Path(sweep.output)
    gpus = sweep.gpus or 0.0
    workers = sweep.workers or (len(cells) if address else _room(sweep.cpus, gpus))

    def stop(*_: object) -> None:
        request_stop(output)
        for cell in cells:
            if cell.state == "begun":
                request_stop(cell.run_dir)

    with ExitStack() as stack:
        with holding_signals():
            stack.enter_context(cluster(workers * sweep.cpus, address, allow_insecure=allow_insecure))
            stack.enter_context(handling_signals(stop))  # after Ray, which sets handlers of its own
        if console.is_terminal:
            stack.enter_context(Live(get_renderable=Board(cells).table, console=console, refresh_per_second=1, transient=True))
        to_begin = takewhile(lambda _: not stop_requested(output), cells)
        options: dict[str, Any] = {"num_cpus": sweep.cpus, "num_gpus": gpus, "max_calls": 1}
        for cell, _, error in outcomes(run_quietly, None, to_begin, workers, **options):
            yield cell, error


def _room(cpus: int, gpus: float) -> int:
    """Runs that this machine has cores and GPUs for, at least one."""
    by_cores = (cpu_count() or 1) // cpus
    if not gpus:
        return max(1, by_cores)
    import torch

    return max(1, min(by_cores, int(torch.cuda.device_count() / gpus)))


@dataclass
class Board:
    """What is seen of runs at work: read from their folders, wherever they run."""

    cells: Sequence[Cell]
    tails: dict[str, Tail] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)

    def table(self) -> Table:
        """A line for each run that has begun and is not done, and how many wait."""
        states = [cell.state for cell in self.cells]
        table = Table("run", "trained", caption=", ".join(f"{number} {state}" for state, number in Counter(states).items()))
        for cell, state in zip(self.cells, states, strict=True):
            if state == "begun":
                table.add_row(shown(cell.name), f"{self._share(cell):.0%}")
        return table

    def _share(self, cell: Cell) -> float:
        tail = self.tails.setdefault(cell.name, Tail(cell.run_dir / EVENTS_FILE))
        for event in tail.read():
            if event["event"] == "start":
                self.totals[cell.name] = event["total_samples"]
            elif event["event"] == "progress":
                self.shares[cell.name] = event["samples"] / self.totals[cell.name]
        return self.shares.get(cell.name, 0.0)


def show_results(sweep: SweepConfig, done: Sequence[Cell], console: Console) -> None:
    """The table of all runs that are done, and the differences to `against`, or why there are none.

    Raises:
        ResultError: the results of a run are damaged.
    """
    results = [read_result(cell.run_dir) for cell in done]
    if not results:
        return
    print_lines(summarise(results))
    against = [result for result in results if result.variant == sweep.against]
    others = [result for result in results if result.variant != sweep.against]
    if against and others:
        try:
            comparisons = compare(others, against)
        except ResultError as error:  # runs that lack a partner are whole all the same
            _say(console, str(error))
            return
        for comparison in comparisons:
            print_comparison(comparison)


def told_of(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, DiedError):
        return f"its process {error}"
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def _say(console: Console, text: str) -> None:
    console.print(shown(text), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main_guard(main))

"""Pretrains on this machine: `python launch/pretrain.py --config configs/pretrain/demo.yaml`.

Layer 5. Workers are started by Ray Train, over NCCL on GPUs and gloo on a CPU; `--launch.ray false` runs one worker in
this process instead, with the same numbers.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from cromss_dist.errors import PreemptedError, RegistryError, main_guard
from cromss_dist.parse import ParsedRun, parse_run
from cromss_dist.pretrain import report, run_in_process
from cromss_dist.tracking.runs import end_run
from cromss_dist.train.preflight import Preflight
from cromss_dist.train.run.events import read_events
from cromss_dist.train.run.folder import RunSummary, new_run_dir, working_in
from cromss_dist.train.run.watch import watching
from launch.driver import num_workers, run_on_ray

PROG = "python launch/pretrain.py"
DESCRIPTION = """Pretrains a Sentinel-1 and a Sentinel-2 encoder with CromSS on this machine. YAML files state differences
from the defaults, dotted arguments come last: --config configs/pretrain/demo.yaml --engine.global_batch 32.
--print_config shows the resolved config, --dry-run also the batch arithmetic, steps and parameter counts. SIGTERM, SIGUSR1
and a file `stop` in the run's folder make it save and exit with 75; --resume RUN_DIR goes on."""


def run(parsed: ParsedRun, console: Console) -> RunSummary:
    """Checks a run before anything starts, runs it, and shows its progress.

    Raises:
        CromssError: see errors.py.
    """
    config = parsed.config.with_absolute_paths()
    if not config.launch.ray:
        return run_in_process(parsed, console)
    workers = num_workers(config)
    Preflight.of(config, workers)
    run_dir = parsed.resume or new_run_dir(config)
    with (
        working_in(run_dir, shlex.join([sys.orig_argv[0], sys.argv[0]]), parsed.fresh),
        watching(run_dir, console),
        ending_the_run(run_dir, config.tracking_uri),
    ):
        console.print(f"  Ray starts {workers} worker{'s' if workers > 1 else ''} ...", highlight=False)
        return run_on_ray(config, run_dir, profile=parsed.profile)


@contextmanager
def ending_the_run(run_dir: Path, uri: str) -> Iterator[None]:
    """Ends the MLflow run of workers that were stopped before they could: KILLED after a stop, FAILED after an error."""
    try:
        yield
    except BaseException as error:
        run_ids = [event["run_id"] for event in read_events(run_dir) if event["event"] == "start"]
        stopped = isinstance(error, PreemptedError) or not isinstance(error, Exception)
        if run_ids:
            with suppress(RegistryError):  # must not hide the error that ended the run
                end_run(uri, run_ids[-1], "KILLED" if stopped else "FAILED")
        raise


def main() -> int:
    """The command."""
    parsed = parse_run(prog=PROG, description=DESCRIPTION, clusters=True)
    console = Console()
    if parsed.dry_run:
        config = parsed.config.with_absolute_paths()
        console.print(Preflight.of(config, num_workers(config)).describe(), highlight=False, markup=False, soft_wrap=True)
        return 0
    summary = run(parsed, console)
    report(summary, console)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))

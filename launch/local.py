"""Pretrains on this machine: `python launch/local.py --config configs/pretrain/demo.yaml`.

Layer 5. Workers are started by Ray Train, over NCCL on GPUs and gloo on a CPU; `--launch.ray false` runs one worker in
this process instead, with the same numbers.
"""

import sys

from rich.console import Console

from cromss_dist.config import RunConfig
from cromss_dist.errors import main_guard
from cromss_dist.parse import parse_run
from cromss_dist.pretrain import Preflight, RunSummary, new_run_dir, pretrain
from cromss_dist.train.watch import watching
from launch.ray_run import num_workers, run_on_ray

DESCRIPTION = """Pretrains a Sentinel-1 and a Sentinel-2 encoder with CromSS on this machine. YAML files state differences
from the defaults, dotted arguments come last: --config configs/pretrain/demo.yaml --engine.global_batch 32.
--print_config shows the resolved config, --dry-run also the batch arithmetic, steps and parameter counts."""


def run(config: RunConfig, console: Console) -> RunSummary:
    """Checks a run before anything starts, runs it, and shows its progress.

    Raises:
        CromssError: see errors.py.
    """
    Preflight.of(config, num_workers(config))
    run_dir = new_run_dir(config)
    console.print(f"  run folder {run_dir}", highlight=False, soft_wrap=True)
    with watching(run_dir, console):
        if config.launch.ray:
            return run_on_ray(config, run_dir)
        summary = pretrain(config, run_dir)
    assert summary is not None, "a run of one process is rank 0"
    return summary


def main() -> int:
    """The command."""
    parsed = parse_run(prog="launch/local.py", description=DESCRIPTION)
    console = Console()
    if parsed.dry_run:
        console.print(Preflight.of(parsed.config, num_workers(parsed.config)).describe(), highlight=False, markup=False, soft_wrap=True)
        return 0
    summary = run(parsed.config, console)
    report(summary, console)
    return 0


def report(summary: RunSummary, console: Console) -> None:
    """Prints what a finished run left, and how to look at it."""
    console.print(f"  {summary.samples} samples at {summary.samples_per_s:.1f} samples/s", highlight=False)
    for name, version in summary.registered.items():
        console.print(f"  registered {name} version {version}", highlight=False)
    console.print(f"  mlflow ui --backend-store-uri {summary.tracking_uri}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main_guard(main))

"""The `cromss` command.

Each subcommand is a function that adds its parser and names the function to run; heavy packages are imported in the
latter, so that `cromss --help` and `cromss registry list` stay quick.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cromss_dist import __version__
from cromss_dist.commands.compare import add_compare
from cromss_dist.commands.noise import add_noise
from cromss_dist.commands.registry import add_registry
from cromss_dist.commands.report import add_report
from cromss_dist.commands.track import add_track
from cromss_dist.commands.transfer import add_transfer
from cromss_dist.errors import main_guard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own).

    Returns:
        The exit code: 0, or that of the error (see cromss_dist/errors.py).
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not options.takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    return main_guard(lambda: options.run(options))


def build_parser() -> argparse.ArgumentParser:
    """The parser of `cromss` with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="cromss",
        description="CromSS: pretrain Sentinel-1 and Sentinel-2 encoders on noisy labels, and find the encoders you have.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(takes_rest=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pretrain(commands)
    _add_replay(commands)
    _add_doctor(commands)
    _add_plan(commands)
    _add_probe(commands)
    add_transfer(commands)
    add_compare(commands)
    add_noise(commands)
    add_report(commands)
    add_track(commands)
    add_registry(commands)  # further commands go here, one `_add_<command>` each
    return parser


def _add_pretrain(commands: Any) -> None:
    # The config has its own parser; --help is its, too.
    pretrain = commands.add_parser("pretrain", help="pretrain in this one process (many: launch/pretrain.py)", add_help=False)
    pretrain.set_defaults(run=_pretrain, takes_rest=True)


def _pretrain(options: argparse.Namespace) -> None:
    from rich.console import Console

    from cromss_dist.parse import parse_run
    from cromss_dist.pretrain.run import run_in_process
    from cromss_dist.pretrain.task import Pretraining
    from cromss_dist.train.run.conduct import report

    description = "Pretrains in this process, for debugging and small runs; launch/pretrain.py starts many workers."
    parsed = parse_run(options.rest, prog="cromss pretrain", description=description)
    if parsed.dry_run:
        print(Pretraining.of(parsed.config.with_absolute_paths(), world_size=1).describe())
        return
    console = Console()
    report(run_in_process(parsed, console), console)


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="compute a bad training step again, from its replay bundle",
        description="Computes a training step again that was not finite, or whose loss was a spike, with the weights and samples "
        "of its bundle, and says whether it goes wrong here, too, and where. Takes dotted config keys after BUNDLE.",
        usage="cromss replay BUNDLE [--KEY VALUE ...]",
        epilog="""examples:
  cromss replay runs/pretrain-20260101-000000/replay/step-0000123
  cromss replay step-0000123 --data.shards /data/shards --engine.device cpu --engine.precision fp32""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder of the bundle: <run folder>/replay/step-<step>")
    replay.set_defaults(run=_replay, takes_rest=True)


def _replay(options: argparse.Namespace) -> None:
    from rich.console import Console

    from cromss_dist.replay import replay, report

    report(options.bundle, *replay(options.bundle, options.rest), Console())


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="examine this machine for a run (a cluster: launch/doctor.py)", add_help=False)
    doctor.set_defaults(run=_doctor, takes_rest=True)  # it takes the config's keys, too


def _doctor(options: argparse.Namespace) -> int:
    from cromss_dist.doctor.command import parse_request, print_reports
    from cromss_dist.doctor.examine import examine
    from cromss_dist.doctor.node import Report

    request = parse_request(options.rest, "cromss doctor")
    return print_reports([Report("this machine", tuple(examine(request.subject)))], request.as_json)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a run will take, before any GPU hour",
        description="Predicts step, epoch and run, memory, collective calls and cost of a run, and says what degenerates. "
        "Takes --config, --cluster and dotted config keys, as launch/pretrain.py does.",
        usage="cromss plan [--config CONFIG] [--cluster CLUSTER] [--KEY VALUE ...] [options]",
        epilog="""examples:
  cromss plan --config configs/pretrain/resnet50_13b_middle.yaml --nodes 8 --gpus 8 --machine h100 --locations 103793 --price 2.5
  cromss plan --config run.yaml --cluster configs/cluster/slurm.yaml --machine profile.json
  cromss plan --config run.yaml --machine profile.json --scaling 512 --weak 32

Named machines are of data sheets, not measured: a100, h100, h200. The model and its checks: docs/scaling.md.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_argument(
        "--machine", metavar="PROFILE", default="h100", help="file of `cromss probe`, or a named one (default: h100)"
    )
    plan.add_argument("--nodes", type=int, metavar="N", help="machines; else those of --cluster")
    plan.add_argument("--gpus", type=int, metavar="G", help="ranks of each machine; else those of --cluster")
    plan.add_argument("--locations", type=int, metavar="N", help="locations of the dataset, if it is not here to be opened")
    plan.add_argument("--price", type=float, metavar="PRICE", help="of a GPU and hour, in any currency")
    plan.add_argument("--network-gbit", type=float, metavar="RATE", help="of all network cards of a node, Gbit/s")
    plan.add_argument("--network-us", type=float, metavar="LATENCY", help="of a message between nodes, microseconds")
    plan.add_argument("--scaling", type=int, metavar="RANKS", help="a table over 1, 2, 4 ... ranks instead")
    plan.add_argument("--weak", type=int, metavar="SAMPLES", help="with --scaling: so many samples a rank, not the same batch")
    plan.add_argument("--json", action="store_true", help="print JSON for scripts instead of tables")
    plan.set_defaults(run=_plan, takes_rest=True)


def _plan(options: argparse.Namespace) -> None:
    from cromss_dist.plan.command import run_plan

    run_plan(options)


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser(
        "probe",
        help="measure this machine for `cromss plan`",
        description="Measures, for about a minute, what a training step asks of this machine, and writes a profile.",
    )
    probe.add_argument("--out", type=Path, metavar="FILE", default=Path("profile.json"), help="default: %(default)s")
    probe.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    probe.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of a rank, as launch.cpus_per_worker")
    probe.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="on the disk of data and runs (default: here)")
    probe.set_defaults(run=_probe)


def _probe(options: argparse.Namespace) -> None:
    from cromss_dist.plan.command import run_probe

    run_probe(options)


if __name__ == "__main__":
    sys.exit(main())

"""The `cromss` command.

Each subcommand is a function that adds its parser and names the function to run; heavy packages are imported in the
latter, so that `cromss --help` and `cromss registry list` stay quick.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist import __version__
from cromss_dist.errors import main_guard

if TYPE_CHECKING:
    from cromss_dist.tracking.registry.registry import RegisteredEncoder

_REF_HELP = "name@alias or name/version, e.g. cromss-resnet50-s2@candidate"


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
    _add_registry(commands)  # further commands go here, one `_add_<command>` each
    return parser


def _add_pretrain(commands: Any) -> None:
    # The config has its own parser; --help is its, too.
    pretrain = commands.add_parser("pretrain", help="pretrain in this one process (many: launch/pretrain.py)", add_help=False)
    pretrain.set_defaults(run=_pretrain, takes_rest=True)


def _pretrain(options: argparse.Namespace) -> None:
    from rich.console import Console

    from cromss_dist.parse import parse_run
    from cromss_dist.pretrain import report, run_in_process
    from cromss_dist.train.preflight import Preflight

    description = "Pretrains in this process, for debugging and small runs; launch/pretrain.py starts many workers."
    parsed = parse_run(options.rest, prog="cromss pretrain", description=description)
    if parsed.dry_run:
        print(Preflight.of(parsed.config.with_absolute_paths(), world_size=1).describe())
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


def _add_registry(commands: Any) -> None:
    registry = commands.add_parser(
        "registry",
        help="list, show and fetch registered encoders",
        description="Registered encoders: named models, numbered versions, movable aliases.",
        epilog="""examples:
  cromss registry list
  cromss registry show cromss-resnet50-s2@candidate
  cromss registry pull cromss-resnet50-s2/3 encoders/s2

then, in Python:
  encoder = cromss_dist.load_encoder("cromss-resnet50-s2@candidate", bands=["B2", "B3", ...])

The store is --tracking_uri, else CROMSS_TRACKING_URI, else MLFLOW_TRACKING_URI, else runs/mlflow.db here.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = registry.add_subparsers(required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tracking_uri", metavar="URI", help="MLflow store, e.g. sqlite:///runs/mlflow.db or http://host:5000")
    common.add_argument("--json", action="store_true", help="print JSON for scripts instead of tables")

    show_all = actions.add_parser(
        "list", parents=[common], help="every version of every encoder", description="Lists all encoders."
    )
    show_all.set_defaults(run=_list)

    show = actions.add_parser(
        "show",
        parents=[common],
        help="one encoder's card",
        description="Fetches an encoder, checks every hash and shows its card.",
    )
    show.add_argument("ref", metavar="REF", help=_REF_HELP)
    show.set_defaults(run=_show)

    pull = actions.add_parser(
        "pull",
        parents=[common],
        help="fetch an encoder to a folder",
        description="Fetches an encoder's package and checks every hash; the folder appears whole or not at all.",
    )
    pull.add_argument("ref", metavar="REF", help=_REF_HELP)
    pull.add_argument("destination", metavar="DST", type=Path, help="folder to create; one that holds this very package is kept")
    pull.set_defaults(run=_pull)


def _list(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.registry import Registry

    entries = Registry(options.tracking_uri).list()
    if options.json:
        _print_json([_plain(entry) for entry in entries])
        return
    rows = [
        (
            entry.name,
            str(entry.version),
            " ".join(f"@{alias}" for alias in entry.aliases),
            entry.tags.get("encoder", "?"),
            entry.tags.get("fusion", "?"),
            entry.tags.get("bands", "?").replace(",", " "),
            f"{entry.created:%Y-%m-%d %H:%M}" + ("" if entry.verified else "  NOT VERIFIED"),
        )
        for entry in entries
    ]
    _print_table("Registered encoders", ("model", "version", "aliases", "encoder", "fusion", "bands", "created (UTC)"), rows)


def _show(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.registry import Registry

    entry, card = Registry(options.tracking_uri).show(options.ref)
    if options.json:
        _print_json({**_plain(entry), "card": json.loads(card.to_json())})
        return
    contract = card.normalisation
    bands = (f"{b} {m:g} +- {s:g}" for b, m, s in zip(contract.bands, contract.mean, contract.std, strict=True))
    rows = [
        ("reference", entry.ref + "".join(f"  @{alias}" for alias in entry.aliases)),
        ("modality", card.modality),
        ("bands, in order", " ".join(card.bands)),
        ("input", f"float in [{card.input_range[0]:g}, {card.input_range[1]:g}] = uint8 / 255; values in {contract.units}"),
        ("uint8", contract.rule),
        ("mean +- std", "\n".join(bands)),
        ("encoder", f"{card.encoder}, depth {card.depth}"),
        ("feature maps", ", ".join(f"{c} at 1/{s}" for c, s in zip(card.out_channels, card.strides, strict=True))),
        ("trained with", f"{card.fusion} fusion, classes {', '.join(card.classes)}"),
        ("metrics", "\n".join(f"{key} {value:g}" for key, value in sorted(card.metrics.items())) or "none"),
        ("run", card.run_id),
        ("config sha256", card.config_digest),
        ("data manifest", card.manifest_digest),
        ("code", card.git_revision),
        ("versions", ", ".join(f"{package} {version}" for package, version in sorted(card.versions.items()))),
        ("licence", card.licence),
        ("files", "\n".join(f"{name} sha256 {digest}" for name, digest in card.files.items())),
    ]
    _print_table(f"{entry.ref}: every hash checked", ("", ""), rows)


def _pull(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.registry import Registry

    folder = Registry(options.tracking_uri).pull(options.ref, options.destination)
    if options.json:
        _print_json({"ref": options.ref, "folder": str(folder)})
    else:
        print(f"{options.ref} is at {folder}, every hash checked. Load it: cromss_dist.load_encoder({str(folder)!r})")


def _plain(entry: "RegisteredEncoder") -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "created": entry.created.isoformat(), "verified": entry.verified, "ref": entry.ref}


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2))


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print("No encoder is registered yet.")
        return
    table = Table(*header, title=title, show_header=any(header), title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: names and tags are not rich's markup
    # A pipe has no width: nothing must be cut there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    sys.exit(main())

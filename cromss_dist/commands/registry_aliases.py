"""`cromss registry promote`, `rollback`, `history`, `retire` and `evidence`: which version is the one to use."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist.commands.printing import REF_HELP, print_json, print_table
from cromss_dist.commands.registry_find import plain

if TYPE_CHECKING:
    from cromss_dist.tracking.registry.entry import RegisteredEncoder

_ALIAS_HELP = "name@alias, e.g. cromss-resnet50-s2@production"


def add_promote(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "promote",
        parents=[store],
        help="move an alias to a version that is whole and, if asked, better",
        description="Fetches the package, checks every hash and the golden patch, compares evidence if asked, notes the move in "
        "the history, and moves the alias.",
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    parser.add_argument("alias", metavar="ALIAS", help="e.g. production")
    parser.add_argument("--require", metavar="KEY", help="evidence whose interval must lie above the incumbent's, e.g. dw.miou")
    parser.add_argument("--margin", type=float, default=0.0, help="by how much above (default: 0)")
    parser.add_argument("--allow-overlap", action="store_true", help="compare the values, not the intervals")
    parser.add_argument("--why", default="", metavar="TEXT", help="noted in the history")
    parser.set_defaults(run=_promote)


def add_rollback(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "rollback",
        parents=[store],
        help="move an alias back to what it meant before",
        description="Moves an alias to the version it meant before, once that package was checked; again, to the one before.",
    )
    parser.add_argument("ref", metavar="NAME@ALIAS", help=_ALIAS_HELP)
    parser.add_argument("--why", default="", metavar="TEXT", help="noted in the history")
    parser.set_defaults(run=_rollback)


def add_history(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "history", parents=[store], help="every move of an alias", description="The moves of an alias, oldest first."
    )
    parser.add_argument("ref", metavar="NAME@ALIAS", help=_ALIAS_HELP)
    parser.set_defaults(run=_history)


def add_retire(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "retire",
        parents=[store],
        help="mark a version as not to be used",
        description="Hides a version from searches and from aliases. Its files stay.",
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--reason", metavar="TEXT", help="what is wrong with it")
    what.add_argument("--undo", action="store_true", help="take it back into use")
    parser.set_defaults(run=_retire)


def add_evidence(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "evidence",
        parents=[store],
        help="add a downstream figure to a version",
        description="Adds what was measured after registering; it replaces an earlier figure of the same key.",
        epilog='FILE.json: {"dataset": "dw", "metric": "miou", "protocol": "frozen", "value": 0.61, "low": 0.6, "high": 0.62, '
        '"source": "run or publication"}; also level, runs, samples, manifest_digest.',
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    parser.add_argument("file", metavar="FILE", type=Path, help="JSON")
    parser.set_defaults(run=_evidence)


def _promote(options: argparse.Namespace) -> None:
    from cromss_dist.encoders.load import load_encoder
    from cromss_dist.tracking.registry.aliases import promote
    from cromss_dist.tracking.registry.registry import Registry

    entry = promote(
        Registry(options.tracking_uri),
        options.ref,
        options.alias,
        verify=load_encoder,
        require=options.require,
        margin=options.margin,
        allow_overlap=options.allow_overlap,
        why=options.why,
    )
    _tell(options, entry, f"@{options.alias} of {entry.name} means version {entry.version}; its package was checked.")


def _rollback(options: argparse.Namespace) -> None:
    from cromss_dist.encoders.load import load_encoder
    from cromss_dist.tracking.registry.aliases import rollback
    from cromss_dist.tracking.registry.registry import Registry

    entry = rollback(Registry(options.tracking_uri), options.ref, verify=load_encoder, why=options.why)
    _tell(options, entry, f"{options.ref} means version {entry.version} again; its package was checked.")


def _history(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.aliases import history
    from cromss_dist.tracking.registry.registry import Registry

    entry, moves = history(Registry(options.tracking_uri), options.ref)
    if options.json:
        print_json({"version": entry.version if entry else None, "moves": [dataclasses.asdict(move) for move in moves]})
        return
    rows = [
        (
            f"{move.when:%Y-%m-%d %H:%M:%S}",
            "-" if move.start is None else str(move.start),
            str(move.to) + ("" if move.took_place else "  NOT MADE"),
            move.reason,
            move.who,
            move.why,
        )
        for move in moves
    ]
    header = ("time (UTC)", "from", "to", "by", "who", "why")
    means = f"means version {entry.version}" if entry else "is gone"
    print_table(f"{options.ref} {means}", header, rows, f"No move of {options.ref} is recorded.")


def _retire(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.aliases import reinstate, retire
    from cromss_dist.tracking.registry.registry import Registry

    registry = Registry(options.tracking_uri)
    if options.undo:
        entry = reinstate(registry, options.ref)
        _tell(options, entry, f"{entry.ref} is in use again.")
    else:
        entry = retire(registry, options.ref, options.reason)
        _tell(options, entry, f"{entry.ref} is retired: {entry.retired}.")


def _evidence(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.package.evidence import Evidence
    from cromss_dist.tracking.registry.aliases import describe
    from cromss_dist.tracking.registry.registry import Registry

    measured = Evidence.from_json(options.file.read_text(errors="replace"), str(options.file))
    entry = Registry(options.tracking_uri).add_evidence(options.ref, measured)
    _tell(options, entry, f"{entry.ref} has {measured.key} {describe(measured)}.")


def _tell(options: argparse.Namespace, entry: "RegisteredEncoder", text: str) -> None:
    if options.json:
        print_json(plain(entry))
    else:
        print(text)

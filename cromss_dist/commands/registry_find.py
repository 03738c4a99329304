"""`cromss registry list` and `find`: which encoders there are."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from cromss_dist.commands.printing import print_json, print_table
from cromss_dist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cromss_dist.tracking.registry.entry import RegisteredEncoder

_HEADER = ("model", "version", "aliases", "encoder", "fusion", "bands", "created (UTC)")
_EXAMPLES = """bands: --bands says which you have. An encoder fits if it takes these or fewer of them, in whatever order:
load_encoder reorders exactly. --exactly: it uses all that you have. --missing N: it may want N more, which
load_encoder(missing='zeros' or 'mean') fills in.

keys of --min, --max and --sort: evidence (dw.frozen.miou; dw.miou for any protocol) or a metric of the card
(val/miou_s2). More is better in evidence, and --sort begins with the largest; --ascending with the smallest.

examples:
  cromss registry find --modality s2 --bands B2,B3,B4,B8 --min dw.miou=0.60 --licence Apache-2.0
  cromss registry find --bands B2,B3,B4,B8 --missing 9 --sort dw.frozen.miou --limit 3
  cromss registry find --name 'cromss-*' --sort created --json"""


def add_list(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "list",
        parents=[store],
        help="every version of every encoder",
        description="Lists all encoders, retired and unverified ones included.",
    )
    parser.set_defaults(run=_list)


def add_find(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "find",
        parents=[store],
        help="encoders that fit your bands and are good enough",
        description="Finds encoders; everything given must hold.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--modality", choices=("s1", "s2"))
    parser.add_argument("--bands", metavar="B2,B3,...", help="the bands that you have")
    parser.add_argument("--exactly", action="store_true", help="it takes all of --bands and no others")
    parser.add_argument("--missing", type=int, default=0, metavar="N", help="bands it may take beside --bands (default: 0)")
    for name, what in (
        ("name", "of the model; * and ? stand for others"),
        ("encoder", "architecture, e.g. resnet50"),
        ("fusion", "middle, late or none"),
        ("method", "of pretraining, e.g. cromss, moco"),
        ("licence", "SPDX name, e.g. Apache-2.0"),
        ("dataset", "of pretraining"),
        ("alias", "that it has"),
    ):
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--min", action="append", default=[], metavar="KEY=VALUE", help="figure that it reaches; repeatable")
    parser.add_argument("--max", action="append", default=[], metavar="KEY=VALUE", help="figure that it does not exceed")
    parser.add_argument("--sort", default="", metavar="KEY", help="such a key, or 'created' (default: name and version)")
    parser.add_argument("--ascending", action="store_true", help="smallest first")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most so many")
    parser.add_argument("--retired", action="store_true", help="with those that were retired")
    parser.add_argument("--unverified", action="store_true", help="with those whose registering was cut")
    parser.set_defaults(run=_find)


def plain(entry: "RegisteredEncoder") -> dict[str, Any]:
    """A version as JSON has it."""
    own = {"created": entry.created.isoformat(), "verified": entry.verified, "ref": entry.ref, "facts": entry.facts}
    return {**dataclasses.asdict(entry), **own}


def row(entry: "RegisteredEncoder") -> "Sequence[str]":
    """A version as a row of a table."""
    state = "" if entry.verified else "  NOT VERIFIED"
    state += "" if entry.retired is None else "  RETIRED"
    return (
        entry.name,
        str(entry.version),
        " ".join(f"@{alias}" for alias in entry.aliases),
        str(entry.facts.get("encoder", "?")),
        str(entry.facts.get("fusion", "?")),
        " ".join(entry.bands) or "?",
        f"{entry.created:%Y-%m-%d %H:%M}{state}",
    )


def _list(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.registry import Registry

    entries = Registry(options.tracking_uri).list()
    if options.json:
        print_json([plain(entry) for entry in entries])
    else:
        print_table("Registered encoders", _HEADER, [row(entry) for entry in entries], "No encoder is registered yet.")


def _find(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.query import Query, find
    from cromss_dist.tracking.registry.registry import Registry

    if options.bands is not None and not options.bands.strip():  # a script's empty variable, say
        raise ConfigError("--bands is empty; name the bands that you have, or leave the option away to find encoders of any.")
    query = Query(
        bands=() if options.bands is None else tuple(band.strip() for band in options.bands.split(",")),
        at_least=_limits("--min", options.min),
        at_most=_limits("--max", options.max),
        **{
            field.name: getattr(options, field.name)
            for field in dataclasses.fields(Query)
            if field.name not in ("bands", "at_least", "at_most")
        },
    )
    found = find(Registry(options.tracking_uri), query)
    if options.json:
        print_json([{**plain(one.entry), "figures": one.figures} for one in found])
        return
    rows = [(*row(one.entry), *(f"{one.figures[key]:.4g}" if key in one.figures else "-" for key in query.keys)) for one in found]
    print_table(
        f"{len(found)} found", (*_HEADER, *query.keys), rows, "No encoder fits. Ask for less, or see cromss registry list."
    )


def _limits(option: str, given: list[str]) -> dict[str, float]:
    limits = {}
    for text in given:
        key, _, value = text.rpartition("=")
        try:
            limits[key] = float(value)
        except ValueError:
            key = ""
        if not key or limits[key] != limits[key]:
            raise ConfigError(f"{option} {text} is not allowed; give a key and a number, e.g. {option} dw.miou=0.6.")
    return limits

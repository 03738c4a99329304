"""`cromss registry`: the encoders that are registered.

Each verb is a function that adds its parser and names the function to run. Heavy packages are imported in the latter.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist.commands.importing import add_import
from cromss_dist.commands.printing import REF_HELP, print_json, print_table

if TYPE_CHECKING:
    from cromss_dist.tracking.registry.registry import RegisteredEncoder

_HEADER = ("model", "version", "aliases", "encoder", "fusion", "bands", "created (UTC)")
_EXAMPLES = """examples:
  cromss registry list
  cromss registry show cromss-resnet50-s2@candidate
  cromss registry pull cromss-resnet50-s2/3 encoders/s2

then, in Python:
  encoder = cromss_dist.load_encoder("cromss-resnet50-s2@candidate", bands=["B2", "B3", ...])

The store is --tracking_uri, else CROMSS_TRACKING_URI, else MLFLOW_TRACKING_URI, else runs/mlflow.db here."""


def add_registry(commands: Any) -> None:
    """Adds `cromss registry` with its verbs to the subcommands of `cromss`."""
    registry = commands.add_parser(
        "registry",
        help="list, show and fetch registered encoders",
        description="Registered encoders: named models, numbered versions, movable aliases.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = registry.add_subparsers(required=True, metavar="ACTION")
    store = argparse.ArgumentParser(add_help=False)  # what every verb takes
    store.add_argument("--tracking_uri", metavar="URI", help="MLflow store, e.g. sqlite:///runs/mlflow.db or http://host:5000")
    store.add_argument("--json", action="store_true", help="print JSON for scripts instead of tables")
    _add_list(verbs, store)
    _add_show(verbs, store)
    _add_pull(verbs, store)
    add_import(verbs, store)  # further verbs go here, one `add_<verb>` each, of files of their own


def _add_list(verbs: Any, store: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser("list", parents=[store], help="every version of every encoder", description="Lists all encoders.")
    parser.set_defaults(run=_list)


def _list(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.registry import Registry

    entries = Registry(options.tracking_uri).list()
    if options.json:
        print_json([_plain(entry) for entry in entries])
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
    print_table("Registered encoders", _HEADER, rows, "No encoder is registered yet.")


def _add_show(verbs: Any, store: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser(
        "show",
        parents=[store],
        help="one encoder's card",
        description="Fetches an encoder, checks every hash and shows its card.",
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.registry import Registry

    entry, card = Registry(options.tracking_uri).show(options.ref)
    if options.json:
        print_json({**_plain(entry), "card": json.loads(card.to_json())})
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
    print_table(f"{entry.ref}: every hash checked", ("", ""), rows)


def _add_pull(verbs: Any, store: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser(
        "pull",
        parents=[store],
        help="fetch an encoder to a folder",
        description="Fetches an encoder's package and checks every hash; the folder appears whole or not at all.",
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="folder to create; one that holds this very package is kept"
    )
    parser.set_defaults(run=_pull)


def _pull(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.registry import Registry

    folder = Registry(options.tracking_uri).pull(options.ref, options.destination)
    if options.json:
        print_json({"ref": options.ref, "folder": str(folder)})
    else:
        print(f"{options.ref} is at {folder}, every hash checked. Load it: cromss_dist.load_encoder({str(folder)!r})")


def _plain(entry: "RegisteredEncoder") -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "created": entry.created.isoformat(), "verified": entry.verified, "ref": entry.ref}

"""`cromss registry`: the encoders that are registered.

Each verb is a function that adds its parser and names the function to run. Heavy packages are imported in the latter.
"""

import argparse
from typing import Any

from cromss_dist.commands.export import add_export
from cromss_dist.commands.importing import add_import
from cromss_dist.commands.publishing import add_publish
from cromss_dist.commands.registry_aliases import add_evidence, add_history, add_promote, add_retire, add_rollback
from cromss_dist.commands.registry_find import add_find, add_list
from cromss_dist.commands.registry_show import add_diff, add_show, add_trace
from cromss_dist.commands.registry_store import add_check, add_pull

_EXAMPLES = """examples:
  cromss registry find --modality s2 --bands B2,B3,B4,B8 --min dw.miou=0.60 --sort dw.miou
  cromss registry show cromss-resnet50-s2@candidate
  cromss registry diff cromss-resnet50-s2/2 cromss-resnet50-s2/3
  cromss registry trace cromss-resnet50-s2/3
  cromss registry promote cromss-resnet50-s2/3 production --require dw.miou
  cromss registry pull cromss-resnet50-s2/3 encoders/s2

then, in Python:
  encoder = cromss_dist.load_encoder("cromss-resnet50-s2@production", bands=["B2", "B3", ...])

The store is --tracking_uri, else CROMSS_TRACKING_URI, else MLFLOW_TRACKING_URI, else runs/mlflow.db here."""


def add_registry(commands: Any) -> None:
    """Adds `cromss registry` with its verbs to the subcommands of `cromss`."""
    registry = commands.add_parser(
        "registry",
        help="find, compare, fetch and promote registered encoders",
        description="Registered encoders: named models, numbered versions, movable aliases.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = registry.add_subparsers(required=True, metavar="ACTION")
    store = argparse.ArgumentParser(add_help=False)  # what every verb takes
    store.add_argument("--tracking_uri", metavar="URI", help="MLflow store, e.g. sqlite:///runs/mlflow.db or http://host:5000")
    store.add_argument("--json", action="store_true", help="print JSON for scripts instead of tables")
    add_list(verbs, store)
    add_find(verbs, store)
    add_show(verbs, store)
    add_diff(verbs, store)
    add_trace(verbs, store)
    add_pull(verbs, store)
    add_promote(verbs, store)
    add_rollback(verbs, store)
    add_history(verbs, store)
    add_retire(verbs, store)
    add_evidence(verbs, store)
    add_check(verbs, store)
    add_export(verbs, store)
    add_publish(verbs, store)
    add_import(verbs, store)  # further verbs go here, one `add_<verb>` each, of files of their own

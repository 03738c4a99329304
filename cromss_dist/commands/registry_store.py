"""`cromss registry pull` and `check`: packages on this machine, and what is wrong in the store."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from cromss_dist.commands.printing import REF_HELP, print_json, print_table
from cromss_dist.commands.registry_find import plain
from cromss_dist.errors import PackageError


def add_pull(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "pull",
        parents=[store],
        help="fetch an encoder, for a folder or for use without network",
        description="Fetches an encoder's package into the cache (CROMSS_CACHE, else ~/.cache/cromss), where load_encoder finds "
        "it, with --offline or CROMSS_OFFLINE=1 also without the store; with DST, into a folder of your own instead. Every "
        "hash is checked; the folder appears whole or not at all.",
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    parser.add_argument(
        "destination", metavar="DST", type=Path, nargs="?", help="folder to create; one that holds this very package is kept"
    )
    parser.add_argument("--offline", action="store_true", help="ask no store: what REF meant when it was last pulled here")
    parser.set_defaults(run=_pull)


def add_check(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "check",
        parents=[store],
        help="what is wrong in the registry",
        description="Tells registerings that were cut, files that `mlflow gc` took or will take, aliases of retired versions, "
        "moves that were not made, packages registered twice. Ends with 20 if anything is wrong.",
    )
    parser.add_argument("--deep", action="store_true", help="fetch every package and check every hash")
    parser.add_argument("--remove-half", action="store_true", help="delete versions whose registering was cut")
    parser.add_argument(
        "--older", type=float, default=3600.0, metavar="SECONDS", help="with --remove-half: only if older (default: %(default)g)"
    )
    parser.set_defaults(run=_check)


def _pull(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.cache import Cache, offline_by_environment
    from cromss_dist.tracking.registry.registry import Registry

    offline = options.offline or offline_by_environment()
    cache = Cache(options.tracking_uri)
    if options.destination is None or offline:
        pulled = cache.get(options.ref, offline) if options.destination is None else cache.copy(options.ref, options.destination)
        ref, folder, seen = pulled.ref, pulled.folder, pulled.seen.isoformat()
        told = f", as the store said {pulled.age} ago" if offline else ""
    else:
        registry = Registry(options.tracking_uri)
        entry = registry.resolve(options.ref)
        ref, folder, seen, told = entry.ref, registry.pull(entry.ref, options.destination), None, ""
    if options.json:
        print_json({"ref": ref, "folder": str(folder), "offline": offline, "seen": seen})
    else:
        print(f"{ref} is at {folder}, every hash checked{told}. Load it: cromss_dist.load_encoder({str(folder)!r})")


def _check(options: argparse.Namespace) -> int:
    from cromss_dist.tracking.registry.check import check, remove_half
    from cromss_dist.tracking.registry.registry import Registry

    registry = Registry(options.tracking_uri)
    removed = remove_half(registry, older_s=options.older) if options.remove_half else ()

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} versions", end="" if done < total else "\n", file=sys.stderr, flush=True)

    findings = check(registry, deep=options.deep, progress=progress)
    if options.json:
        print_json({"findings": [dataclasses.asdict(one) for one in findings], "removed": [plain(entry) for entry in removed]})
    else:
        for entry in removed:
            print(f"Removed {entry.ref}: its registering was cut.")
        print_table(
            f"{len(findings)} problems", ("", "problem", ""), [(f.ref, f.problem, f.told) for f in findings], "No problems."
        )
    return PackageError.exit_code if findings else 0

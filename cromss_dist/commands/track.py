"""`cromss track`: what runs have left in their folders, and what MLflow has of it.

Each verb is a function that adds its parser and names the function to run. Heavy packages are imported in the latter.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cromss_dist.commands.printing import print_json, print_table
from cromss_dist.errors import ArchiveMissingError, ConfigError, CromssError

_STORE_HELP = "MLflow store, e.g. sqlite:///runs/mlflow.db or http://host:5000 (default: that of the run's config)"
_EXAMPLES = """examples:
  cromss track status runs
  cromss track sync runs/pretrain-20260101-000000 --tracking_uri http://127.0.0.1:5000
  cromss track reap --tracking_uri http://127.0.0.1:5000 --dry-run

A run writes its figures into its own folder, and MLflow gets a copy: whatever a store has not got is never lost."""


def add_track(commands: Any) -> None:
    """Adds `cromss track` with its verbs to the subcommands of `cromss`."""
    track = commands.add_parser(
        "track",
        help="send the figures of runs to MLflow, and see what it has",
        description="The figures of runs, in their folders and in MLflow.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = track.add_subparsers(required=True, metavar="ACTION")
    _add_sync(verbs)
    _add_status(verbs)
    _add_reap(verbs)


def _add_sync(verbs: Any) -> None:
    parser = verbs.add_parser(
        "sync",
        help="send what MLflow has not got",
        description="Sends the figures, files and encoders of runs to a store: what it has not got of them, once each.",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="folder of a run")
    parser.add_argument("--tracking_uri", metavar="URI", help=_STORE_HELP)
    parser.add_argument("--again", action="store_true", help="send all, as to a store that was restored from a backup")
    parser.set_defaults(run=_sync)


def _sync(options: argparse.Namespace) -> None:
    failures = []
    for run_dir in map(_checked, options.run_dirs):
        try:
            _send(run_dir, options)
        except CromssError as error:  # of this run: those after it are sent
            failures.append(error)
    for failure in failures[:-1]:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
    if failures:
        raise failures[-1]


def _send(run_dir: Path, options: argparse.Namespace) -> None:
    from cromss_dist.tracking.run.shipper import deliver
    from cromss_dist.tracking.run.spool import EVENTS_FILE

    uri = _store_of(run_dir, options.tracking_uri)
    if uri is None:
        raise ConfigError(
            f"{run_dir} is of a run with tracking.uri=offline; say where it goes with --tracking_uri, e.g. "
            "sqlite:///runs/mlflow.db or http://host:5000."
        )
    with _bar(run_dir, (run_dir / EVENTS_FILE).stat().st_size) as progress:
        delivery = deliver(run_dir, uri, tell=print, again=options.again, progress=progress)
    if delivery.run_id is None:
        print(f"{run_dir}: no run has begun in it")
    elif delivery.refused:
        print(f"{run_dir}: {uri} has its figures, as run {delivery.run_id}")
        raise next(iter(delivery.refused.values()))
    else:
        print(f"{run_dir}: {uri} has all of it, as run {delivery.run_id}")


def _add_status(verbs: Any) -> None:
    parser = verbs.add_parser(
        "status",
        help="what MLflow has of each run",
        description="Lists runs with the records of their spools, and how many of them were sent. No store is asked.",
    )
    parser.add_argument("folders", metavar="RUN_DIR|OUTPUT", type=Path, nargs="+", help="folder of a run, or of many")
    parser.add_argument("--tracking_uri", metavar="URI", help=_STORE_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON for scripts instead of a table")
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> None:
    rows = [_row(run_dir, options.tracking_uri) for run_dir in _run_dirs(options.folders)]
    if options.json:
        print_json(rows)
        return
    header = ("run", "records", "sent", "behind", "unregistered", "state", "store")
    for row in rows:
        row |= {"unregistered": ", ".join(row["unregistered"]), "store": row["store"] or "none"}
    print_table("runs", header, [[str(row[key]) for key in header] for row in rows])


def _row(run_dir: Path, given_uri: str | None) -> dict[str, Any]:
    """What is known of a run from its folder alone."""
    from cromss_dist.tracking.run.replica import read_watermark
    from cromss_dist.tracking.run.spool import EVENTS_FILE, count_lines, read_events
    from cromss_dist.train.run.folder import holding

    uri = _store_of(run_dir, given_uri)
    mark = None if uri is None else read_watermark(run_dir, uri)
    records, behind = count_lines(run_dir / EVENTS_FILE), count_lines(run_dir / EVENTS_FILE, mark.offset if mark else 0)
    ends = list(read_events(run_dir, "attempt", "end"))
    with holding(run_dir) as free:
        state = "running" if not free else "not begun" if not ends else ends[-1].get("status", "died")
    counts = {"records": records, "sent": records - behind, "behind": behind}
    return {"run": str(run_dir), **counts, "unregistered": mark.unregistered if mark else (), "state": state, "store": uri}


def _add_reap(verbs: Any) -> None:
    parser = verbs.add_parser(
        "reap",
        help="mark runs that died as KILLED",
        description="Marks as KILLED what a store has as RUNNING although its process is gone: the run's folder is "
        "seen from here and nobody works in it, or it gave no sign of life for so long.",
    )
    parser.add_argument("--older", type=float, metavar="SECONDS", default=900.0, help="of silence (default: %(default)g)")
    parser.add_argument("--dry-run", action="store_true", help="list them, and change nothing")
    parser.add_argument("--tracking_uri", metavar="URI", help="MLflow store (default: as of `cromss registry`)")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts instead of a table")
    parser.set_defaults(run=_reap)


def _reap(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.run.dead import reap
    from cromss_dist.train.run.folder import holding

    dead = list(reap(options.tracking_uri, holding, options.older, options.dry_run))
    if options.json:
        print_json([dataclasses.asdict(run) for run in dead])
        return
    title = "dead runs, not changed" if options.dry_run else "runs marked as KILLED"
    rows = [[run.name, run.run_id, f"{run.silent_s:.0f} s", run.run_dir] for run in dead]
    print_table(title, ("run", "id", "silent for", "folder"), rows, empty="no dead runs")


def _store_of(run_dir: Path, given: str | None) -> str | None:
    """The store of a run: the one given, else that of its config, else the default; None where its config says offline."""
    from cromss_dist.parse import CONFIG_FILE, parse_run
    from cromss_dist.tracking.store import tracking_uri

    if given is None and (config := run_dir / CONFIG_FILE).is_file():
        return parse_run([f"--config={config}"]).config.tracking_uri
    return tracking_uri(given)


def _run_dirs(folders: Iterable[Path]) -> Iterator[Path]:
    """The runs' folders among those given, and in them."""
    from cromss_dist.tracking.run.spool import EVENTS_FILE

    for folder in folders:
        found = [folder] if (folder / EVENTS_FILE).is_file() else sorted(path.parent for path in folder.glob(f"*/{EVENTS_FILE}"))
        if not found:
            raise ArchiveMissingError(f"{folder} is no folder of a run, nor of runs: nothing in it has an {EVENTS_FILE}.")
        yield from (path.absolute() for path in found)


def _checked(run_dir: Path) -> Path:
    (found,) = _run_dirs([run_dir])
    return found


@contextmanager
def _bar(run_dir: Path, size: int) -> Iterator[Any]:
    """A bar on a terminal; gives what takes the bytes that are done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(run_dir.name, total=size)
        yield lambda done: bar.update(task, completed=done)

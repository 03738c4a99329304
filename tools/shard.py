"""Converts an SSL4EO-S12 archive with NoLDO-S12 labels into verified WebDataset shards.

    python tools/shard.py ARCHIVE OUT

ARCHIVE holds s1/, s2c/ and dw_noisy_labels/ (and dw_complete_ids.csv). OUT is created: shard-*.tar with a commit record
each, ledger.jsonl with one line for each input location, and manifest.json. It appears in one step, after every byte
was read back; when anything fails, nothing is left. Formats and reasons of rejection: docs/data-format.md.

Exit codes: 0 done; 2 wrong argument; 4 OUT is there already; 10 ARCHIVE is missing or incomplete; 11 it is empty;
12, 13, 14 too many inputs rejected: for mixed reasons, unreadable files, empty labels.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.convert import Summary, check_output, write_shards
from cromss_dist.errors import main_guard
from cromss_dist.schema import CLASS_NAMES


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} locations/s")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", metavar="ARCHIVE", type=Path, help="folder of the unpacked archive")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument("--shard_size_mib", type=float, default=256, help="size of a tar at most, MiB (default: %(default)s)")
    parser.add_argument(
        "--max_reject_fraction",
        type=float,
        default=0.001,
        help="share of the inputs that may be rejected, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds shards written by this tool")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace, console: Console) -> Summary:
    """Runs the conversion under a progress bar."""
    check_output(options.out.absolute(), options.overwrite)
    archive = open_archive(options.archive)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Writing shards", total=len(archive.keys) + archive.duplicates.total())
        return write_shards(
            archive,
            options.out,
            shard_size_mib=options.shard_size_mib,
            max_reject_fraction=options.max_reject_fraction,
            overwrite=options.overwrite,
            progress=lambda _key, _status: progress.advance(task),
        )


def show(summary: Summary, console: Console) -> None:
    """Prints ledger, class shares and where the result is."""
    console.print("Ledger: inputs = written + duplicate + rejected")
    ledger = Table("input locations", "count")
    for name, count in summary.ledger.items():
        ledger.add_row(name, str(count))
    console.print(ledger)
    counts = summary.class_counts.sum(axis=0)
    shares = Table("noisy label", "share of pixels, all seasons")
    for name, count in zip((*CLASS_NAMES, "ignored"), counts, strict=True):
        shares.add_row(name, f"{100 * count / counts.sum():.2f} %")
    console.print(shares)
    console.print(
        f"{summary.num_samples} samples in {summary.num_shards} shards, {summary.size_bytes / 2**20:.1f} MiB: {summary.folder}\n"
        f"digest {summary.digest}",
        soft_wrap=True,
        highlight=False,
    )


def main(arguments: list[str] | None = None) -> None:
    """Parses, converts, prints."""
    options = parse_arguments(arguments)
    console = Console()
    show(convert(options, console), console)


if __name__ == "__main__":
    sys.exit(main_guard(main))

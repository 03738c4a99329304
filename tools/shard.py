"""Converts an archive into verified WebDataset shards, a Zarr cube, or both in one pass.

    python tools/shard.py ARCHIVE OUT

ARCHIVE is a folder: SSL4EO-S12 with NoLDO-S12 labels, unpacked or as .tar.gz, or anything that a description in
configs/archives fits (tools/describe.py drafts one). OUT is created: shard-*.tar with a commit record each, ledger.jsonl
with one line for each input location, and manifest.json. It appears in one step, after every byte was read back. When
something fails, or the computer does, finished parts stay in the hidden folder .OUT.partial beside OUT, and the same
command goes on after them. Formats and reasons of rejection: docs/data-format.md.

Exit codes: 0 done; 2 wrong argument; 3 the disk is full or refuses a file; 4 OUT is there already or is being written;
5 an input changed; 10 ARCHIVE is missing or incomplete; 11 it is empty; 12, 13, 14 too many inputs rejected: for mixed
reasons, unreadable files, empty labels; 71 a worker died; 130 Ctrl-C.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.append import Base
from cromss_dist.data.conversion.convert import Runner, Summary, convert, run_here
from cromss_dist.data.conversion.estimate import Estimate, estimate
from cromss_dist.data.conversion.plan import locations_per_part
from cromss_dist.data.conversion.workplace import claimed
from cromss_dist.data.sample import Source
from cromss_dist.errors import ConfigError, main_guard
from launch.parallel import ray_runner
from launch.session import check_joinable
from tools.progress import Bars, Rate, finding_files


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", metavar="ARCHIVE", type=Path, help="folder of the archive")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument("--description", metavar="X", help="layout: a name or file of configs/archives (default: finds out)")
    parser.add_argument("--write", choices=("shards", "cube", "both"), help="default: shards, or what OUT has with --append")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, on Ray if above 1 (default: cores)")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="work on this Ray cluster, whose machines see the same files")
    parser.add_argument("--shard-size-mib", type=float, default=256, help="size of a tar at most, MiB (default: %(default)s)")
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=0.001,
        help="share of the inputs that may be rejected, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would take; keeps only what was found in containers")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds shards written by this tool")
    parser.add_argument("--append", action="store_true", help="add to OUT, which holds shards written by this tool")
    parser.add_argument("--restart", action="store_true", help="throw away what an interrupted conversion left")
    parser.add_argument("--allow-partial", action="store_true", help="take from a cut .tar.gz what is before the cut")
    options = parser.parse_args(arguments)
    # What the converter would find out only after the archive, which may take an hour to look through.
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is not allowed; give 1 or more.")
    if not 0 < options.shard_size_mib < math.inf:
        raise ConfigError(f"--shard-size-mib {options.shard_size_mib} is not allowed; give a size above 0.")
    if not 0 <= options.max_reject_fraction <= 1:
        raise ConfigError(f"--max-reject-fraction {options.max_reject_fraction} is not allowed; give a share in [0, 1].")
    if options.out.resolve().is_relative_to(options.archive.resolve()):
        raise ConfigError(f"OUT {options.out} lies in the archive {options.archive}, which is only read; choose another place.")
    if options.ray_address is not None:
        check_joinable(options.ray_address)
    return options


def open_source(options: argparse.Namespace, work: Path | None, console: Console) -> Source:
    """Opens the archive; what its reader keeps goes to `work`."""
    with finding_files(console) as tell:
        return open_archive(options.archive, options.description, work, options.allow_partial, tell)


def run(options: argparse.Namespace, console: Console) -> Summary:
    """Runs the conversion under a progress bar."""
    with claimed(options.out, options.overwrite, options.append, options.restart) as work:
        source = open_source(options, work.inputs, console)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate("locations"), TimeRemainingColumn())
        with Bars(console, *columns) as progress:
            task = progress.add_task("Converting", total=len(source.keys) + source.duplicates.total())
            return convert(
                source,
                options.out,
                write=options.write,
                shard_size_mib=options.shard_size_mib,
                max_reject_fraction=options.max_reject_fraction,
                run=choose_runner(options, source),
                progress=lambda _key, _status: progress.advance(task),
                work=work,
            )


def choose_runner(options: argparse.Namespace, source: Source) -> Runner:
    """Ray where it can help: a part is one worker's."""
    num_parts = math.ceil(len(source.keys) / locations_per_part(source.spec, options.shard_size_mib))
    workers = min(options.workers, num_parts)
    return run_here if workers == 1 and options.ray_address is None else ray_runner(workers, options.ray_address)


def show_estimate(told: Estimate, options: argparse.Namespace, console: Console) -> None:
    """Prints what a conversion would take."""
    table = Table(title=f"A conversion of {options.archive} to {options.out}", show_header=False, title_justify="left")
    table.add_row("inputs", str(told.num_inputs))
    table.add_row("bytes in", _size(told.bytes_in))
    table.add_row("bytes out", f"{_size(told.bytes_out)} (from {told.num_tried} locations)")
    table.add_row("free on that disk", _size(told.free_bytes))
    table.add_row("parts", str(told.num_parts))
    table.add_row("time", f"{_duration(told.seconds)} on {min(options.workers, told.num_parts)} of {options.workers} workers")
    console.print(table)


def show(summary: Summary, console: Console) -> None:
    """Prints ledger, class shares and where the result is."""
    console.print("Ledger: inputs = written + duplicate + rejected")
    ledger = Table("input locations", "count")
    for name, count in summary.ledger.items():
        ledger.add_row(name, str(count))
    console.print(ledger)
    shares = Table("label", "share of pixels, all seasons")
    total = sum(summary.class_counts.values())
    for name, count in summary.class_counts.items():
        shares.add_row(name, f"{100 * count / total:.2f} %")
    console.print(shares)
    identical = summary.manifest["identical"]
    if identical:
        console.print(
            f"{len(identical)} groups of locations have equal pixels, such as {', '.join(identical[0])}.", soft_wrap=True
        )
    cube = " and a cube" if summary.manifest["cube"] else ""
    console.print(
        f"{summary.num_samples} samples in {summary.num_shards} shards{cube}, {_size(summary.size_bytes)}: {summary.folder}\n"
        f"digest {summary.digest}",
        soft_wrap=True,
        highlight=False,
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def main(arguments: list[str] | None = None) -> None:
    """Parses, converts, prints."""
    options = parse_arguments(arguments)
    console = Console()
    if options.dry_run:
        with claimed(options.out, options.overwrite, options.append) as work:
            source = open_source(options, work.inputs, console)
            write = options.write or (Base.of(work.out).sinks if work.append else "shards")
            show_estimate(estimate(source, work.out, write, options.shard_size_mib, options.workers), options, console)
            console.print(work.kept or "Nothing was written.", soft_wrap=True, highlight=False)
    else:
        show(run(options, console), console)


if __name__ == "__main__":
    sys.exit(main_guard(main))

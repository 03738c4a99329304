"""Checks a dataset of shards, cube or both against its manifest, and against the archive it came from.

    python tools/verify.py DATASET [--deep] [--source ARCHIVE]

Without options it looks at names, sizes and the digests of manifest and records: seconds, whatever the size. --deep reads
every byte, and compares shards with the cube sample for sample. --source reads the archive again, too, and compares every
sample with it. Each problem is printed with its file, sample, array and season. See docs/data-format.md.

Exit codes: 0 all is well; 2 wrong argument; 10, 11, 13 ARCHIVE is missing, empty or unreadable; 15 problems were found.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.store.verify.verify import Report, verify
from cromss_dist.errors import ConfigError, ShardError, main_guard
from tools.progress import Bars, finding_files

NUM_SHOWN = 20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", type=Path, help="folder that tools/shard.py has written")
    parser.add_argument("--deep", action="store_true", help="read every byte; compare shards with the cube")
    parser.add_argument("--source", metavar="ARCHIVE", type=Path, help="compare every sample with this archive; implies --deep")
    parser.add_argument("--description", metavar="X", help="of ARCHIVE: a name in configs/archives or a YAML file")
    parser.add_argument("--report", metavar="FILE.json", type=Path, help="write what was found to this file")
    options = parser.parse_args(arguments)
    if options.description and not options.source:
        raise ConfigError("--description says what --source is; give --source ARCHIVE too.")
    if options.report and not options.report.absolute().parent.is_dir():
        raise ConfigError(f"--report {options.report} lies in no folder; make the folder first.")
    return options


def check(options: argparse.Namespace, console: Console) -> Report:
    """Runs the checks under a progress bar."""
    source = None
    if options.source:
        with finding_files(console) as tell:
            source = open_archive(options.source, options.description, progress=tell)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(console, *columns, transient=True) as bar:
        tasks = {what: bar.add_task(f"Reading the {what}", total=None, visible=False) for what in ("cube", "shards", "samples")}
        return verify(
            options.dataset,
            options.deep,
            source,
            progress=lambda what, done, total: bar.update(tasks[what], completed=done, total=total, visible=True),
        )


def show(report: Report, console: Console) -> None:
    """Prints what was looked at and the first problems."""
    for problem in report.problems[:NUM_SHOWN]:
        console.print(str(problem), soft_wrap=True, highlight=False, markup=False)
    if len(report.problems) > NUM_SHOWN:
        console.print(f"... and {len(report.problems) - NUM_SHOWN} more; --report FILE.json lists them all.")
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(report.counts.items()))
    rate = f", {report.bytes_read / 1e6 / report.seconds:.0f} MB/s" if report.deep else ""
    depth = "every byte" if report.deep else "names, sizes and records"
    console.print(f"Looked at {depth} in {report.seconds:.1f} s{rate}: {counts}", soft_wrap=True, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Parses, checks, prints, and writes the report."""
    options = parse_arguments(arguments)
    console = Console()
    report = check(options, console)
    show(report, console)
    if options.report:
        options.report.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if report.problems:
        count = f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
        raise ShardError(f"{options.dataset} has {count}, see above. Restore those files or convert the archive again.")
    console.print(f"{options.dataset} is as it was written, digest {report.digest}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main_guard(main))

"""Fetches SSL4EO-S12 and NoLDO-S12 from Hugging Face: lists what there is, fetches a part, goes on after a break, verifies.

    python tools/download.py                                        the datasets and their parts
    python tools/download.py noldo-s12                              the files of one, with sizes
    python tools/download.py noldo-s12 OUT --part nol               fetch a part
    python tools/download.py ssl4eo-s12-v1.1 OUT --part s1 --part s2c --match 'val/*' --first 2
    python tools/download.py noldo-s12 OUT --part nol --verify      read all of it again, fetch nothing

A broken or stopped download goes on when the same command runs again. Every file is checked against the repository's checksum
before it gets its name. Tokens are read from HF_TOKEN or from `hf auth login`, and only ever sent to Hugging Face.

Exit codes: 0 done; 2 wrong argument; 3 the disk is too small; 69 the server is out of reach or refuses, or files are wrong.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from cromss_dist.data.hub import REPOSITORIES, Listing, RemoteFile, download, list_files, verify
from cromss_dist.errors import ConfigError, DownloadError, main_guard
from tools.progress import Bars

NUM_SHOWN = 20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"one of {', '.join(REPOSITORIES)}")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="folder to fetch into; without it files are listed")
    parser.add_argument("--part", action="append", default=[], help="a part of the dataset; may be given more than once")
    parser.add_argument(
        "--match", action="append", default=[], metavar="GLOB", help="pattern of paths; may be given more than once"
    )
    parser.add_argument("--first", type=int, metavar="N", help="the first N files of each folder")
    parser.add_argument("--verify", action="store_true", help="check the files in OUT against the repository, fetch nothing")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: %(default)s)")
    parser.add_argument("--endpoint", metavar="URL", help="server, instead of HF_ENDPOINT or Hugging Face's own")
    options = parser.parse_args(arguments)
    if options.first is not None and options.first < 1:
        raise ConfigError(f"--first is {options.first}; give 1 or more, or leave it out.")
    if options.verify and options.out is None:
        raise ConfigError("--verify checks a folder; give OUT too.")
    return options


def show_datasets(console: Console) -> None:
    """Prints what there is to fetch."""
    table = Table("name")
    for column in ("repository", "parts", "about"):
        table.add_column(column, overflow="fold")
    for name, repository in REPOSITORIES.items():
        table.add_row(name, repository.repo_id, " ".join(repository.parts), repository.about)
    console.print(table)


def show_files(listing: Listing, files: tuple[RemoteFile, ...], console: Console) -> None:
    """Prints files with sizes, one a line."""
    for file in files:
        console.print(f"{_size(file.size):>10}  {file.path}", soft_wrap=True, highlight=False, markup=False)
    total = _size(sum(file.size for file in files))
    console.print(f"{total:>10}  {len(files)} files of {listing.repository.repo_id} at {listing.commit}", highlight=False)


def fetch(listing: Listing, files: tuple[RemoteFile, ...], options: argparse.Namespace, console: Console) -> None:
    """Fetches or verifies under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    there: dict[str, int] = {}
    with Bars(console, *columns) as bar:
        task = bar.add_task("Reading" if options.verify else "Fetching", total=sum(file.size for file in files))

        def advance(path: str, size: int) -> None:
            bar.advance(task, size - there.get(path, 0))
            there[path] = size

        if options.verify:
            problems = verify(files, options.out, advance)
            for problem in problems[:NUM_SHOWN]:
                console.print(f"{problem.path} {problem.what}", soft_wrap=True, highlight=False, markup=False)
            if problems:
                raise DownloadError(
                    f"{len(problems)} of {len(files)} files in {options.out} are not as {listing.repository.repo_id} lists them; "
                    "delete them and run it again without --verify."
                )
        else:
            fetched = download(listing, files, options.out, advance)
            console.print(f"{_size(fetched)} fetched.", highlight=False)
    console.print(
        f"{len(files)} files, {_size(sum(file.size for file in files))}, verified: {options.out}", soft_wrap=True, highlight=False
    )


def _size(num_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def main(arguments: list[str] | None = None) -> None:
    """Parses, lists or fetches, prints."""
    options = parse_arguments(arguments)
    console = Console()
    if options.name is None:
        show_datasets(console)
        return
    listing = list_files(options.name, options.endpoint, options.revision)
    files = listing.select(options.part, options.match, options.first)
    if options.out is None:
        show_files(listing, files, console)
    else:
        fetch(listing, files, options, console)


if __name__ == "__main__":
    sys.exit(main_guard(main))

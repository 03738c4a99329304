"""Measures and draws a dataset: `python tools/report.py DATASET`.

DATASET is a folder that tools/shard.py has written. The report is a folder of its own:

  report.md           a page that shows the rest
  quality.csv         a line a location and season: cloud, nodata, S1-S2 shift, label mix
  contact_sheet.png   some locations: Sentinel-2, Sentinel-1 and label of every season
  map.png             where the locations are
  class_shares.png    classes of the label by season
  quality.png         histograms of quality.csv

Exit codes: 0 done; 2 wrong argument; 4 the report is there already; 15 DATASET is damaged or none.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cromss_dist.data.reporting.report import PAGE, check_new, measure, write_report
from cromss_dist.data.store.index import open_shards
from cromss_dist.errors import ConfigError, main_guard
from tools.progress import Bars


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", type=Path, help="folder of shards")
    parser.add_argument("--out", type=Path, help="folder to create (default: DATASET-report beside it)")
    parser.add_argument("--sample", type=int, help="measure this many locations, drawn by seed (default: all)")
    parser.add_argument("--sheet", type=int, default=8, help="locations on the contact sheet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of both draws (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores, here %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, draws, says where it is."""
    options = _parser().parse_args(arguments)
    if options.sheet < 1:
        raise ConfigError(f"--sheet {options.sheet} is not allowed; give 1 location or more.")
    dataset = options.dataset.absolute()
    out = options.out or dataset.with_name(f"{dataset.name}-report")
    check_new(out)
    total = len(open_shards(dataset))
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(console, *columns) as bar:
        task = bar.add_task("Measuring locations", total=min(total, options.sample or total))
        locations = measure(dataset, options.sample, options.seed, options.workers, lambda: bar.advance(task))
    write_report(dataset, locations, out, options.sheet, options.seed)
    console.print(f"Written to {out}: begin with {PAGE}.", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main_guard(main))

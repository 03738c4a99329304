"""Makes a synthetic archive with known truth: `python tools/synth.py OUT --locations 60 --seed 0`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cromss_dist.data.synthetic import Noise, Report, SyntheticConfig, write_archive
from cromss_dist.errors import main_guard
from tools.progress import Bars

_DEFAULTS = SyntheticConfig()

_EPILOG = """\
noise:
  default     borders, coherent confusion, errors that follow one season's Sentinel-2, and clouds: about a third is wrong
  none        labels are the truth: the ceiling of any method
  uniform     independent flips: every method should cope
  image-only  all errors follow Sentinel-2's looks: its branch cannot notice them, the radar can
Noise changes the labels only; images and truth of a seed stay byte for byte the same.

examples:
  python tools/synth.py data/train --locations 256 --seed 1
  python tools/synth.py data/test --locations 48 --seed 2
  python tools/synth.py data/train_clean --locations 256 --seed 1 --noise none
  python tools/synth.py /tmp/tiny --locations 6 --size-px 96

Location i of a seed is the same whatever --locations and --workers say. Take train and test from two seeds.
Next: tools/shard.py turns the archive into shards. Beside it lie reference_labels/ and noise_kinds/ for scoring.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synth.py",
        description="Makes an archive in the layout of SSL4EO-S12 + NoLDO-S12 from simulated landscapes. "
        "The clean truth lies beside the noisy labels.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument(
        "--locations", type=int, default=_DEFAULTS.num_locations, help="locations, 4 seasons each (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="seed of everything (default %(default)s)")
    parser.add_argument(
        "--size-px", type=int, default=_DEFAULTS.size_px, help="side of a patch at 10 m, a multiple of 6 (default %(default)s)"
    )
    parser.add_argument(
        "--noise", choices=get_args(Noise), default=_DEFAULTS.noise, help="label noise, see below (default %(default)s)"
    )
    parser.add_argument(
        "--cloudy-share",
        type=float,
        default=_DEFAULTS.cloudy_share,
        help="share of Sentinel-2 scenes with clouds (default %(default)s)",
    )
    parser.add_argument(
        "--season-share",
        type=float,
        default=_DEFAULTS.season_share,
        help="part of the noise that the seasons have in common: at 0 they correct each other (default %(default)s)",
    )
    parser.add_argument(
        "--s1-shift-px",
        type=int,
        default=_DEFAULTS.s1_shift_px,
        help="largest shift of Sentinel-1 against Sentinel-2 (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a synthetic archive")
    return parser


def _table(report: Report) -> Table:
    table = Table(title=f"{report.num_locations} locations x 4 seasons", title_justify="left")
    table.add_column("class")
    for name in ("share %", "wrong labels %"):
        table.add_column(name, justify="right")
    for name, share in report.class_shares.items():
        wrong = report.noise_by_class[name]
        table.add_row(name, f"{100 * share:.1f}", "-" if wrong is None else f"{100 * wrong:.1f}")
    table.add_section()
    table.add_row("all", "100.0", f"{100 * report.noise_rate:.1f}")
    for kind, share in report.noise_by_kind.items():
        table.add_row(f"  by {kind}", "", f"{100 * share:.1f}")
    table.add_row("same label in all seasons", f"{100 * report.seasons_agree:.1f}", _percent(report.noise_where_seasons_agree))
    table.add_row("under cloud", f"{100 * report.cloud_share:.1f}", "")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(arguments)
    console = Console()
    config = SyntheticConfig(
        num_locations=args.locations,
        seed=args.seed,
        size_px=args.size_px,
        noise=args.noise,
        cloudy_share=args.cloudy_share,
        season_share=args.season_share,
        s1_shift_px=args.s1_shift_px,
    )
    columns = (TextColumn("locations"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(console, *columns) as bar:
        task = bar.add_task("locations", total=config.num_locations)
        report = write_archive(
            args.out, config, lambda done: bar.update(task, completed=done), workers=args.workers, overwrite=args.overwrite
        )
    console.print(_table(report))
    console.print(f"Written to {args.out}: README.md says what it is, report.json has all figures.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))

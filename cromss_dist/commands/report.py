"""`cromss report`: what runs did, on one page.

Layer 4.
"""

import argparse
from pathlib import Path
from typing import Any

_EXAMPLES = """examples:
  cromss report runs/pretrain-20260101-000000
  cromss report runs/plain-* runs/cromss-* --out plain-and-cromss.html --title "With and without selection"
  cromss report transfer/ --out transfer.html --figures figures/

The page is one file: it needs no network, follows the reader's light or dark colours, and prints. Curves and scores come from
events.jsonl, transfer from scores.json and tiles.npz, panels are those that the runs drew."""


def add_report(commands: Any) -> None:
    """Adds the command to `cromss`."""
    parser = commands.add_parser(
        "report",
        help="write what runs did as one HTML page",
        description="Writes curves, scores, panels, transfer results and configs of runs as one HTML page, side by side.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN|FOLDER", nargs="+", type=Path, help="run folder, or a folder with such in it")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="new folder for each figure and shown panel as a PNG")
    parser.add_argument(
        "--panels", metavar="N", type=int, default=2, help="panels of each run that are shown (default: %(default)s)"
    )
    parser.add_argument("--title", default="CromSS runs", help="heading of the page (default: %(default)s)")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from cromss_dist.report.report import check_new, compose, write_figures, write_report

    check_new(options.out, options.overwrite)
    if options.figures is not None:
        check_new(options.figures)
    runs, sections = compose(options.runs, options.panels)
    write_report(sections, options.title, runs, options.out)
    print(f"{options.out}: {len(runs)} runs, {options.out.stat().st_size / 2**20:.1f} MiB")
    if options.figures is not None:
        print(f"{options.figures}: {write_figures(sections, options.figures)} pictures")

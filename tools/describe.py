"""Looks at a folder that may be an archive, says what it found, and drafts its description.

    python tools/describe.py ARCHIVE --out my_archive.yaml

Containers in the folder (.tar, .tar.gz, split .tar.gz.partaa, .zip) count as unpacked. The draft is the YAML that
`tools/shard.py ARCHIVE OUT --description my_archive.yaml` takes: where it says `# edit` something is yours to fill in,
where it says `# guess` something is yours to check. docs/archives.md is the how-to and explains every key.

Exit codes: 0 done; 2 wrong argument; 4 the YAML is there already; 10 ARCHIVE is missing; 11 no images with labels in it;
13 a container is damaged, or all files of a kind are.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cromss_dist.data.survey.draft import Draft, draft
from cromss_dist.data.survey.survey import NUM_NAMED, Survey, look
from cromss_dist.errors import ConfigError, OutputExistsError, main_guard
from cromss_dist.schema import BANDS
from tools.progress import finding_files


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", metavar="ARCHIVE", type=Path, help="any folder")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="write the draft there (default: print it)")
    parser.add_argument("--work", type=Path, help="folder for the inventory, to keep it (default: a temporary one)")
    parser.add_argument("--allow-partial", action="store_true", help="take containers that were cut off as far as they go")
    return parser


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _place_of(band: str) -> int:
    """Where a band comes among those of its instrument."""
    return next((bands.index(band) for bands in BANDS.values() if band in bands), 0)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column in ("files", "size", "share", "pixels") else "left",
                         overflow="fold")  # fmt: skip
    return table


def show_files(survey: Survey, console: Console) -> None:
    """Prints extensions and patterns of paths."""
    kinds = _table(f"{survey.num_files:,} files", "extension", "files", "size")
    for extension, (files, size) in sorted(survey.extensions.items(), key=lambda item: -item[1][1]):
        kinds.add_row(extension or "none", f"{files:,}", _bytes(size))
    console.print(kinds)
    paths = _table("Paths", "pattern", "taken for", "files", "size")
    for pattern in survey.patterns[:25]:
        paths.add_row(pattern.text, survey.role(pattern) or "", f"{pattern.count:,}", _bytes(survey.bytes_of[pattern.text]))
    console.print(paths)
    if len(survey.patterns) > 25:
        console.print(f"and {len(survey.patterns) - 25} patterns of fewer files")


def show_draft(found: Draft, console: Console) -> None:
    """Prints what the rasters of a few locations hold."""
    census = found.census
    rasters = _table("Rasters of a few locations", "role", "band", "px", "bands", "type", "1 % to 99 %", "files")
    for (role, band), probes in sorted(census.sampled.items(), key=lambda item: (item[0][0], _place_of(item[0][1]))):
        sizes = Counter(f"{probe.header.height} x {probe.header.width}" for probe in probes)
        rasters.add_row(
            role,
            band,
            " or ".join(size for size, _ in sizes.most_common(2)),
            str(probes[0].header.bands),
            ", ".join(sorted({probe.header.dtype for probe in probes})),
            f"{min(probe.low for probe in probes):.4g} to {max(probe.high for probe in probes):.4g}",
            str(len(probes)),
        )
    console.print(rasters)
    total = sum(census.label_counts.values())
    labels = _table("Label values", "value", "pixels", "share")
    for value, count in sorted(census.label_counts.items())[:40]:
        labels.add_row(str(value), f"{count:,}", f"{100 * count / total:.2f} %")
    console.print(labels)
    places = [probe.place for probes in census.sampled.values() for probe in probes]
    lons, lats = [p.lon for p in places if p.lon is not None], [p.lat for p in places if p.lat is not None]
    matches = [found.description.match(probe.path) for probes in census.sampled.values() for probe in probes]
    times = sorted(match.time[:8] for match in matches if match is not None and match.time)
    counts = ", ".join(f"{number:,} with {role}" for role, number in census.locations.items())
    console.print(f"Locations: {counts}; {census.complete:,} with all of them.")
    console.print(
        "Scenes a location: " + ", ".join(f"{n} ({count:,} locations)" for n, count in sorted(census.num_scenes.items())) + "."
    )
    if times:
        console.print(f"Dates: {times[0]} to {times[-1]}.")
    console.print(f"CRS: {_some(sorted({place.crs or 'none' for place in places}))}.")
    if lons and lats:
        console.print(f"Places: {min(lons):.2f} to {max(lons):.2f} degrees east, {min(lats):.2f} to {max(lats):.2f} north.")
    if {"s1", "s2"} <= census.locations.keys():
        told = ", ".join(f"{key} ({s.rows_px:+.1f}, {s.cols_px:+.1f})" for key, s in sorted(census.shifts.items())[:NUM_NAMED])
        console.print(f"S1 against S2, px of 10 m down and right: {told or 'cannot be told'}.")


def show_odd(survey: Survey, found: Draft, console: Console) -> None:
    """Prints files that look wrong."""
    refused = survey.inventory.refused
    kinds = (
        ("files of no bytes", survey.num_empty, survey.empty),
        ("rasters that cannot be read", len(survey.damaged), [str(rejected) for rejected in survey.damaged]),
        ("rasters of another size or type", len(found.census.odd), found.census.odd),
        ("rasters that the draft leaves out", sum(p.count for p in found.unused), [p.text for p in found.unused]),
        ("entries that are no plain file", sum(refused.values()), [f"{n} {kind}" for kind, n in refused.items()]),
        ("files in conflicting copies", len(survey.inventory.conflicting), list(survey.inventory.conflicting.values())),
    )
    odd = [(what, number, named) for what, number, named in kinds if number]
    for what, number, named in odd:
        console.print(f"Odd: {what} ({number:,}): {'; '.join(named[:NUM_NAMED])}", soft_wrap=True)
    if not odd:
        console.print("Odd files: none.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Looks, says, drafts."""
    options = _parser().parse_args(arguments)
    if options.out is not None and options.out.exists():
        raise OutputExistsError(f"{options.out} is there already; name a new file with --out, or remove it.")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {options.out} lies in no folder; make the folder first.")
    console = Console(highlight=False)
    with finding_files(console) as tell:
        survey = look(options.archive, options.work, options.allow_partial, tell)
    show_files(survey, console)
    stem = (options.out or options.archive.resolve()).stem.lower()
    with console.status("Reading the rasters of a few locations"):
        found = draft(survey, re.sub(r"[^a-z0-9_-]", "_", stem).strip("_-") or "archive")
    show_draft(found, console)
    show_odd(survey, found, console)
    console.print()
    if options.out is None:
        print(found.text, end="")
        return
    options.out.write_text(found.text, encoding="utf-8")
    todo = [f"{key} ({why.partition(':')[0]})" for key, why in found.remarks.items() if not why.startswith("seen")]
    console.print(f"Draft written to {options.out}. Look at: {', '.join(todo) or 'nothing, all was told'}.", soft_wrap=True)
    console.print(f"Next: python tools/shard.py {options.archive} OUT --description {options.out}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main_guard(main))

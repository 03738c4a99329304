"""A report on a dataset: its quality measured on all cores, pictures, and a page that shows both."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from cromss_dist.data.reporting.pictures import (
    choose_locations,
    draw_class_shares,
    draw_contact_sheet,
    draw_map,
    draw_quality,
    save,
)
from cromss_dist.data.reporting.quality import SHIFT_CONFIDENCE, Quality, measure_location, write_csv
from cromss_dist.data.store.index import ShardIndex, open_shards
from cromss_dist.errors import ConfigError, OutputExistsError

QUALITY, PAGE = "quality.csv", "report.md"
CONTACT_SHEET, MAP, CLASS_SHARES, HISTOGRAMS = "contact_sheet.png", "map.png", "class_shares.png", "quality.png"
NUM_WORST = 8  # locations that the page lists of each kind


def measure(
    folder: Path, sample: int | None, seed: int, workers: int, progress: Callable[[], None] | None = None
) -> list[list[Quality]]:
    """Measures a dataset in several processes.

    Args:
        folder: Of the shards.
        sample: Locations to measure, drawn by seed; None: all.
        seed: Of the draw.
        workers: Processes; 1: none but this.
        progress: Called once a location.

    Returns:
        For each location a row a season, in the order of the dataset, whatever the number of workers.

    Raises:
        ConfigError: `sample` or `workers` is below 1.
        ShardError: the dataset is damaged.
    """
    for name, value in (("sample", sample), ("workers", workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not allowed; give 1 or more.")
    index = open_shards(folder)
    measured = []
    for rows in _run(index, choose_locations(len(index), len(index) if sample is None else sample, seed), workers):
        measured.append(rows)
        if progress is not None:
            progress()
    return measured


def write_report(folder: Path, locations: Sequence[Sequence[Quality]], out: Path, sheet: int, seed: int) -> None:
    """Writes table, pictures and page into a new folder.

    Args:
        folder: Of the shards.
        locations: What `measure` returned.
        out: Folder to create.
        sheet: Locations on the contact sheet at most, drawn by seed.
        seed: Of the draw.

    Raises:
        OutputExistsError: `out` is there already.
    """
    index = open_shards(folder)
    check_new(out)
    out.mkdir(parents=True)
    shown = [locations[i] for i in choose_locations(len(locations), sheet, seed)]
    save(draw_contact_sheet(index, shown), out / CONTACT_SHEET)
    placed = [(seasons[0].lon, seasons[0].lat) for seasons in locations]
    known = np.array([place for place in placed if None not in place], float).reshape(-1, 2)
    if len(known):
        of = "" if len(known) == len(locations) else f" of {len(locations):,}; where the others are is not recorded"
        save(draw_map(known[:, 0], known[:, 1], f"{len(known):,} locations{of}"), out / MAP)
    save(draw_class_shares(index.manifest["class_counts"]), out / CLASS_SHARES)
    rows = [row for seasons in locations for row in seasons]
    save(draw_quality(rows), out / HISTOGRAMS)
    write_csv(out / QUALITY, rows)
    (out / PAGE).write_text(_page(index, locations, len(shown), bool(len(known))), encoding="utf-8")


def check_new(out: Path) -> None:
    """Raises OutputExistsError where something is there."""
    if out.exists() or out.is_symlink():
        raise OutputExistsError(f"{out} is there already; name a new folder with --out, or remove it.")


_index: ShardIndex | None = None  # of a worker process: opened once, not for each shard


def _open(folder: str) -> None:
    global _index
    _index = open_shards(folder)


def _measure_here(sample_id: int) -> list[Quality]:
    assert _index is not None
    return measure_location(_index, sample_id)


def _run(index: ShardIndex, sample_ids: Sequence[int], workers: int) -> Iterator[list[Quality]]:
    if workers == 1:
        yield from (measure_location(index, sample_id) for sample_id in sample_ids)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _open, (index.origin,)) as pool:
        yield from pool.map(_measure_here, sample_ids, chunksize=8)


def _page(index: ShardIndex, locations: Sequence[Sequence[Quality]], num_shown: int, placed: bool) -> str:
    manifest = index.manifest
    rows = [row for seasons in locations for row in seasons]
    confident = [row.shift_px for row in rows if row.shift_px is not None]
    measured = f"all {len(index):,}" if len(locations) == len(index) else f"{len(locations):,} of {len(index):,}, drawn by seed,"
    lines = [
        f"# {Path(index.origin).name}",
        "",
        f"{len(index):,} locations x {len(locations[0])} seasons, patches of {index.patch_px} px at 10 m.",
        f"Digest `{index.digest}`.",
        "",
        "| array | bands or values | shape | m a pixel |",
        "|---|---|---|---|",
        *(
            f"| {name} | {' '.join(spec.get('bands') or spec['values'])} "
            f"| {' x '.join(map(str, spec['shape']))} | {spec['gsd_m']} |"
            for name, spec in manifest["arrays"].items()
        ),
        "",
        "Ledger: "
        + ", ".join(f"{manifest['ledger'][name]:,} {name}" for name in ("inputs", "written", "duplicate", "rejected"))
        + ".",
        "",
        f"![Contact sheet]({CONTACT_SHEET})",
        "",
        f"{num_shown} locations drawn by seed. Sentinel-2: B4 B3 B2. Sentinel-1: VV, VH, VV - VH. Colours are stretched for "
        "each location.",
        "",
        f"![Where the locations are]({MAP})" if placed else "Where the locations are is not recorded: there is no map.",
        "",
        f"![Class shares by season]({CLASS_SHARES})",
        "",
        "## Quality",
        "",
        f"Of {measured} locations; a line a season in [{QUALITY}]({QUALITY}).",
        "",
        f"![Quality]({HISTOGRAMS})",
        "",
        "| of the seasons | share |",
        "|---|---|",
        *(
            f"| {what} | {100 * sum(test) / len(rows):.1f} % |"
            for what, test in (
                ("more than 5 % cloud", [(row.cloud_share or 0) > 0.05 for row in rows]),
                ("more than 30 % cloud", [(row.cloud_share or 0) > 0.3 for row in rows]),
                ("any nodata in S1", [(row.s1_nodata_share or 0) > 0 for row in rows]),
                ("any nodata in S2", [(row.s2_nodata_share or 0) > 0 for row in rows]),
                ("label of one class alone", [row.dominant_share == 1 for row in rows]),
                (f"S1-S2 shift told (confidence above {SHIFT_CONFIDENCE:g})", [row.shift_px is not None for row in rows]),
                ("S1-S2 shift of 2 px or more", [(row.shift_px or 0) >= 2 for row in rows]),
            )
        ),
        "",
    ]
    if confident:
        lines += [f"Median S1-S2 shift where it can be told: {np.median(confident):.2f} px.", ""]
    kinds: tuple[tuple[str, Callable[[Quality], float], str], ...] = (
        ("Most cloud", lambda row: 100 * (row.cloud_share or 0), "%"),
        ("Most nodata", lambda row: 100 * max(row.s1_nodata_share or 0, row.s2_nodata_share or 0), "%"),
        ("Largest S1-S2 shift", lambda row: row.shift_px or 0, "px"),
    )
    for title, value, unit in kinds:
        worst = [row for row in sorted(rows, key=value, reverse=True)[:NUM_WORST] if value(row) > 0]
        named = ", ".join(f"{row.key} season {row.season} ({value(row):.1f} {unit})" for row in worst)
        lines += [f"{title}: {named or 'none'}.", ""]
    return "\n".join(lines)

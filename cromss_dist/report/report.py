"""`cromss report`: from the folders of runs to a page, and its figures as files.

Layer 4.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import ConfigError, OutputExistsError
from cromss_dist.report.page import Section, render
from cromss_dist.report.run_record import RunRecord, find_runs, read_run
from cromss_dist.report.tables import distinct_names
from cromss_dist.report.training import configuration_section, panel_section, training_sections
from cromss_dist.report.transfer import transfer_sections
from cromss_dist.tracking.run.spool import EVENTS_FILE
from cromss_dist.transfer.results import SCORES_FILE, read_result

_MOST_NAMES = 6  # that the page says below its title


def compose(folders: Iterable[Path], num_panels: int) -> tuple[list[RunRecord], list[Section]]:
    """What runs did, as the sections of a report.

    Args:
        folders: Of runs, of any kind, or folders above such.
        num_panels: Panels of each run that are shown.

    Returns:
        The runs that were found, and the sections.

    Raises:
        ArchiveMissingError: there is no run in one of the folders.
        ConfigError: `num_panels` is negative.
        StorageError, ResultError: a run's files are damaged, or results of one encoder do not belong together.
    """
    if num_panels < 0:
        raise ConfigError(f"panels={num_panels} is not allowed; give 0 or more.")
    runs = [read_run(folder) for folder in find_runs(folders)]
    results = [read_result(run.folder) for run in runs if (run.folder / SCORES_FILE).is_file()]
    names = distinct_names(runs)
    spooled = [(run, name) for run, name in zip(runs, names, strict=True) if (run.folder / EVENTS_FILE).is_file()]

    def of_kind(is_transfer: bool) -> tuple[list[RunRecord], list[str]]:
        chosen = [(run, name) for run, name in spooled if run.is_transfer == is_transfer]
        return [run for run, _ in chosen], [name for _, name in chosen]

    return runs, [
        *training_sections(*of_kind(False), "Pretraining"),
        *transfer_sections(results),
        *training_sections(*of_kind(True), "Transfer"),
        *panel_section(runs, names, num_panels),
        *configuration_section([run for run, _ in spooled], [name for _, name in spooled]),
    ]


def write_report(sections: Sequence[Section], title: str, runs: Sequence[RunRecord], out: Path) -> None:
    """Writes the page, whole or not at all.

    Args:
        sections: See `compose`.
        title: Heading.
        runs: That it is of.
        out: File; what is there is replaced.
    """
    shown = ", ".join(run.name for run in runs[:_MOST_NAMES])
    more = f" and {len(runs) - _MOST_NAMES} more" if len(runs) > _MOST_NAMES else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(title, f"{shown}{more}", sections).encode())


def check_new(out: Path, overwrite: bool = False) -> None:
    """Raises OutputExistsError where something is there that must not be replaced."""
    if out.is_dir() or (out.exists() and not overwrite):
        raise OutputExistsError(f"{out} is there already; name another place, or give --overwrite to replace a page.")


def write_figures(sections: Sequence[Section], folder: Path) -> int:
    """Writes each drawing and each shown panel as a PNG into a new folder; returns how many.

    Raises:
        OutputExistsError: `folder` is there already.
    """
    check_new(folder)
    folder.mkdir(parents=True)
    number = 0
    for section in sections:
        for part in section.parts:
            pictures = [(drawing.key, drawing.png) for drawing in part.drawings]
            pictures += [
                (f"{section.anchor}-{part.title}-{photo.title}", photo.picture.path.read_bytes()) for photo in part.photos
            ]
            for key, png in pictures:
                number += 1  # keeps the page's order, and names apart
                write_atomically(folder / f"{number:03d}-{file_name(key)}.png", png)
    return number


def file_name(text: str) -> str:
    """What is left of a text in the name of a file: any run may have written it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80]

"""Why a rank ended, in a file that its launcher reads.

Layer 3.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from cromss_dist import errors
from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import CromssError
from cromss_dist.train.safety.hang_watcher import HANG_FILE

STACKS_FILE = "stacks-rank{rank}.txt"
_NAME = "error-rank{rank}.json"


def error_path(run_dir: Path, rank: int | str) -> Path:
    """The file of a rank's error in the run's folder."""
    return run_dir / _NAME.format(rank=rank)


def write_error(run_dir: Path, rank: int | str, error: CromssError) -> None:
    """Leaves an error for the launcher."""
    write_atomically(error_path(run_dir, rank), json.dumps({"type": type(error).__name__, "message": str(error)}).encode())


def read_error(run_dir: Path) -> CromssError | None:
    """The error that ended a run, as the type it had: of the rank that hung first, else of the lowest that left one."""
    for path in [run_dir / HANG_FILE, *sorted(run_dir.glob(_NAME.format(rank="*")))]:
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        kind = getattr(errors, content["type"], None)
        if isinstance(kind, type) and issubclass(kind, CromssError):
            return kind(content["message"])
    return None


def set_aside_errors(run_dir: Path) -> Path | None:
    """Moves what the ranks left, errors and stacks, into a folder of its own; None where they left nothing."""
    for stacks in run_dir.glob(STACKS_FILE.format(rank="*")):
        if stacks.stat().st_size == 0:  # of a rank that was killed
            stacks.unlink()
    names = [HANG_FILE, _NAME.format(rank="*"), STACKS_FILE.format(rank="*")]
    left = [path for name in names for path in sorted(run_dir.glob(name))]
    if not left:
        return None
    return set_aside(left, run_dir / "failure")


def set_aside(paths: Iterable[Path], place: Path) -> Path:
    """Moves files and folders into a new folder `<place>-<n>`, which it returns."""
    folder = first_free(place)
    folder.mkdir()
    for path in paths:
        path.rename(folder / path.name)
    return folder


def first_free(place: Path) -> Path:
    """The first `<place>-<n>` that is not there yet, counted from 1."""
    return next(new for n in itertools.count(1) if not (new := place.with_name(f"{place.name}-{n}")).exists())


def forget_errors(run_dir: Path) -> None:
    """Removes what ranks left that ended since they were asked to, before they start again."""
    for path in run_dir.glob(_NAME.format(rank="*")):
        path.unlink()

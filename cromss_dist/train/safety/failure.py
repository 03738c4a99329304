"""Why a rank ended, in a file that its launcher reads.

Layer 3.
"""

import itertools
import json
from pathlib import Path

from cromss_dist import errors
from cromss_dist.errors import CromssError
from cromss_dist.train.safety.hang_watcher import HANG_FILE

STACKS_FILE = "stacks-rank{rank}.txt"
_NAME = "error-rank{rank}.json"


def error_path(run_dir: Path, rank: int | str) -> Path:
    """The file of a rank's error in the run's folder."""
    return run_dir / _NAME.format(rank=rank)


def write_error(run_dir: Path, rank: int | str, error: CromssError) -> None:
    """Leaves an error for the launcher."""
    error_path(run_dir, rank).write_text(json.dumps({"type": type(error).__name__, "message": str(error)}))


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
    folder = next(place for number in itertools.count(1) if not (place := run_dir / f"failure-{number}").exists())
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)
    return folder


def forget_errors(run_dir: Path) -> None:
    """Removes what ranks left that ended since they were asked to, before they start again."""
    for path in run_dir.glob(_NAME.format(rank="*")):
        path.unlink()

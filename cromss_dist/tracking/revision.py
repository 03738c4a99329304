"""Which code a run was made by."""

import json
import subprocess
from functools import cache
from pathlib import Path

CODE_RECORD = "code.json"  # beside the packages of a copy that a launcher made of a checkout


@cache
def git_revision() -> str:
    """Commit of the checkout this process's code runs from, with '+dirty' where it was changed; 'unknown' outside a checkout.

    A copy that a launcher made for a job has the commit that it is of in its record.
    """
    record = Path(__file__).parents[2] / CODE_RECORD
    if record.is_file():
        return str(json.loads(record.read_text())["revision"])

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed inside another checkout, its commit is not ours
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"

"""Which code a run was made by."""

import subprocess
from functools import cache
from pathlib import Path


@cache
def git_revision() -> str:
    """Commit of the checkout this process's code runs from, with '+dirty' where it was changed; 'unknown' outside a checkout."""

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

"""The code of a run as it was when the run was started: jobs that wait in a queue, or start again, run this.

Layer 5. Not named `code`: Python's own debugger would import this file in place of its module of that name.
"""

import hashlib
import io
import itertools
import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cromss_dist.data.staging import replacing
from cromss_dist.errors import ConfigError
from cromss_dist.tracking.revision import CODE_RECORD, git_revision
from launch.session import ROOT

CODE_FOLDER = "code"  # in the run's folder; code-2 is that of a run which went on with other code
PACKAGES = ("cromss_dist", "launch")
STILL_S = 1.0  # since the last change of a file: a tool that changes several is through
STILL_WAIT_S = 20.0  # for that
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can state: equal files are equal bytes


@dataclass(frozen=True)
class Snapshot:
    """Files of the packages that run a run.

    Args:
        revision: Commit that they are of, with '+dirty' where they differ from it.
        files: Content by path, such as `launch/driver.py`; sorted.
    """

    revision: str
    files: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def take(cls) -> "Snapshot":
        """Of the code that this process runs.

        Raises:
            ConfigError: it changes all the time, or is no Python: somebody is editing it.
        """
        deadline_s = time.monotonic() + STILL_WAIT_S
        while (code := _read(ROOT)) != _read(ROOT) or _changed_just_now(ROOT):
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"The code in {ROOT} has changed for {STILL_WAIT_S:g} s while it was copied; start again later."
                )
            time.sleep(0.1)
        for name, content in code.items():
            try:
                if name.endswith(".py"):
                    compile(content, name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                raise ConfigError(f"{ROOT / name} is no Python, so that a job could not run it: {error}; mend it.") from error
        return cls(git_revision(), code)

    @property
    def sha256(self) -> str:
        """Digest (hex) of all names and contents."""
        digest = hashlib.sha256()
        for name, content in self.files.items():
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    @property
    def record(self) -> bytes:
        """What `code.json` beside the packages says."""
        return (json.dumps({"revision": self.revision, "sha256": self.sha256}, indent=2) + "\n").encode()

    def zipped(self, extra: Mapping[str, bytes] | None = None) -> bytes:
        """A zip with the packages, their record and further files in its root; the same bytes for the same content."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in {**self.files, CODE_RECORD: self.record, **(extra or {})}.items():
                file.writestr(zipfile.ZipInfo(name, _ZIP_DATE), content, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    def write(self, run_dir: Path) -> Path:
        """Leaves the code in a run's folder, unless the newest that it has is the same.

        Returns:
            The folder to have on PYTHONPATH: `code`, or `code-<n>` of a run that goes on with other code.
        """
        folders = (run_dir / (CODE_FOLDER if number == 1 else f"{CODE_FOLDER}-{number}") for number in itertools.count(1))
        newest = None
        for folder in folders:
            if not folder.exists():
                break
            newest = folder
        if newest and (newest / CODE_RECORD).read_bytes() == self.record and _read(newest) == self.files:
            return newest
        with replacing(folder) as fresh:
            for name, content in {**self.files, CODE_RECORD: self.record}.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder


def _paths(root: Path) -> list[Path]:
    paths = sorted(path for name in PACKAGES for path in (root / name).rglob("*") if path.is_file())
    return [path for path in paths if not any(p.startswith((".", "__pycache__")) for p in path.relative_to(root).parts)]


def _read(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in _paths(root)}


def _changed_just_now(root: Path) -> bool:
    now_s = time.time()
    return any(0 <= now_s - path.stat().st_mtime < STILL_S for path in _paths(root))

"""The folder of a run's checkpoints: what is on it, what is set aside, what goes. Used by rank 0 alone.

    step-0000120/              a checkpoint: checkpoint.json and a safetensors file of each rank
    .step-0000160.<token>/     one that is being written, or removed; of no use after a crash
    quarantine/                those that did not verify, each with its reason in a text file

Layer 3.
"""

import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from cromss_dist.data.staging import sync_folder, write_atomically
from cromss_dist.failpoint import failpoint
from cromss_dist.train.checkpoint.reader import step_name

_COMMITTED = re.compile("step-[0-9]{7,}")


class Shelf:
    """The checkpoints in a folder.

    Args:
        folder: Of all checkpoints of a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quarantine = folder / "quarantine"

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / step_name(step)

    def owner(self) -> int:
        """User id that files of this process have here; on a network disk it need not be the process's own."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_uid

    def steps(self) -> list[int]:
        """The steps that were committed, newest first; whether they verify is another question."""
        names = filter(_COMMITTED.fullmatch, os.listdir(self.folder))
        steps = {name: int(name.removeprefix("step-")) for name in names}
        return sorted((step for name, step in steps.items() if name == step_name(step)), reverse=True)

    def stage(self, step: int) -> Path:
        """A new hidden folder, to write the checkpoint of a step in."""
        staging = self._hidden(step)
        staging.mkdir()
        return staging

    def publish(self, staging: Path, step: int) -> None:
        """Gives a finished checkpoint its name."""
        sync_folder(staging)
        failpoint("checkpoint_before_publish")
        staging.rename(self.path(step))
        failpoint("checkpoint_published")
        sync_folder(self.folder)

    def sweep(self) -> None:
        """Removes what savings and removals left that did not come to their end."""
        for pattern in (".step-*", ".seen-by-all.*"):
            for leftover in self.folder.glob(pattern):
                _remove(leftover)

    def purge(self, keep: int, trusted: set[int]) -> None:
        """Removes all but `keep` checkpoints, oldest first; those that are known to verify are the last to go."""
        by_worth = sorted(self.steps(), key=lambda step: (step in trusted, step), reverse=True)
        for step in reversed(by_worth[keep:]):
            hidden = self._hidden(step)
            self.path(step).rename(hidden)  # so that a crash while it is being removed leaves no half of it under its name
            sync_folder(self.folder)
            failpoint("checkpoint_purge")
            _remove(hidden)
            failpoint("checkpoint_purged")

    def set_aside(self, step: int, reason: str) -> Path:
        """Moves a checkpoint that does not verify to the quarantine, with the reason; returns where it lies now."""
        self.quarantine.mkdir(exist_ok=True)
        aside = self.quarantine / f"{step_name(step)}.{secrets.token_hex(4)}"
        self.path(step).rename(aside)
        failpoint("checkpoint_quarantined")
        sync_folder(self.folder)
        write_atomically(aside.with_name(f"{aside.name}.txt"), f"{reason}\n".encode())
        return aside

    def has_quarantined(self) -> bool:
        """Whether there are some that did not verify."""
        return any(self.quarantine.glob("step-*"))

    def _hidden(self, step: int) -> Path:
        return self.folder / f".{step_name(step)}.{secrets.token_hex(8)}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

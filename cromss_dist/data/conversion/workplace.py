"""Where a conversion works: a hidden folder beside the output, with one name, so that the same command goes on in it.

.OUT.partial/
  lock          held by the converter that works here; names it
  plan.json     what is done here
  inputs/       what the reader of the archive keeps: its inventory; in folders of it, what took long to find, such as the
                listings of containers
  parts/        one commit record a finished part
  result/       what becomes OUT, by one rename
  publishing    sha256 of the manifest that is about to appear at OUT
"""

import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cromss_dist.data.staging import exchange, sync_folder, write_atomically
from cromss_dist.data.store.manifest import MANIFEST, read_manifest
from cromss_dist.errors import ConfigError, OutputExistsError, ShardError
from cromss_dist.failpoint import failpoint


@dataclass(frozen=True)
class Workplace:
    """The folder that works for `out`; from `claimed`.

    Args:
        out: The output, absolute.
        overwrite: Whether it replaces shards of ours.
        append: Whether it grows shards of ours.
    """

    out: Path
    overwrite: bool
    append: bool

    @property
    def folder(self) -> Path:
        """The hidden folder."""
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def lock(self) -> Path:
        """The file that is locked."""
        return self.folder / "lock"

    @property
    def aside(self) -> Path:
        """Where the output is for a moment, on file systems that cannot swap folders."""
        return self.folder / "replaced"

    @property
    def plan(self) -> Path:
        """The file that states the plan."""
        return self.folder / "plan.json"

    @property
    def inputs(self) -> Path:
        """The folder of the archive's reader."""
        return self.folder / "inputs"

    @property
    def result(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "result"

    @property
    def _marker(self) -> Path:
        return self.folder / "publishing"

    def part(self, number: int) -> Path:
        """The commit record of a part."""
        return self.folder / "parts" / f"part-{number:06d}.json"

    @property
    def kept(self) -> str | None:
        """What is there to go on with, as a user is told; None: nothing is."""
        if count := len(list(self.folder.glob("parts/part-*.json"))):
            return f"{count} finished parts are kept in {self.folder}; the command that wrote them goes on after them."
        if any(self.inputs.glob("*/*")):
            return f"What was found in the archive's containers is kept in {self.folder}, for the next conversion to {self.out}."
        return None

    @property
    def is_published(self) -> bool:
        """Whether what was done here is at `out` already: the converter was killed while it tidied up."""
        manifest = self.out / MANIFEST
        if not (self._marker.is_file() and self.plan.is_file() and manifest.is_file()):
            return False
        return hashlib.sha256(manifest.read_bytes()).hexdigest() == self._marker.read_text()

    def clear(self) -> None:
        """Removes all but the lock; a crash on the way leaves a folder that is still understood."""
        last = (self._marker, self.plan)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (self.lock, *last):
                path.unlink()
        for path in last:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder; the lock last, so that who takes a new one finds nothing that is still being removed."""
        self.clear()
        self.lock.unlink()
        self.folder.rmdir()

    def prepare(self, plan: bytes) -> None:
        """Makes the folders and states the plan, last, or sweeps what a killed converter left half written."""
        for folder in (self.inputs, self.folder / "parts", self.result):
            folder.mkdir(exist_ok=True)
        self.sweep()
        if not self.plan.exists():
            write_atomically(self.plan, plan)

    def sweep(self) -> None:
        """Removes files that were left half written."""
        for leftover in self.folder.rglob("*.tmp"):
            leftover.unlink()

    def check_output(self) -> None:
        """Raises OutputExistsError unless the output is free, or ours and to be replaced or grown."""
        out = self.out
        if not os.path.lexists(out):
            if self.append:
                raise ConfigError(f"{out} is not there, so nothing can be appended to it; leave --append out to create it.")
            return
        if not (self.overwrite or self.append):
            raise OutputExistsError(
                f"{out} is there already; choose another folder, or pass --overwrite to replace what was written earlier. "
                "tools/shard.py adds to shards with --append."
            )
        if out.is_symlink():
            raise OutputExistsError(f"{out} is a link and is not replaced; give the folder it points to, {out.resolve()}.")
        try:
            read_manifest(out)
        except ShardError as error:
            raise OutputExistsError(f"{out} is not replaced, because it does not look like shards of ours: {error}") from error

    def publish(self) -> None:
        """Puts the result at `out`, in one step."""
        sync_folder(self.result)
        manifest = hashlib.sha256((self.result / MANIFEST).read_bytes()).hexdigest()
        write_atomically(self._marker, manifest.encode())
        failpoint("before_publish")
        if (self.overwrite or self.append) and os.path.lexists(self.out):
            exchange(self.result, self.out, self.aside)
        else:
            try:
                self.result.rename(self.out)
            except OSError as error:
                raise OutputExistsError(
                    f"{self.out} appeared while its content was being written ({error}); another process may write it. Choose "
                    "another folder and run again."
                ) from error
        sync_folder(self.out.parent)
        failpoint("after_publish")


@contextmanager
def claimed(out: str | Path, overwrite: bool = False, append: bool = False, restart: bool = False) -> Iterator[Workplace]:
    """The folder for writing `out`, held against every other converter until the block ends.

    After that committed parts and what took the reader of the archive long are kept, and an error has a note that says so;
    without any, nothing stays.

    Args:
        out: Folder to create.
        overwrite: Whether an earlier output of ours at `out` may be replaced.
        append: Whether an earlier output of ours at `out` is added to.
        restart: Whether what an earlier converter left is thrown away.

    Raises:
        ConfigError: the parent is no folder, or the wishes contradict each other.
        OutputExistsError: another converter is at it; or `out` is there, and is not to be, or must not be, replaced.
    """
    work = Workplace(Path(os.path.abspath(out)), overwrite, append)
    if overwrite and append:
        raise ConfigError("--overwrite and --append contradict each other; give one of them.")
    if not work.out.parent.is_dir():
        raise ConfigError(f"{work.out.parent} is not a folder; create it, or choose another place for the output.")
    descriptor = _lock(work)
    try:
        if work.aside.exists() and not os.path.lexists(work.out):
            work.aside.rename(work.out)
        if restart:
            work.clear()
        if not work.is_published:
            work.check_output()
        work.inputs.mkdir(exist_ok=True)
        yield work
    except BaseException as error:
        work.sweep()
        if work.kept:
            error.add_note(work.kept)
        raise
    finally:
        if not work.kept:
            with suppress(OSError):  # must not hide the error that ended the work
                work.remove()
        os.close(descriptor)


def _lock(work: Workplace) -> int:
    """Makes the folder and locks a file in it; the system undoes the lock when this process ends, however it ends."""
    path = work.lock
    while True:
        try:
            work.folder.mkdir(mode=0o700, exist_ok=True)
            if work.folder.is_symlink():  # what is in the folder is removed: never somewhere else
                raise FileExistsError
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # its owner finished and removed the folder just now
            continue
        except FileExistsError as error:
            raise OutputExistsError(f"{work.folder} is needed as a folder to work in, and is none; remove it.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace")
            os.close(descriptor)
            raise OutputExistsError(
                f"{work.out} is being written by {holder or 'another process'}; wait for it, or choose another folder."
            ) from error
        if _is_at(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
        os.close(descriptor)  # the lock of a folder that was removed meanwhile


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

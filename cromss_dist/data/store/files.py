"""Where the files of a dataset lie on this node, and how one is read that may be a damaged copy."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from cromss_dist.errors import ShardError

MEND = "The file was damaged after it was written; restore it or shard the archive again."

Result = TypeVar("Result")


class ShardFiles(Protocol):
    """The files of a dataset on this node. All calls are thread-safe."""

    @property
    def are_local(self) -> bool:
        """Whether all of them lie on this node already."""

    def open(self, shard: int) -> int:
        """A descriptor to read the file of a shard by, to its end whatever becomes of its name; the caller closes it.

        Raises:
            ShardError: it is missing.
            DownloadError: it cannot be fetched.
        """

    def path(self, shard: int) -> Path:
        """Where it lies, or would: for messages."""

    def discard(self, shard: int) -> bool:
        """Called when bytes of a shard's file are missing or changed: whether a fresh copy can be had by `open`."""


@dataclass(frozen=True)
class LocalFiles:
    """The tars of a folder, which nobody but the user can restore.

    Args:
        folder: Of the dataset.
        names: File name of each shard.
    """

    folder: Path
    names: tuple[str, ...]

    @property
    def are_local(self) -> bool:
        """They are."""
        return True

    @cached_property
    def _paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in self.names)  # once: making a path takes as long as reading a small array

    def open(self, shard: int) -> int:
        """A descriptor of the file of a shard."""
        try:
            return os.open(self._paths[shard], os.O_RDONLY)
        except FileNotFoundError as error:
            raise ShardError(f"{self.path(shard)} is missing. Restore it or shard the archive again.") from error

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._paths[shard]

    def discard(self, shard: int) -> bool:
        """There is no other copy."""
        return False


def read_file(files: ShardFiles, shard: int, read: Callable[[int], Result]) -> Result:
    """Calls `read` with a descriptor of a file; if that raises ShardError, once more with a fresh copy where there is one."""
    try:
        return _read_once(files, shard, read)
    except ShardError:
        if not files.discard(shard):
            raise
    return _read_once(files, shard, read)


def _read_once(files: ShardFiles, shard: int, read: Callable[[int], Result]) -> Result:
    # Opened anew each time: no limit on shards, nothing to close or to share between threads, and microseconds.
    descriptor = files.open(shard)
    try:
        return read(descriptor)
    finally:
        os.close(descriptor)

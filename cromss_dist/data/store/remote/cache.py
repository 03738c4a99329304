"""A folder on this node that keeps the shards of remote datasets, for all of the node's processes.

A file is named by its sha256, so datasets share what they have in common, and has its name once its bytes have that digest.
Whoever needs a file that is not there locks it (flock), looks again and fetches it; the others wait. What was not used
for longest goes when room is needed. Locks are of the operating system: nothing of a process that was killed is in the way.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from cromss_dist.data.staging import atomic_file
from cromss_dist.data.store.remote.remote import Remote
from cromss_dist.errors import ConfigError, ShardError, StorageError

OURS = re.compile(
    r"([0-9a-f]{64})|\.([0-9a-f]{64})\.[0-9a-f]+\.tmp"
)  # a file, one that is being fetched; nothing else is touched
ROOM = "room"  # the lock of whoever counts, makes room or gives a file its name
MAX_LIMIT_GIB = 1e6
POLL_S = 0.02
TOUCH_S = 1.0  # a use within so long of the last one is not noted: a write to the disk for each sample


def default_folder() -> Path:
    """`shards` in `CROMSS_CACHE`, else in `~/.cache/cromss`: encoders that were fetched lie beside it."""
    return Path(os.environ.get("CROMSS_CACHE") or "~/.cache/cromss") / "shards"


@dataclass(frozen=True)
class ShardCache:
    """Fetched files, the last used of them. Threads and processes may share it, and it may be deleted when none does.

    Args:
        folder: On this node's own disk; made at the first use, for its user alone.
        limit_gib: Most that is kept, files that are being fetched included, GiB. Room for what a node reads from at once
            is the least: about 2 shards a lane of the order, see docs/operations.md.

    Raises:
        ConfigError: the limit is not positive, or infinite.
    """

    folder: Path = field(default_factory=default_folder)
    limit_gib: float = 100.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).expanduser().absolute())
        if not 0 < self.limit_gib <= MAX_LIMIT_GIB:
            allowed = f"give more than 0, up to {MAX_LIMIT_GIB:g}"
            raise ConfigError(f"The shard cache's limit of {self.limit_gib} GiB is not allowed; {allowed}.")

    def open(self, remote: Remote, name: str, size: int, sha256: str) -> int:
        """A descriptor to read a file of a remote folder by; the file is fetched where it is not there.

        What is open can be read to its end, also when another needs its room meanwhile: whoever waits for a file gets on,
        however small the limit. The caller closes it.

        Args:
            remote: Where it comes from.
            name: In that folder.
            size: Its bytes.
            sha256: Its digest, hex.

        Raises:
            DownloadError: it cannot be fetched, or has other bytes.
            StorageError: files that are being fetched take all the room, or another process holds its lock for too long.
            ConfigError: it is larger than the limit, or others can write to the cache's folder.
            ShardError: `sha256` is none.
        """
        if (descriptor := self._at_hand(size, sha256)) is not None:
            return descriptor
        _make_folder(self.folder)
        with self._locked(sha256, 2 * remote.patience.deadline_s):  # its holder may wait for room, then for the server
            if (descriptor := self._at_hand(size, sha256)) is not None:
                return descriptor
            self._sweep(sha256)
            with ExitStack() as download:
                file = self._begin(name, size, sha256, download, remote.patience.deadline_s)
                remote.download(name, file, size, sha256)
                file.flush()
                os.fsync(file.fileno())  # here, where nobody waits for it
                with self._locked(ROOM):  # who lists a folder may see a file that is renamed meanwhile twice, or not at all
                    download.close()
            if (descriptor := self._at_hand(size, sha256)) is None:  # under the lock, so that it cannot have made room
                raise StorageError(f"{self.path(sha256)} vanished as soon as it was fetched; see what deletes files there.")
            return descriptor

    def read(self, remote: Remote, name: str, size: int, sha256: str) -> bytes:
        """All bytes of a file, checked; see `open`."""
        with os.fdopen(self.open(remote, name, size, sha256), "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        self.discard(sha256)  # it was damaged here
        with os.fdopen(self.open(remote, name, size, sha256), "rb") as file:
            return file.read()

    def discard(self, sha256: str) -> None:
        """Drops a file whose bytes no longer have its digest; one that has is kept, another process may just have fetched it."""
        path = self.path(sha256)
        with self._locked(sha256), suppress(FileNotFoundError):
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                path.unlink()

    def num_bytes(self) -> int:
        """Bytes of all files, those that are being fetched at their full size."""
        _make_folder(self.folder)
        with self._locked(ROOM):
            return sum(size for _, size, _ in self._listing())

    def _at_hand(self, size: int, sha256: str) -> int | None:
        """The file, open and its use noted, or None where it is not there, a link, of another size or of another user."""
        try:
            descriptor = os.open(self.path(sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                return None
            raise
        status = os.fstat(descriptor)
        if status.st_size != size or status.st_uid != os.geteuid():
            os.close(descriptor)
            return None
        if abs(time.time() - status.st_mtime) > TOUCH_S:
            with suppress(OSError):  # a whole cache may lie on a file system that is read-only
                os.utime(descriptor)
        return descriptor

    def _begin(self, name: str, size: int, sha256: str, download: ExitStack, wait_s: float) -> BinaryIO:
        """A new file of that size which takes its name when `download` ends well, begun once there is room for it."""
        if size > self._limit:
            raise ConfigError(
                f"{name} has {size / 2**30:.3g} GiB, more than the {self.limit_gib:g} GiB of the shard cache {self.folder}; "
                "raise its limit."
            )
        until = time.monotonic() + wait_s
        while True:
            with self._locked(ROOM):
                if self._make_room(size):
                    file = download.enter_context(atomic_file(self.path(sha256)))
                    file.truncate(size)  # takes its room at once, so that others see it
                    return file
            if time.monotonic() > until:
                raise StorageError(
                    f"Files being fetched took all of the {self.limit_gib:g} GiB of the shard cache {self.folder} for "
                    f"{wait_s:g} s, and {name} needs room; raise its limit."
                )
            time.sleep(POLL_S)

    def _make_room(self, size: int) -> bool:
        """Deletes what was not used for longest until `size` bytes fit; returns whether they do."""
        # What is being fetched, or was when its process was killed, first.
        listing = sorted(self._listing(), key=lambda file: (not file[2].startswith("."), file[0]))
        total = sum(num_bytes for _, num_bytes, _ in listing)
        for _, num_bytes, name in listing:
            whole, begun = OURS.fullmatch(name).groups()  # type: ignore[union-attr]  # the listing has no other names
            if whole and total + size <= self._limit:
                continue
            if (lock := self._try_lock(whole or begun)) is None:
                continue  # it is being fetched; what was begun and is not, a process that was killed has left
            try:
                (self.folder / name).unlink(missing_ok=True)
                self._lock_path(whole or begun).unlink()
            finally:
                _unlock(lock)
            total -= num_bytes
        return total + size <= self._limit

    def _sweep(self, sha256: str) -> None:
        """Deletes what killed processes have left of a file; the caller has its lock."""
        for path in self.folder.glob(f".{sha256}.*.tmp"):
            path.unlink(missing_ok=True)

    def _listing(self) -> Iterator[tuple[float, int, str]]:
        """Last use (seconds since 1970), bytes and name of each file."""
        for entry in os.scandir(self.folder):
            if OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime, status.st_size, entry.name

    @property
    def _limit(self) -> int:
        return int(self.limit_gib * 2**30)

    def path(self, sha256: str) -> Path:
        """Where a file lies, or would. Raises ShardError where that is no sha256."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):  # it becomes a file's name
            raise ShardError(f"The manifest states the sha256 {sha256!r}, which is none: 64 digits 0-9, a-f.")
        return self.folder / sha256

    def _lock_path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    @contextmanager
    def _locked(self, name: str, wait_s: float = 600.0) -> Iterator[None]:
        """While no other thread or process is in the same lock's block."""
        until = time.monotonic() + wait_s
        while (lock := self._try_lock(name)) is None:
            if time.monotonic() > until:
                raise StorageError(
                    f"Another process has held {self._lock_path(name)} for {wait_s:g} s; see what it does (`lslocks`), and "
                    "end it."
                )
            time.sleep(POLL_S)
        try:
            yield
        finally:
            _unlock(lock)

    def _try_lock(self, name: str) -> int | None:
        """The descriptor of a lock that is ours from now on, or None where it is another's."""
        path = self._lock_path(name)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):  # or it was deleted with its file, and locks nothing
                return lock
        os.close(lock)
        return None


class RemoteFile(Protocol):
    """What a manifest, or the record of a cube, says of a file."""

    @property
    def name(self) -> str:
        """In the folder of the dataset."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def sha256(self) -> str:
        """Hex."""


@dataclass(frozen=True)
class CachedFiles:
    """The files of a remote dataset, through a cache: where `ShardIndex` and `CubeIndex` find them."""

    remote: Remote
    entries: Sequence[RemoteFile]
    cache: ShardCache

    @property
    def are_local(self) -> bool:
        """Whether a file is here is known once it is asked for."""
        return False

    def open(self, shard: int) -> int:
        """A descriptor of the file, fetched where it is not there, see `ShardCache.open`."""
        entry = self.entries[shard]
        return self.cache.open(self.remote, entry.name, entry.size, entry.sha256)

    def path(self, shard: int) -> Path:
        """Where it is kept."""
        return self.cache.path(self.entries[shard].sha256)

    def discard(self, shard: int) -> bool:
        """Drops the file if it is damaged; True: the next `open` gives a whole one."""
        self.cache.discard(self.entries[shard].sha256)
        return True


def _make_folder(folder: Path) -> None:
    """Makes a cache's folder where it is missing; raises ConfigError where others could put files into it."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(
            f"Others can write to the shard cache {folder} (owner {status.st_uid}, mode {status.st_mode & 0o777:o}); give a "
            "folder of your own, with mode 0700."
        )


def _unlock(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor, too: closing ours is not enough
    os.close(lock)

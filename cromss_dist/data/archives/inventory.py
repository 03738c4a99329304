"""What lies in an archive: every file of a folder and of the containers in it, found once and read many times.

The files of a real archive count in millions, so they are rows of an sqlite file, not objects. An `Inventory` holds
paths only; it can be pickled to other processes, and opens what it needs where it is used.
"""

import hashlib
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cromss_dist.data.sample import Rejected
from cromss_dist.errors import ArchiveMissingError, InputChangedError

MAX_FILE_BYTES = 16 * 2**20  # of one file of an archive; the largest band has 0.3 MB, the largest tile 7 MB
FOLDER = 0  # the `container` of files that lie in no container

# Called with a container's name (or '.', the folder), its bytes (files) listed so far, and its size in bytes (0).
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Match:
    """What a file is to an archive, by its path.

    Args:
        role: 's1', 's2', the name of a value array ('label', ...), 'meta.s1' or 'meta.s2' (a scene's metadata), or
            'locations' (a list of them).
        key: The location; '' for a side file, which belongs to none.
        scene: The scene's name, '' where the path does not say.
        time: Acquisition time, YYYYMMDDTHHMMSS or YYYYMMDD; '' where the path does not say.
        band: The band in this file, '' where one file holds all.
    """

    role: str
    key: str = ""
    scene: str = ""
    time: str = ""
    band: str = ""


@dataclass(frozen=True)
class Entry:
    """A file of an archive, as it was when the inventory was taken.

    Args:
        key: As in `Match`; so are role, scene, time and band.
        role: See `Match`.
        scene: See `Match`.
        time: See `Match`.
        band: See `Match`.
        path: Relative to the archive, with '/'; a member of a container has the path it would be unpacked to.
        container: Number of the container it is in, 0 for a file of the folder.
        offset: First byte of it, or of its record, in the container's bytes.
        size: Bytes.
        packed: Bytes that it takes in a compressing container (zip), else `size`.
        check: CRC-32 that the container gives for it; -1 for none.
        mtime_ns: Time of last change of a file of the folder, 0 in a container.
        problem: A reason and what was found, where it must not be read: it is a link, has conflicting copies, ...
    """

    key: str
    role: str
    scene: str
    time: str
    band: str
    path: str
    container: int
    offset: int
    size: int
    packed: int
    check: int
    mtime_ns: int
    problem: tuple[str, str] | None


class Inventory:
    """The files of an archive by location; made by `take_inventory`."""

    def __init__(self, root: Path, file: Path) -> None:
        self._root = root
        self._file = file
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None

    def __getstate__(self) -> tuple[Path, Path]:
        return self._root, self._file

    def __setstate__(self, state: tuple[Path, Path]) -> None:
        Inventory.__init__(self, *state)

    @property
    def root(self) -> Path:
        """The archive's folder, resolved."""
        return self._root

    @property
    def num_files(self) -> int:
        """Regular files in the folder and its containers, those without a match included."""
        return int(self._fact("num_files"))

    @property
    def num_strays(self) -> int:
        """Files that no match was found for."""
        return sum(self.strays.values())

    @property
    def strays(self) -> dict[str, int]:
        """Files without a match, counted by the first folder of their path ('.' at top level)."""
        return dict(self._rows("SELECT folder, number FROM strays ORDER BY folder"))

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of the matched files of the folder and of all containers."""
        return int(self._fact("size_bytes"))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the paths, sizes and times of matched files and of containers, in the order of their paths."""
        return self._fact("fingerprint")

    @property
    def refused(self) -> dict[str, int]:
        """Entries of the folder and its containers that are no plain file, or badly named, counted by kind."""
        return dict(self._rows("SELECT kind, number FROM refused ORDER BY kind"))

    @property
    def repeated(self) -> dict[str, int]:
        """For each key that has any, the files that were found more than once with the same bytes."""
        return dict(self._rows("SELECT key, number FROM repeated ORDER BY key"))

    @property
    def conflicting(self) -> dict[str, str]:
        """For each key that has any, the first path that was found more than once with other bytes."""
        return dict(self._rows("SELECT key, path FROM conflicting ORDER BY key"))

    def keys(self, role: str) -> Iterator[str]:
        """The locations that have a file of this role, sorted."""
        for (key,) in self._rows("SELECT key FROM keys WHERE role = ? ORDER BY key", role):
            yield key

    def files(self, key: str) -> list[Entry]:
        """The files of a location, sorted by path."""
        return [_entry(row) for row in self._rows("SELECT * FROM files WHERE key = ? ORDER BY path", key)]

    def side_files(self, role: str) -> list[Entry]:
        """The files of this role that belong to no location, sorted by path."""
        return [entry for entry in self.files("") if entry.role == role]

    def read(self, entry: Entry, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The bytes of a file.

        Raises:
            Rejected: path_escape, conflicting_duplicate, too_big, unreadable or truncated.
            InputChangedError: it, or the container it is in, is not what it was when the inventory was taken.
        """
        if entry.problem is not None:
            reason, detail = entry.problem
            raise Rejected(reason, entry.path, detail)
        if entry.size > max_bytes:
            raise Rejected("too_big", entry.path, f"it has {entry.size} bytes; at most {max_bytes} are read")
        return self._read_file(entry)

    def _read_file(self, entry: Entry) -> bytes:
        try:
            descriptor = os.open(self._root / entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise InputChangedError(_changed(entry.path, "is gone")) from error
        except OSError as error:
            raise Rejected("unreadable", entry.path, str(error)) from error
        try:
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (entry.size, entry.mtime_ns):
                raise InputChangedError(_changed(entry.path, f"had {entry.size} bytes and now has {now.st_size}, or a new time"))
            data = os.read(descriptor, entry.size)
        except OSError as error:
            raise Rejected("unreadable", entry.path, str(error)) from error
        finally:
            os.close(descriptor)
        if len(data) != entry.size:
            raise Rejected("truncated", entry.path, f"{len(data)} of its {entry.size} bytes could be read")
        return data

    def _fact(self, name: str) -> str:
        ((value,),) = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return str(value)

    def _rows(self, query: str, *values: str) -> list[Any]:
        with self._lock:
            if self._connection is None or self._pid != os.getpid():  # a connection must not cross a fork
                self._connection = sqlite3.connect(
                    f"{self._file.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
                )
                self._pid = os.getpid()
            return self._connection.execute(query, values).fetchall()


def take_inventory(
    root: Path,
    match: Callable[[str], Match | None],
    work: Path | None,
    allow_partial: bool = False,
    progress: Progress | None = None,
) -> Inventory:
    """Finds every file of an archive and asks `match` what it is.

    Args:
        root: The archive's folder. Containers in it count as unpacked into the folder they lie in.
        match: Says what the file at a path is, None for a stray; a pure function.
        work: Folder for `inventory.sqlite` and what makes a second inventory of the same containers quick; None: a
            private temporary one, gone with the `Inventory`.
        allow_partial: Whether a container that was cut off counts for what is before the cut.
        progress: See `Progress`.

    Raises:
        ArchiveMissingError: `root` is no folder.
        UnreadableInputError: a container is cut off, damaged, or lacks a part.
    """
    root = root.resolve()
    if not root.is_dir():
        raise ArchiveMissingError(f"{root} is not a folder; give the folder that holds the archive.")
    private = work is None
    if work is None:
        work = Path(tempfile.mkdtemp(prefix="cromss-inventory-"))  # mode 0700
    work.mkdir(parents=True, exist_ok=True)
    try:
        file = work / "inventory.sqlite"
        _fill(file, root, match, progress)
        inventory = Inventory(root, file)
    except BaseException:
        if private:
            shutil.rmtree(work, ignore_errors=True)
        raise
    if private:
        weakref.finalize(inventory, shutil.rmtree, work, ignore_errors=True)
    return inventory


_TABLES = """
CREATE TABLE files (key TEXT, role TEXT, scene TEXT, time TEXT, band TEXT, path TEXT, container INTEGER, offset INTEGER,
    size INTEGER, packed INTEGER, "check" INTEGER, mtime_ns INTEGER, reason TEXT, detail TEXT, PRIMARY KEY (key, path)) WITHOUT ROWID;
CREATE TABLE keys (role TEXT, key TEXT, PRIMARY KEY (role, key)) WITHOUT ROWID;
CREATE TABLE facts (name TEXT, value TEXT);
CREATE TABLE strays (folder TEXT, number INTEGER);
CREATE TABLE refused (kind TEXT, number INTEGER);
CREATE TABLE repeated (key TEXT, number INTEGER);
CREATE TABLE conflicting (key TEXT, path TEXT);
"""


def _fill(file: Path, root: Path, match: Callable[[str], Match | None], progress: Progress | None) -> None:
    file.unlink(missing_ok=True)
    digest, strays, num_files, size_bytes = hashlib.sha256(), Counter[str](), 0, 0
    connection = sqlite3.connect(file)
    connection.executescript(_TABLES)
    for path, size, mtime_ns in sorted(_walk(root)):
        num_files += 1
        found = match(path)
        if found is None:
            strays[path.split("/")[0] if "/" in path else "."] += 1
            continue
        size_bytes += size
        digest.update(f"{path}\0{size}\0{mtime_ns}\n".encode())
        entry = (
            found.key,
            found.role,
            found.scene,
            found.time,
            found.band,
            path,
            FOLDER,
            0,
            size,
            size,
            -1,
            mtime_ns,
            None,
            None,
        )
        connection.execute(f"INSERT INTO files VALUES ({','.join('?' * len(entry))})", entry)
    connection.execute("INSERT INTO keys SELECT DISTINCT role, key FROM files WHERE key != ''")
    connection.executemany("INSERT INTO strays VALUES (?, ?)", strays.items())
    facts = {"num_files": num_files, "size_bytes": size_bytes, "fingerprint": digest.hexdigest()}
    connection.executemany("INSERT INTO facts VALUES (?, ?)", [(name, str(value)) for name, value in facts.items()])
    connection.commit()
    connection.close()


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    for folder, _, names in os.walk(root):
        for name in names:
            full = Path(folder, name)
            status = full.lstat()
            if stat.S_ISREG(status.st_mode):
                yield full.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns


def _entry(row: tuple[Any, ...]) -> Entry:
    *facts, reason, detail = row
    return Entry(*facts, problem=None if reason is None else (reason, detail))


def _changed(path: str, how: str) -> str:
    return (
        f"{path} {how} since the archive was opened; leave the archive alone while it is converted, and begin again with "
        "--restart."
    )

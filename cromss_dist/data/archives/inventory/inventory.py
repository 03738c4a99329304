"""What lies in an archive: every file of a folder and of the containers in it, found once and read many times.

The files of a real archive count in millions, so they are rows of an sqlite file, not objects. An `Inventory` holds
paths only; it can be pickled to other processes, and opens what it needs where it is used.
"""

import json
import os
import shutil
import sqlite3
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cromss_dist.data.archives.inventory.containers import Container, ContainerReader, Part, changed
from cromss_dist.data.archives.inventory.entries import Entry, Match
from cromss_dist.data.archives.inventory.listing import FOLDER, Progress, index_path, scratch
from cromss_dist.data.archives.inventory.tables import TABLES, find_files, sum_up
from cromss_dist.data.archives.inventory.tar import Damaged
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import ArchiveMissingError, InputChangedError

MAX_FILE_BYTES = 16 * 2**20  # of one file of an archive; the largest band has 0.3 MB, the largest tile 7 MB
MAX_OPEN_CONTAINERS = 64


class Inventory:
    """The files of an archive by location; made by `take_inventory`."""

    def __init__(self, root: Path, file: Path) -> None:
        self._root = root
        self._file = file
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        self._readers: dict[int, ContainerReader] = {}

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
        """Bytes on disk of the matched files of the folder and of the containers that hold a matched file."""
        return int(self._fact("size_bytes"))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over paths, sizes and times of the matched files and of the containers they are in."""
        return self._fact("fingerprint")

    @property
    def refused(self) -> dict[str, int]:
        """Entries of the folder and its containers that are no plain file, or badly named, counted by kind (see `Found`)."""
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
        try:
            if entry.container == FOLDER:
                return _read_file(self._root, entry)
            with self._lock:
                return self._container(entry.container).read(entry.offset, entry.size, entry.packed, entry.check)
        except (OSError, Damaged) as error:
            raise Rejected("unreadable", entry.path, str(error)) from error

    def _container(self, number: int) -> ContainerReader:
        connection = self._connect()  # first: it forgets what was opened before a fork
        if number not in self._readers:
            if len(self._readers) >= MAX_OPEN_CONTAINERS:
                self._readers.pop(next(iter(self._readers))).close()
            ((record,),) = connection.execute("SELECT record FROM containers WHERE number = ?", (number,))
            fields = json.loads(record)
            container = Container(fields["path"], fields["kind"], tuple(Part(**part) for part in fields["parts"]))
            self._readers[number] = ContainerReader(container, self._root, index_path(container, self._file.parent))
        return self._readers[number]

    def _fact(self, name: str) -> str:
        ((value,),) = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return str(value)

    def _rows(self, query: str, *values: str) -> list[Any]:
        with self._lock:
            return self._connect().execute(query, values).fetchall()

    def _connect(self) -> sqlite3.Connection:
        if self._pid != os.getpid():  # nothing that was opened before a fork may be used or closed after it
            _FORKED.append((self._connection, self._readers))
            self._pid, self._connection, self._readers = os.getpid(), None, {}
        if self._connection is None:
            self._connection = sqlite3.connect(_read_only(self._file), uri=True, check_same_thread=False)
        return self._connection


_FORKED: list[Any] = []


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
        work: Folder for `inventory.sqlite`, which takes the place of an earlier one, and for what makes a second
            inventory of the same containers quick; None: a private temporary one, gone with the `Inventory`.
        allow_partial: Whether a container that was cut off counts for what is before the cut.
        progress: See `Progress`.

    Raises:
        ArchiveMissingError: `root` is no folder.
        UnreadableInputError: a container is cut off, damaged, or lacks a part.
        InputChangedError: a container changes meanwhile.
        StorageError: the disk is full, or refuses a file.
    """
    root = root.resolve()
    if not root.is_dir():
        raise ArchiveMissingError(f"{root} is not a folder; give the folder that holds the archive.")
    private = work is None
    work = Path(tempfile.mkdtemp(prefix="cromss-inventory-")) if work is None else work.resolve()  # mkdtemp: mode 0700
    work.mkdir(parents=True, exist_ok=True)
    try:
        fresh, final = work / "inventory.tmp", work / "inventory.sqlite"
        with scratch(fresh, final) as connection:
            connection.executescript(TABLES)
            find_files(connection, root, match, work, allow_partial, progress)
            connection.commit()
            _settle_repeats(connection, Inventory(root, fresh))
            sum_up(connection)
        inventory = Inventory(root, final)
    except BaseException:
        if private:
            shutil.rmtree(work, ignore_errors=True)
        raise
    if private:
        weakref.finalize(inventory, shutil.rmtree, work, ignore_errors=True)
    return inventory


def _settle_repeats(connection: sqlite3.Connection, inventory: Inventory) -> None:
    """Keeps one row of a path that was found more than once, and marks it where the bytes differ."""
    connection.execute(
        "CREATE TEMP TABLE repeats AS SELECT key, path, COUNT(*) AS number FROM files GROUP BY key, path HAVING number > 1"
    )
    same: Counter[str] = Counter()
    for key, path, number in connection.execute("SELECT key, path, number FROM repeats"):
        rows = connection.execute("SELECT * FROM files WHERE key = ? AND path = ? ORDER BY container, offset", (key, path))
        first, *others = map(_entry, rows.fetchall())
        connection.execute(
            "DELETE FROM files WHERE key = ? AND path = ? AND (container, offset) != (?, ?)",
            (key, path, first.container, first.offset),
        )
        if all(_same_bytes(inventory, first, other) for other in others):
            same[key] += number - 1
            continue
        connection.execute(
            "UPDATE files SET reason = 'conflicting_duplicate', detail = ? WHERE key = ? AND path = ?",
            (f"it was found {number} times, with different bytes", key, path),
        )
        connection.execute("INSERT INTO conflicting SELECT ?1, ?2 WHERE ?1 NOT IN (SELECT key FROM conflicting)", (key, path))
    connection.executemany("INSERT INTO repeated VALUES (?, ?)", same.items())


def _same_bytes(inventory: Inventory, first: Entry, other: Entry) -> bool:
    if first.size != other.size:
        return False
    try:
        return inventory.read(first) == inventory.read(other)
    except Rejected:
        return False


def _entry(row: tuple[Any, ...]) -> Entry:
    *facts, reason, detail = row
    fields = (*facts, None if reason is None else (reason, detail))
    return Entry(*fields)


def _read_file(root: Path, entry: Entry) -> bytes:
    try:
        descriptor = os.open(f"{root}/{entry.path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise InputChangedError(changed(entry.path, "is gone")) from error
    try:
        now = os.fstat(descriptor)
        if (now.st_size, now.st_mtime_ns) != (entry.size, entry.mtime_ns):
            raise InputChangedError(changed(entry.path, f"had {entry.size} bytes and now has {now.st_size}, or a new time"))
        data = os.read(descriptor, entry.size)
    finally:
        os.close(descriptor)
    if len(data) != entry.size:
        raise Rejected("truncated", entry.path, f"{len(data)} of its {entry.size} bytes could be read")
    return data


def _read_only(file: Path) -> str:
    return f"{file.as_uri()}?mode=ro&immutable=1"

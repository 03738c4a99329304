"""The sqlite tables of an inventory, and how they are filled: a row a file, whatever their number in bounded memory."""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from cromss_dist.data.archives.inventory.containers import Part
from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.inventory.listing import FOLDER, Found, Progress, assemble_all, list_container, walk

MAX_STRAY_FOLDERS = 1000  # that are counted one by one; the others together, as '...'

# Why an entry of this kind is not read: a reason of the ledger and what was found.
REFUSED = {
    "symlink": ("path_escape", "it is a symbolic link, and in a folder one that leaves the archive"),
    "hardlink": ("path_escape", "it is a hard link in a container"),
    "device": ("unreadable", "it is a device, a pipe or a socket"),
    "sparse": ("unreadable", "it is stored as a sparse file"),
    "encrypted": ("unreadable", "it is encrypted"),
    "other": ("unreadable", "it is stored in a way that is not read"),
}

TABLES = """
CREATE TABLE files (key TEXT, role TEXT, scene TEXT, time TEXT, band TEXT, path TEXT, container INTEGER, offset INTEGER,
    size INTEGER, packed INTEGER, crc INTEGER, mtime_ns INTEGER, reason TEXT, detail TEXT,
    PRIMARY KEY (key, path, container, offset)) WITHOUT ROWID;
CREATE TABLE containers (number INTEGER PRIMARY KEY, record TEXT, size INTEGER);
CREATE TABLE keys (role TEXT, key TEXT, PRIMARY KEY (role, key)) WITHOUT ROWID;
CREATE TABLE facts (name TEXT, value TEXT);
CREATE TABLE strays (folder TEXT, number INTEGER);
CREATE TABLE refused (kind TEXT, number INTEGER);
CREATE TABLE repeated (key TEXT, number INTEGER);
CREATE TABLE conflicting (key TEXT, path TEXT);
"""


def find_files(
    connection: sqlite3.Connection,
    root: Path,
    match: Callable[[str], Match | None],
    work: Path,
    allow_partial: bool,
    progress: Progress | None,
) -> None:
    """Fills `files` with all that match, repeats included, and counts the others."""
    parts: dict[str, dict[str, Part]] = {}
    num_files, strays, refused = 0, Counter[str](), Counter[str]()

    def matched(founds: Iterable[Found]) -> Iterator[tuple[Any, ...]]:
        nonlocal num_files
        for found in founds:
            num_files += found.kind == "file"
            if found.kind != "file":
                refused[found.kind] += 1
            known = match(found.path) if found.kind == "file" or found.kind in REFUSED else None
            if known is not None:
                what = (known.key, known.role, known.scene, known.time, known.band, found.path)
                where = (found.container, found.offset, found.size, found.packed, found.check, found.mtime_ns)
                yield *what, *where, *REFUSED.get(found.kind, (None, None))
            elif found.kind == "file":
                folder = found.path.split("/")[0] if "/" in found.path else "."
                strays[folder if folder in strays or len(strays) < MAX_STRAY_FOLDERS else "..."] += 1

    def in_folder() -> Iterator[Found]:
        for found in walk(root, work, progress):
            if isinstance(found, Found):
                yield found
            else:
                path, suffix, part = found
                parts.setdefault(path, {})[suffix] = part

    insert = f"INSERT INTO files VALUES ({', '.join('?' * 14)})"
    connection.executemany(insert, matched(in_folder()))
    containers = assemble_all(parts)
    records = [(number, json.dumps(asdict(container)), container.size) for number, container in enumerate(containers, start=1)]
    connection.executemany("INSERT INTO containers VALUES (?, ?, ?)", records)
    for number, container in enumerate(containers, start=1):
        members = list_container(container, number, root, work, allow_partial, progress)
        connection.executemany(insert, matched(members))
    connection.executemany("INSERT INTO strays VALUES (?, ?)", strays.items())
    connection.executemany("INSERT INTO refused VALUES (?, ?)", refused.items())
    connection.execute("INSERT INTO facts VALUES ('num_files', ?)", (str(num_files),))


def sum_up(connection: sqlite3.Connection) -> None:
    """Fills `keys`, and `facts` with size and fingerprint."""
    connection.execute("INSERT INTO keys SELECT DISTINCT role, key FROM files WHERE key != ''")
    used = "WHERE number IN (SELECT DISTINCT container FROM files)"
    digest = hashlib.sha256()
    for row in chain(
        connection.execute(f"SELECT record FROM containers {used} ORDER BY number"),
        connection.execute("SELECT path, size, mtime_ns FROM files ORDER BY key, path"),
    ):
        digest.update(repr(row).encode())
    total = f"SELECT (SELECT TOTAL(size) FROM files WHERE container = {FOLDER}) + (SELECT TOTAL(size) FROM containers {used})"
    ((size_bytes,),) = connection.execute(total)
    facts = (("size_bytes", str(int(size_bytes))), ("fingerprint", digest.hexdigest()))
    connection.executemany("INSERT INTO facts VALUES (?, ?)", facts)

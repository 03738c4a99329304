"""Every file of an archive's folder and of the containers in it, one after the other, none of them trusted by its name."""

import errno
import os
import posixpath
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from cromss_dist.data.archives.inventory.containers import Container, Part, assemble, container_name, members
from cromss_dist.data.archives.inventory.tar import Cut, Damaged
from cromss_dist.errors import StorageError, UnreadableInputError

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096
MAX_MEMBERS = 10**8  # of one container; SSL4EO-S12 has 14 million files
FOLDER = 0  # the container number of files that lie in none

# Called with a container's path (or '.', the folder), its bytes (files) listed so far, and its size in bytes (0).
Progress: TypeAlias = Callable[[str, int, int], None]


class Found(NamedTuple):
    """A file of an archive, or what is in a file's place.

    Args:
        path: Relative to the archive, as it would be unpacked.
        kind: 'file'; 'truncated' for the end of a cut container; or why it must not be read: a kind of `Member`,
            'absolute', 'dotdot', 'long_name', 'bad_name' (no UTF-8, or control characters).
        container: 0 for the folder, else the container's number.
        offset: See `Member`; so are size, packed and check.
        size: Bytes.
        packed: Bytes it takes.
        check: CRC-32 or -1.
        mtime_ns: Of a file of the folder, else 0.
    """

    path: str
    kind: str
    container: int = FOLDER
    offset: int = 0
    size: int = 0
    packed: int = 0
    check: int = -1
    mtime_ns: int = 0


def walk(root: Path, besides: Path, progress: Progress | None) -> Iterator[Found | tuple[str, str, Part]]:
    """Files below `root`, but for hidden folders and `besides`; a container's part as (path, suffix, part).

    No folder is entered through a link; a link to a file counts as the file where that lies in `root`.
    """
    folders, seen = [""], 0
    base, hidden = os.path.join(root, ""), str(besides)  # texts: to join paths as objects would take most of the time
    while folders:
        folder = folders.pop()
        with os.scandir(base + folder) as entries:
            for entry in entries:
                path = folder + entry.name
                is_plain = path.isascii() and path.isprintable() and len(path) <= MAX_NAME_BYTES
                kind = "file" if is_plain else _kind_of_name(os.fsencode(path))
                if kind == "file" and entry.is_symlink() and not _is_file_inside(root, path):
                    kind = "symlink"
                if kind == "file" and entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(".") and base + path != hidden:
                        folders.append(f"{path}/")
                    continue
                if kind == "file" and not entry.is_file():
                    kind = "device"
                if kind != "file":
                    yield Found(path if kind != "bad_name" else repr(path), kind)
                    continue
                status = entry.stat()
                named = container_name(entry.name)
                if named is not None:
                    yield folder + named[0], named[1], Part(path, status.st_size, status.st_mtime_ns)
                    continue
                seen += 1
                if progress is not None and seen % 1000 == 0:
                    progress(".", seen, 0)
                yield Found(path, "file", size=status.st_size, packed=status.st_size, mtime_ns=status.st_mtime_ns)


def assemble_all(parts: dict[str, dict[str, Part]]) -> tuple[Container, ...]:
    """Containers in the order of their paths, from their parts by path and suffix. Raises UnreadableInputError as `assemble`."""
    containers = []
    for path, by_suffix in sorted(parts.items()):
        whole = by_suffix.pop("", None)
        if whole is not None:
            containers.append(assemble(path, {"": whole}))
        if by_suffix:
            containers.append(assemble(path, by_suffix))
    return tuple(containers)


def list_container(
    container: Container, number: int, root: Path, work: Path, allow_partial: bool, progress: Progress | None
) -> Iterator[Found]:
    """What is in a container; listed once, then taken from what `work` keeps about it.

    Raises:
        UnreadableInputError: it is damaged, or cut off and `allow_partial` is false.
        InputChangedError: it changes meanwhile.
    """
    kept = listing_path(container, work)
    if not kept.exists():
        _keep_listing(container, root, kept, progress)
    connection = sqlite3.connect(f"{kept.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        for (why,) in connection.execute("SELECT why FROM cut"):
            if not allow_partial:
                raise UnreadableInputError(
                    f"{container.path} is cut off: {why}. Fetch it again, or take what is before the cut with --allow-partial."
                )
            yield Found(container.path, "truncated", number)
        beside = container.path[: container.path.rfind("/") + 1]
        for name, kind, *where in connection.execute("SELECT name, kind, offset, size, packed, crc FROM members"):
            path, what = _unpacked_path(beside, name)
            yield Found(path, kind if what == "file" else what, number, *where)
    finally:
        connection.close()


def index_path(container: Container, work: Path) -> Path:
    """Where the seek index of a compressed tar is kept."""
    return work / "containers" / f"{container.digest}.index"


def listing_path(container: Container, work: Path) -> Path:
    """Where the members of a container are kept."""
    return work / "containers" / f"{container.digest}.members"


def _keep_listing(container: Container, root: Path, kept: Path, progress: Progress | None) -> None:
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    with scratch(kept.with_suffix(".tmp"), kept) as connection:  # its index is there by then
        connection.execute(
            "CREATE TABLE members (name BLOB, kind TEXT, offset INTEGER, size INTEGER, packed INTEGER, crc INTEGER)"
        )
        connection.execute("CREATE TABLE cut (why TEXT)")
        told = None if progress is None else lambda done: progress(container.path, done, container.size)
        try:
            for number, member in enumerate(members(container, root, kept.with_suffix(".index"), told)):
                if number >= MAX_MEMBERS:
                    raise Damaged(f"it has more than {MAX_MEMBERS} members")
                row = (member.name, member.kind, member.offset, member.size, member.packed, member.check)
                connection.execute("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?)", row)
        except Cut as cut:
            connection.execute("INSERT INTO cut VALUES (?)", (str(cut),))
        except Damaged as damage:
            raise UnreadableInputError(
                f"{container.path} is cut off or damaged: {damage}. Fetch it again or take it away"
                + ("; `gzip -dc` saves what is before that as a tar." if container.kind == "tar.gz" else ".")
            ) from damage


@contextmanager
def scratch(path: Path, final: Path) -> Iterator[sqlite3.Connection]:
    """A new sqlite file at `path` that gets its name once it is complete and on disk, and needs no protection until then.

    Raises:
        StorageError: the disk is full, or refuses it.
    """
    path.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(path)
        try:
            connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;")
            yield connection
            connection.commit()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:  # sqlite does not say of which file
        path.unlink(missing_ok=True)
        raise StorageError.of(OSError(errno.EIO, str(error), str(path))) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(final)


def _is_file_inside(root: Path, path: str) -> bool:
    target = os.path.realpath(root / path)
    return Path(target).is_relative_to(root) and stat.S_ISREG(os.stat(target).st_mode) if os.path.exists(target) else False


def _unpacked_path(beside: str, name: bytes) -> tuple[str, str]:
    """The path a member would be unpacked to, and 'file' or what is wrong with its name."""
    kind = _kind_of_name(name)
    if kind != "file":
        return repr(name[:MAX_NAME_BYTES]), kind
    return beside + posixpath.normpath(name.decode()), kind


def _kind_of_name(name: bytes) -> str:
    pieces = name.split(b"/")
    if name.startswith(b"/"):
        return "absolute"
    if b".." in pieces:
        return "dotdot"
    if len(name) > MAX_PATH_BYTES or max(map(len, pieces)) > MAX_NAME_BYTES:
        return "long_name"
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return "bad_name"
    return "file" if text and min(text) >= " " else "bad_name"

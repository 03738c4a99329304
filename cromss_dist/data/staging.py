"""Files and folders that appear whole or not at all: what archives, shards and manifests are written through."""

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cromss_dist.errors import OutputExistsError
from cromss_dist.failpoint import failpoint

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, linux/fs.h


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A fresh hidden sibling of `out` that takes its place when the block ends well, and vanishes when it does not.

    What was at `out` is removed after that; the caller has checked that it may be.

    Raises:
        OutputExistsError: another process has put something at `out` meanwhile.
    """
    token = secrets.token_hex(8)
    fresh, old = out.with_name(f".{out.name}.{token}"), out.with_name(f".{out.name}.{token}.replaced")
    fresh.mkdir()
    try:
        yield fresh
        sync_folder(fresh)
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError as error:
            if old.exists():
                with suppress(OSError):
                    old.rename(out)
            raise OutputExistsError(
                f"{out} appeared while its content was being written ({error}); another process may write it. Choose another "
                "folder and run again."
            ) from error
        sync_folder(out.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # must not hide the error that ended the work
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def atomic_file(path: Path, check: Callable[[Path], object] = lambda _: None) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the name `path` when the block ends well, and vanishes when it does not.

    By then its bytes are on disk and `check`, called with its temporary path, has not raised. A file that was at `path` is
    replaced. Writers of the same path do not disturb each other: the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file:
            failpoint("after_open")
            yield file
            file.flush()
            failpoint("before_fsync")
            os.fsync(file.fileno())
        failpoint("after_fsync")
        check(temporary)
        failpoint("before_replace")
        temporary.replace(path)
        sync_folder(path.parent)
        failpoint("after_replace")
    except OSError as error:
        error.filename = error.filename or str(path)  # a refused write does not say where
        raise
    finally:
        with suppress(OSError):  # must not hide the error that ended the work
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Puts a file of these bytes at `path`, whole and on disk, or raises and leaves what was there."""
    with atomic_file(path) as file:
        file.write(data)


def exchange(one: Path, other: Path, aside: Path) -> None:
    """Swaps two folders, so that who looks at either name finds one or the other; what was `other` ends at `one`.

    On file systems that cannot do it in one step (NFS) there is a moment without `other`; a crash then leaves it at `aside`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with suppress(AttributeError):  # a C library without it
        done = libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
        if done == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

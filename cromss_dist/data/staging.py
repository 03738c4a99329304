"""A folder that appears whole or not at all: both archives and shards are written through it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cromss_dist.errors import OutputExistsError


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
        _sync_folder(fresh)
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
        _sync_folder(out.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # must not hide the error that ended the work
    if old.exists():
        shutil.rmtree(old)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Conversions of fake archives that are killed, in processes of their own; what is on disk afterwards."""

import hashlib
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cromss_dist.data.conversion.convert import convert
from tests.data.fake_source import FakeSource
from tests.forkserver import FORKSERVER, preload

preload("tests.data.conversions")

SMALL = {"shard_size_mib": 0.1, "max_reject_fraction": 0.5, "write": "both"}
"""Three locations of 24 px a part."""


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(out: Path, source: FakeSource, place: str = "", **options: Any) -> BaseProcess:
    """A converter that kills itself at a failpoint, if there is one."""
    process = FORKSERVER.Process(target=_convert, args=(out, source, place, {**SMALL, **options}))
    process.start()
    return process


def _convert(out: Path, source: FakeSource, place: str, options: dict[str, Any]) -> None:
    os.environ["CROMSS_FAILPOINT"] = place
    convert(source, out, **options)


def killed_at(out: Path, source: FakeSource, place: str, **options: Any) -> None:
    """A converter that did kill itself."""
    process = start(out, source, place, **options)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"{place} was not reached"

"""Reading a checkpoint: nothing of it is used before the whole of it has verified.

Layer 3. Files are safetensors and JSON: no byte of them can run code.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from cromss_dist.errors import CheckpointError
from cromss_dist.train.checkpoint.record import MAX_RECORD_BYTES, RECORD, Json, Record, Share, unseal


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has verified.

    Args:
        step: Optimiser steps taken when it was saved.
        state: What is not a tensor; JSON types.
        tensors: By name, on the CPU, of all ranks that wrote; each is read (mapped into memory) when asked for, and its bytes
            may be changed without changing the file.
        folder: Where it lies.
        world_size: Number of ranks that wrote it.
    """

    step: int
    state: Json
    tensors: Mapping[str, Tensor]
    folder: Path
    world_size: int


class SharedTensors(Mapping[str, Tensor]):
    """The tensors of several safetensors files, which have no name in common.

    Args:
        paths: Must have verified.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._of: dict[str, Any] = {}
        for path in paths:
            file: Any = safetensors.safe_open(path, framework="pt")
            self._of.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._of))

    def __len__(self) -> int:
        return len(self._of)


def read_record(folder: Path, owner: int) -> Record:
    """The record of a checkpoint, after all checks but that of the bytes of its shares.

    Args:
        folder: Of the checkpoint, named by its step.
        owner: User id that must own the folder and its files.

    Raises:
        CheckpointError: it does not verify; the message is the reason.
    """
    _require_owned(folder, owner, stat.S_ISDIR, "a folder")
    size = _require_owned(folder / RECORD, owner, stat.S_ISREG, "a regular file")
    if size > MAX_RECORD_BYTES:
        raise CheckpointError(f"{RECORD} has {size} bytes; at most {MAX_RECORD_BYTES} are read")
    try:
        content = unseal((folder / RECORD).read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{RECORD} {error}") from None
    except OSError as error:
        raise CheckpointError(f"{RECORD} cannot be read ({error.strerror})") from None
    record = Record.from_json(content)
    if folder.name != step_name(record.step):
        raise CheckpointError(f"{RECORD} is of step {record.step}")
    for share in record.shares:
        size = _require_owned(folder / share.name, owner, stat.S_ISREG, "a regular file")
        if size != share.size:
            raise CheckpointError(f"{share.name} has {size} bytes, {RECORD} states {share.size}")
    return record


def verify_share(folder: Path, share: Share) -> bool:
    """Whether a file can be read and has the bytes that were written."""
    try:
        with open(folder / share.name, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == share.sha256
    except OSError:
        return False


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:07d}"


def _require_owned(path: Path, owner: int, is_kind: Any, kind: str) -> int:
    """The size of a file or folder in bytes; raises CheckpointError where it is a link, another's, or missing."""
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be found ({error.strerror})") from None
    if not is_kind(status.st_mode):  # a link could point anywhere
        raise CheckpointError(f"{path.name} is not {kind}")
    if status.st_uid != owner:
        raise CheckpointError(f"{path.name} belongs to user {status.st_uid}, not to {owner}")
    return status.st_size

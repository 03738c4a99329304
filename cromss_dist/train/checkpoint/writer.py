"""Writing a checkpoint: each rank its share and its vote, rank 0 the commit record.

Layer 3. No collective calls: all of it runs on threads beside the training, which agrees on nothing here.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from cromss_dist import __version__
from cromss_dist.data.staging import atomic_file, write_atomically
from cromss_dist.errors import CheckpointError
from cromss_dist.failpoint import failpoint
from cromss_dist.train.checkpoint.record import RECORD, Json, Record, Share, Vote, seal, share_name, vote_name

GRACE_S = 10.0  # for what another node has written to show on a network disk
_POLL_S = 0.05
_CHUNK_BYTES = 16 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_share(staging: Path, rank: int, world_size: int, tensors: Mapping[str, Tensor]) -> Vote:
    """Writes one rank's tensors in safetensors format, hashed as they are written, and waits until they are on disk.

    Departs: safetensors' own writer would need a second pass over the file for the hash.

    Args:
        staging: Folder of the saving.
        rank: This rank.
        world_size: Number of ranks.
        tensors: On the CPU.

    Returns:
        What to vote.

    Raises:
        OSError: the file is refused; nothing of it stays.
    """
    # Widest first, as safetensors does it: every tensor is aligned, and can be used where it is mapped.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    path = staging / share_name(rank, world_size)
    with atomic_file(path) as file, ThreadPoolExecutor(1, "checkpoint-hash") as hasher:
        for chunk in (memoryview(len(text).to_bytes(8, "little") + text), *map(_bytes_of, map(tensors.__getitem__, names))):
            for start in range(0, len(chunk), _CHUNK_BYTES):
                part = chunk[start : start + _CHUNK_BYTES]
                hashed = hasher.submit(digest.update, part)  # both let go of the interpreter
                file.write(part)
                hashed.result()
            failpoint("checkpoint_mid_share")
    return Vote(Share(path.name, 8 + len(text) + end, digest.hexdigest()), tuple(names))


def cast_vote(staging: Path, rank: int, world_size: int, vote: Vote) -> None:
    """Tells rank 0 what became of a share.

    Raises:
        OSError: the file is refused; rank 0 takes a missing vote as a no.
    """
    failpoint("checkpoint_before_vote")
    write_atomically(staging / vote_name(rank, world_size), vote.encode())
    failpoint("checkpoint_voted")


def commit(staging: Path, step: int, state: Json, vote: Vote, world_size: int, all_ended: Event) -> None:
    """Rank 0: waits for the votes of the other ranks and, where each is a yes, writes the commit record.

    Args:
        staging: Folder of the saving.
        step: Optimiser steps taken.
        state: What is not a tensor; JSON types.
        vote: Rank 0's own.
        world_size: Number of ranks.
        all_ended: Set once every rank has done what it can: a vote that does not show soon after will not come. Until then
            there is no limit, because a slow disk is no failure and a folder must not vanish under who writes in it.

    Raises:
        CheckpointError: a rank voted no, or not at all, or the shares do not fit together; the message is the reason.
        OSError: the record is refused.
    """
    votes = [vote, *(_await_vote(staging, rank, world_size, all_ended) for rank in range(1, world_size))]
    if errors := [f"rank {rank}: {vote.error}" for rank, vote in enumerate(votes) if vote.error]:
        raise CheckpointError("; ".join(errors))
    shares = tuple(vote.share for vote in votes if vote.share)
    for share in shares:
        size = (staging / share.name).stat().st_size
        if size != share.size:
            raise CheckpointError(f"{share.name} has {size} bytes on disk, of {share.size} written")
    names = [name for vote in votes for name in vote.tensors]
    if len(set(names)) < len(names):
        raise CheckpointError("two ranks gave tensors of the same name")
    packages = ("torch", "safetensors", "deepspeed")
    versions = {"cromss_dist": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
    for rank in range(1, world_size):
        (staging / vote_name(rank, world_size)).unlink()
    failpoint("checkpoint_before_record")
    write_atomically(staging / RECORD, seal(Record(step, state, shares, versions).to_json()))
    failpoint("checkpoint_recorded")


def appears(path: Path, seconds: float) -> bool:
    """Waits for what another node has made to show on a network disk; whether it did."""
    deadline = time.monotonic() + seconds
    # Opening the folder makes an NFS client ask again; looking for the name alone may be answered from its memory.
    while path.name not in os.listdir(path.parent):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _await_vote(staging: Path, rank: int, world_size: int, all_ended: Event) -> Vote:
    path = staging / vote_name(rank, world_size)
    while not appears(path, 0):
        if all_ended.wait(_POLL_S):
            if appears(path, GRACE_S):
                break
            raise CheckpointError(f"rank {rank} left no word on its share")
    return Vote.decode(path.read_bytes())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

"""What is written beside a checkpoint's tensors: each rank's vote, and the commit record that makes it one.

Layer 3. Both are JSON sealed with its own sha256, so that any changed byte is found before a byte is parsed.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

from cromss_dist.errors import CheckpointError

Json = dict[str, Any]

RECORD = "checkpoint.json"
MAX_RECORD_BYTES = 64 << 20
_SCHEMA = 1
_SEALED = b'{"content":%b,"sha256":"%b"}\n'
_HEAD, _TAIL = len(b'{"content":'), len(b',"sha256":""}\n') + 64
_SHA256 = re.compile("[0-9a-f]{64}")


def share_name(rank: int, world_size: int) -> str:
    """The file that one rank writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def vote_name(rank: int, world_size: int) -> str:
    """The file by which a rank tells what became of its share."""
    return f"rank-{rank:05d}-of-{world_size:05d}.vote.json"


@dataclass(frozen=True)
class Share:
    """What one rank has written: `size` in bytes, `sha256` in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Vote:
    """A rank's word on its share: the share and the names of its tensors, or the error that kept it from being written."""

    share: Share | None
    tensors: tuple[str, ...] = ()
    error: str = ""

    def encode(self) -> bytes:
        """The file's bytes."""
        return seal(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Self:
        """From the file's bytes.

        Raises:
            CheckpointError: they are not what `encode` gave.
        """
        content = unseal(text)
        try:
            share = Share(**content["share"]) if content["share"] else None
            return cls(share, tuple(content["tensors"]), content["error"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"is no vote ({error!r})") from None


@dataclass(frozen=True)
class Record:
    """The commit record: written last, it states every file of the checkpoint.

    Args:
        step: Optimiser steps taken.
        state: What is not a tensor; JSON types.
        shares: In the order of ranks.
        versions: Of the packages that wrote it, by name.
    """

    step: int
    state: Json
    shares: tuple[Share, ...]
    versions: dict[str, str]

    def to_json(self) -> Json:
        """As JSON types."""
        return {"schema": _SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, content: Json) -> Self:
        """From JSON types.

        Raises:
            CheckpointError: another schema, or names and values that `to_json` does not give. A file name that is not the
                plain one of its rank is refused here, so no other file is ever opened.
        """
        try:
            if content["schema"] != _SCHEMA:
                raise CheckpointError(f"{RECORD} has schema {content['schema']!r}, this version reads {_SCHEMA}")
            shares = tuple(Share(**share) for share in content["shares"])
            record = cls(content["step"], content["state"], shares, content["versions"])
            names = [share_name(rank, len(shares)) for rank in range(len(shares))]
            if not shares or [share.name for share in shares] != names:
                raise CheckpointError(f"{RECORD} lists {[share.name for share in shares]}, which are not the files of all ranks")
            if type(record.step) is not int or not isinstance(record.state, dict):
                raise CheckpointError(f"{RECORD} states step {record.step!r} and a state of type {type(record.state).__name__}")
            if any(type(share.size) is not int or not _SHA256.fullmatch(share.sha256) for share in shares):
                raise CheckpointError(f"{RECORD} states sizes or checksums that are none")
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{RECORD} has not the fields of a commit record ({error!r})") from None
        return record


def seal(content: Json) -> bytes:
    """JSON with its own sha256."""
    return _sealed(json.dumps(content).encode())


def unseal(text: bytes) -> Json:
    """What was sealed.

    Raises:
        CheckpointError: a byte is not as `seal` wrote it.
    """
    content = text[_HEAD:-_TAIL]
    if _sealed(content) != text:
        raise CheckpointError(f"is garbled: its {len(text)} bytes do not have the checksum that they state")
    value: Json = json.loads(content)
    return value


def _sealed(content: bytes) -> bytes:
    return _SEALED % (content, hashlib.sha256(content).hexdigest().encode())

"""Opens a PyTorch checkpoint of other people and reads tensors from it, without running anything of it.

Such a file is a zip: a pickle that describes the objects (pickles.py reads it as data) and one stored member for the numbers
of each tensor. Every member is checked by its name, size and place before anything is read; nothing is written to disk and
nothing is inflated, so that the file can ask for no more memory than its own bytes; of the tensors, only those wanted are read.

A process of its own with a limit on memory and time is not used: no code of the file runs in this one, what is allocated is
bounded by the sizes checked below, and the pickle by the number of its opcodes.

Reference: PyTorch's caffe2/serialize/inline_container.cc and torch/serialization.py for the members.
"""

import hashlib
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cromss_dist.data.archives.inventory.tar import Cut, Damaged
from cromss_dist.data.archives.inventory.zip import find_directory
from cromss_dist.encoders.importing.pickles import StorageRef, TensorRef, parse
from cromss_dist.errors import PackageError, StorageError

MAX_DIRECTORY_BYTES = 2**24  # of the zip; zipfile makes an object of every 46 bytes of it
MAX_MEMBERS = 100_000
MAX_PICKLE_BYTES = 2**25
MAX_READ_BYTES = 2**32  # storages of one encoder and the tensors made of them; a ResNet-152 has 2**28

_MEMBER = re.compile(
    r"(?P<root>[^/\\]+)/(?P<name>data\.pkl|data/[0-9]+|version|byteorder"
    r"|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_AGAIN = "Take the file from its publisher again."
_BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, struct.error, Cut, Damaged)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Args:
        path: The file.
        sha256: Of the file (hex).
        content: What it holds: dict, list, str, numbers, ...; a tensor is a `TensorRef`.
    """

    path: Path
    sha256: str
    content: Any
    _zip: zipfile.ZipFile
    _members: Mapping[str, zipfile.ZipInfo]

    def read(self, refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
        """The tensors of `refs`, on the CPU, as they were saved.

        Raises:
            PackageError: a tensor's numbers are missing, too few or damaged, or all of them are too many to read.
        """
        storages = {ref.storage for ref in refs.values()}
        needed = sum(self._size(storage) for storage in storages)
        needed += sum(math.prod(ref.shape) * _DTYPES[ref.storage.kind].itemsize for ref in refs.values())
        if needed > MAX_READ_BYTES:
            raise PackageError(f"{self.path}: these tensors need {needed} bytes; at most {MAX_READ_BYTES} are read. {_AGAIN}")
        numbers = {storage: self._numbers(storage) for storage in storages}
        return {key: self._tensor(key, ref, numbers[ref.storage]) for key, ref in refs.items()}

    def _size(self, storage: StorageRef) -> int:
        size = storage.num_elements * _DTYPES[storage.kind].itemsize
        member = self._members.get(f"data/{storage.key}")
        if member is None or member.file_size != size:
            found = "is missing" if member is None else f"has {member.file_size} bytes"
            raise PackageError(f"{self.path}: member data/{storage.key[:40]} {found}, {size} are due. {_AGAIN}")
        return size

    def _numbers(self, storage: StorageRef) -> Tensor:
        dtype = _DTYPES[storage.kind]
        if not storage.num_elements:
            return torch.empty(0, dtype=dtype)
        try:
            content = self._zip.read(self._members[f"data/{storage.key}"])  # checks the CRC
        except _BROKEN as error:
            raise PackageError(f"{self.path}: member data/{storage.key} is damaged: {error}. {_AGAIN}") from None
        return torch.frombuffer(bytearray(content), dtype=dtype)

    def _tensor(self, key: str, ref: TensorRef, numbers: Tensor) -> Tensor:
        count = math.prod(ref.shape)
        last = ref.offset + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
        if count > len(numbers) or (count and last >= len(numbers)):  # more numbers than there are: a stride of 0 repeats them
            raise PackageError(f"{self.path}: tensor {key[:80]} reaches behind its {len(numbers)} numbers. {_AGAIN}")
        return numbers.as_strided(ref.shape, ref.strides, ref.offset).clone(memory_format=torch.contiguous_format)


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """The checkpoint at `path`, to read tensors from.

    Raises:
        PackageError: it is none of PyTorch 1.6 or later, is damaged, or holds anything that is no data.
        StorageError: it cannot be read.
    """
    try:
        if not path.is_file():
            raise PackageError(f"{path} is no file; give a checkpoint of PyTorch.")
        with path.open("rb") as raw:
            _check_kind(path, raw)
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
            try:
                num_bytes = raw.tell()
                if find_directory(raw, num_bytes)[1] > MAX_DIRECTORY_BYTES:
                    raise Damaged(f"its directory has more than {MAX_DIRECTORY_BYTES} bytes")
                file = zipfile.ZipFile(raw)
                members = _check_members(file, num_bytes)
                if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
                    raise Damaged(f"its pickle has more than {MAX_PICKLE_BYTES} bytes")
                if "byteorder" in members and file.read(members["byteorder"]) != b"little":
                    raise Damaged("its numbers are not little-endian")
                pickled = file.read(members["data.pkl"])
            except _BROKEN as error:
                raise PackageError(f"{path} is no whole checkpoint of PyTorch: {error}. {_AGAIN}") from None
            try:
                content = parse(pickled)
            except PackageError as error:
                raise PackageError(f"{path}: {error}") from None
            yield Checkpoint(path, sha256, content, file, members)
    except OSError as error:
        raise StorageError.of(error) from error


def _check_kind(path: Path, raw: BinaryIO) -> None:
    """Raises PackageError, saying what the file is, unless it begins as a zip."""
    head = raw.read(512)
    raw.seek(0)
    if head[:4] == b"PK\3\4":
        return
    tensors = head[8:9] == b"{"  # behind eight bytes of the header's size
    old = head[257:262] == b"ustar" or (head[:1] == b"\x80" and not tensors)
    kinds = {
        "is in a format of PyTorch before 1.6. If it holds plain tensors, torch.save(torch.load(file, weights_only=True), new) "
        "writes it in the present one, without running anything of it": old,
        "is a safetensors file, which has no layout to go by": tensors,
        "is an HDF5 file, as Keras writes": head[:4] == b"\x89HDF",
        "is empty": not head,
        "is text: perhaps a download that failed or asked for a login": head.isascii() and b"\0" not in head,
    }
    kind = next((name for name, found in kinds.items() if found), "is no zip")
    raise PackageError(f"{path} {kind}. Only checkpoints of PyTorch 1.6 or later are imported; give such a file.")


def _check_members(file: zipfile.ZipFile, num_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The members by their name within the archive's one folder.

    Raises:
        Damaged: one is of another name, twice there, packed, encrypted, or they are together larger than the file.
    """
    entries = file.infolist()
    if len(entries) > MAX_MEMBERS:
        raise Damaged(f"it has more than {MAX_MEMBERS} members")
    members: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    for entry in entries:
        match = _MEMBER.fullmatch(entry.filename)
        if match is None or match["root"] in (".", ".."):
            script = "/code/" in entry.filename or entry.filename.endswith("constants.pkl")
            what = "belongs to TorchScript, which is a program" if script else "is none of a checkpoint's"
            raise Damaged(f"its member {entry.filename[:80]!r} {what}")
        roots.add(match["root"])
        if match["name"] in members:
            raise Damaged(f"its member {match['name']!r} is there twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 0x41:
            raise Damaged(f"its member {match['name']!r} is packed or encrypted, which PyTorch never does")
        members[match["name"]] = entry
    if sum(entry.file_size for entry in entries) > num_bytes:
        raise Damaged("its members are larger than the file: they overlap")
    if len(roots) != 1 or "data.pkl" not in members:
        raise Damaged(f"it has {len(roots)} folders and {'a' if 'data.pkl' in members else 'no'} data.pkl; one of each is due")
    return members

"""Lists a tar without extracting it and without trusting it.

The standard library's tarfile is not used: it keeps an object a member, it reads an extended header of any size into
memory, and it takes a damaged header in the middle of an archive for the archive's end.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_EXTENDED_BYTES = 2**16  # of a long name or a pax header; a path has at most 4,096 bytes
MAX_SIZE = 2**60
_ZEROS = bytes(BLOCK)
_LINKS_AND_DEVICES = {b"1": "hardlink", b"2": "symlink", b"3": "device", b"4": "device", b"6": "device"}


class Cut(Exception):  # noqa: N818 - an outcome: the container ends before it should
    """A container ends in the middle."""


class Damaged(Exception):  # noqa: N818 - an outcome, as Cut
    """A container is not what its format demands."""


@dataclass(frozen=True)
class Member:
    """An entry of a container.

    Args:
        name: As the container has it; bytes, since nothing promises that it is text.
        kind: 'file', or why it must not be read: 'hardlink', 'symlink', 'device', 'sparse', 'encrypted', 'other'.
        offset: First byte of its data (tar) or of its header (zip).
        size: Bytes of its data.
        packed: Bytes its data takes in the container.
        check: CRC-32 of its data, -1 where there is none.
    """

    name: bytes
    kind: str
    offset: int
    size: int
    packed: int
    check: int


def tar_members(stream: BinaryIO, seekable_bytes: int | None) -> Iterator[Member]:
    """The entries of a tar that are no folders, in its order. The stream is left behind the two blocks of zeros that end it.

    Args:
        stream: At the tar's first byte.
        seekable_bytes: Length of a stream that can be sought, whose data is passed over. None: data is read, so that
            each member has a check.

    Raises:
        Cut: the stream ends before the two blocks of zeros.
        Damaged: a header is none.
    """
    position, name, size = 0, b"", -1
    sparse = False
    while True:
        header = _exactly(stream, BLOCK)
        position += BLOCK
        if header == _ZEROS:
            if _exactly(stream, BLOCK) != _ZEROS:
                raise Damaged(f"a lone block of zeros lies at byte {position - BLOCK}")
            return
        _require_checksum(header, position - BLOCK)
        kind = header[156:157]
        stored = _number(header[124:136], position)
        if kind in b"LKxXg" and kind:  # what they say belongs to the next entry
            if stored > MAX_EXTENDED_BYTES:
                raise Damaged(f"the extended header at byte {position} has {stored} bytes; at most {MAX_EXTENDED_BYTES} are read")
            padded = stored + -stored % BLOCK
            extended = _exactly(stream, padded)[:stored]
            position += padded
            if kind == b"L":
                name = extended.rstrip(b"\0")
            elif kind in b"xX":
                records = _pax(extended, position)
                name, size = records.get(b"path", name), int(records.get(b"size", size))
                sparse = any(record.startswith(b"GNU.sparse") for record in records)
            continue
        if size < 0:
            size = stored
        name = name or _name(header)
        what = _LINKS_AND_DEVICES.get(kind, "file" if kind in (b"0", b"\0", b"7") else "other")
        if kind == b"S":
            position += _pass_sparse_map(stream, header)
        if sparse or kind == b"S":
            what = "sparse"
        has_data = kind not in b"123456" or kind == b""
        if not has_data:
            size = 0
        is_folder = kind == b"5" or (what == "file" and name.endswith(b"/"))
        check = _pass(stream, position, size, seekable_bytes)
        if not is_folder:
            yield Member(name, what, position, size, size, check)
        position += size + -size % BLOCK
        name, size, sparse = b"", -1, False


def _pass(stream: BinaryIO, position: int, size: int, seekable_bytes: int | None) -> int:
    """Goes behind the data of a member and its padding; its CRC-32 where it had to be read for that, else -1."""
    padding = -size % BLOCK
    if seekable_bytes is not None:
        if position + size + padding > seekable_bytes:
            raise Cut(f"the entry at byte {position} goes on to byte {position + size}; there are {seekable_bytes}")
        stream.seek(size + padding, io.SEEK_CUR)
        return -1
    check, left = 0, size
    while left:
        data = stream.read(min(left, 2**20))
        if not data:
            raise Cut(f"the entry at byte {position} of the unpacked tar lacks {left} of its {size} bytes")
        check = zlib.crc32(data, check)
        left -= len(data)
    _exactly(stream, padding)
    return check


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise Cut("it ends without the two blocks of zeros that close a tar")
    return data


def _require_checksum(header: bytes, position: int) -> None:
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156], position) != unsigned:
        raise Damaged(f"the 512 bytes at byte {position} are no tar header: their sum is wrong")


def _number(field: bytes, position: int) -> int:
    """An octal number, or GNU's binary one, of a header that ends at `position`."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
    else:
        text = field.strip(b" \0")
        if not all(digit in b"01234567" for digit in text):
            raise Damaged(f"the header before byte {position} has the number {field!r}")
        number = int(text or b"0", 8)
    if number > MAX_SIZE:
        raise Damaged(f"the header before byte {position} declares {number} bytes")
    return number


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(extended: bytes, position: int) -> dict[bytes, bytes]:
    """The records `<length> <name>=<value>\\n` of a pax header."""
    records: dict[bytes, bytes] = {}
    while extended:
        length, _, _ = extended.partition(b" ")
        if not (length.isdigit() and len(length) < 10 and len(length) < int(length) <= len(extended)):
            raise Damaged(f"the pax header before byte {position} is not made of records")
        record, value = (
            extended[len(length) + 1 : int(length) - 1].split(b"=", 1) if b"=" in extended[: int(length)] else (b"", b"")
        )
        if record == b"size" and not (value.isdigit() and len(value) < 20 and int(value) <= MAX_SIZE):
            raise Damaged(f"the pax header before byte {position} gives the size {value[:40]!r}")
        records[record] = value
        extended = extended[int(length) :]
    return records


def _pass_sparse_map(stream: BinaryIO, header: bytes) -> int:
    """Goes behind the further blocks of a GNU sparse header; their bytes."""
    passed, more = 0, header[482]
    while more:
        more = _exactly(stream, BLOCK)[504]
        passed += BLOCK
    return passed

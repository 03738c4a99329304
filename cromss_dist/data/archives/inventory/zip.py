"""Lists a zip by its central directory, an entry at a time, and reads one member of it.

The standard library's zipfile keeps an object a member: 400 MB for the labels of NoLDO-S12, in every process that reads
them. Here a member is read by what the inventory knows of it.
"""

import io
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from cromss_dist.data.archives.inventory.tar import Cut, Damaged, Member

# Structures of PKWARE's APPNOTE 6.3: local header, entry of the central directory, its end, and the zip64 forms of that.
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_MAX_16, _MAX_32 = 2**16 - 1, 2**32 - 1
STORED, DEFLATED = 0, 8


def zip_members(stream: BinaryIO, num_bytes: int) -> Iterator[Member]:
    """The entries of a zip that are no folders, in the order of its central directory.

    Args:
        stream: Can be sought.
        num_bytes: Its length.

    Raises:
        Cut: the central directory is not at the end.
        Damaged: the central directory is none.
    """
    at, size, number = find_directory(stream, num_bytes)
    if at + size > num_bytes:
        raise Damaged(f"its central directory should end at byte {at + size} of {num_bytes}")
    stream.seek(at)
    for _ in range(number):
        header = stream.read(_ENTRY.size)
        if len(header) < _ENTRY.size or header[:4] != b"PK\1\2":
            raise Damaged(f"its central directory has fewer than the {number} entries it declares")
        (
            _,
            made_by,
            _,
            flags,
            method,
            _,
            _,
            check,
            packed,
            unpacked,
            len_name,
            len_extra,
            len_comment,
            disk,
            _,
            attributes,
            at,
        ) = _ENTRY.unpack(header)
        name, extra = stream.read(len_name), stream.read(len_extra)
        stream.seek(len_comment, io.SEEK_CUR)
        if _MAX_32 in (unpacked, packed, at):
            unpacked, packed, at = _zip64(extra, unpacked, packed, at)
        if at + packed > num_bytes or disk not in (0, _MAX_16):
            raise Damaged(f"its member {name!r} should end behind byte {at + packed} of {num_bytes}")
        if name.endswith(b"/"):
            continue
        yield Member(_as_utf8(name, flags), _kind(flags, method, made_by, attributes), at, unpacked, packed, check)


def unzip(header_and_data: bytes, size: int, packed: int) -> bytes:
    """The data of a member, from the bytes that begin at its local header; never more than `size`.

    Raises:
        Damaged: they are not a local header and data of this size.
    """
    if len(header_and_data) < _LOCAL.size or header_and_data[:4] != b"PK\3\4":
        raise Damaged("there is no local header where the central directory says")
    *_, method = _LOCAL.unpack_from(header_and_data)[:4]
    len_name, len_extra = _LOCAL.unpack_from(header_and_data)[-2:]
    at = _LOCAL.size + len_name + len_extra
    data = header_and_data[at : at + packed]
    if method == DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(data, size + 1)
        except zlib.error as error:
            raise Damaged(f"zlib says: {error}") from error
    elif method != STORED:
        raise Damaged(f"its local header gives compression method {method}")
    if len(data) != size:
        raise Damaged(f"it unpacks to {'more than ' * (len(data) > size)}{min(len(data), size)} bytes; {size} are declared")
    return data


def local_bytes(packed: int) -> int:
    """How many bytes from its local header on hold a member for certain."""
    return _LOCAL.size + 2 * _MAX_16 + packed


def find_directory(stream: BinaryIO, num_bytes: int) -> tuple[int, int, int]:
    """First byte, bytes and entries of the central directory. Raises Cut or Damaged."""
    tail_at = max(0, num_bytes - _END.size - _MAX_16)
    stream.seek(tail_at)
    tail = stream.read(num_bytes - tail_at)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + _END.size > len(tail):
        raise Cut("it has no central directory at its end")
    _, _, _, _, number, size, at, _ = _END.unpack_from(tail, end)
    if number == _MAX_16 or _MAX_32 in (size, at):
        locator = tail_at + end - _LOCATOR64.size
        if locator < 0:
            raise Damaged("its zip64 locator is not there")
        stream.seek(locator)
        signature, _, at64, _ = _LOCATOR64.unpack(stream.read(_LOCATOR64.size))
        if signature == b"PK\6\7":
            if at64 + _END64.size > num_bytes:
                raise Damaged("its zip64 directory record is not in the file")
            stream.seek(at64)
            signature, *_, number, size, at = _END64.unpack(stream.read(_END64.size))
            if signature != b"PK\6\6":
                raise Damaged("its zip64 directory record is none")
    return at, size, number


def _zip64(extra: bytes, *values: int) -> tuple[int, ...]:
    """Size, packed size and place, those that are 2**32 - 1 replaced by what the zip64 extra field says."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{min(size, len(extra) - 4) // 8}Q", extra, 4))
            filled = tuple(next(numbers, -1) if value == _MAX_32 else value for value in values)
            if -1 not in filled:
                return filled
        extra = extra[4 + size :]
    raise Damaged("an entry of its central directory lacks its zip64 field")


def _as_utf8(name: bytes, flags: int) -> bytes:
    return name if flags & 0x800 else name.decode("cp437").encode()


def _kind(flags: int, method: int, made_by: int, attributes: int) -> str:
    if flags & 0x41:
        return "encrypted"
    mode = attributes >> 16 if made_by >> 8 == 3 else 0  # 3: written on Unix
    if stat.S_ISLNK(mode):
        return "symlink"
    if method not in (STORED, DEFLATED):
        return "other"
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "device"

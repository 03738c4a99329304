"""Reading a gzip stream from points. The oracle is the data that zlib packed."""

import random
import struct
import zlib
from pathlib import Path

import pytest

from cromss_dist.data.archives.inventory.gzip_points import GzipReader, append_table
from cromss_dist.data.archives.inventory.tar import Damaged


def text(size: int, seed: int = 0) -> bytes:
    """Words that come again and again, so that packed data refers back."""
    draw = random.Random(seed)
    words = [draw.randbytes(12) for _ in range(500)]
    return b"".join(draw.choices(words, k=size // 12))


def packed(data: bytes, window: bytes = b"", last: bool = True) -> bytes:
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -15, zdict=window)
    return squeeze.compress(data) + squeeze.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


def reader(stream: bytes, points: list[tuple[int, int, bytes]], folder: Path) -> GzipReader:
    """Of a stream with these points: byte inflated, bit packed, window."""
    with (folder / "index").open("w+b") as index:
        index.write(bytes(8) + b"gzipindx" + struct.pack(">2Q", len(points), len(points)))
        for inflated, bit, window in points:
            kept = zlib.compress(window) if window else b""
            index.write(struct.pack(">2Q2I", inflated, -(bit // -8), -bit % 8, len(kept)) + kept)
        index.write(struct.pack(">Q", 0))
        append_table(index)
    return GzipReader(lambda offset, size: stream[offset : offset + size], folder / "index")


@pytest.mark.parametrize("shift", range(8))
def test_a_point_may_be_at_any_bit_and_has_a_window(shift: int, tmp_path: Path) -> None:
    before, after = text(2**15), text(200_000, seed=0)
    bits = int.from_bytes(packed(after, before), "little") << shift | (0x55 & ((1 << shift) - 1))
    stream = b"???" + bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    assert reader(stream, [(0, 24 + shift, before)], tmp_path).read(0, len(after)) == after


def two_points(tmp_path: Path) -> tuple[bytes, bytes, GzipReader]:
    first, second = text(300_000, 1), text(400_000, 2)
    start = packed(first, last=False)
    stream = start + packed(second, first[-(2**15) :])
    points = [(0, 0, b""), (len(first), len(start) * 8, first[-(2**15) :])]
    return first + second, stream, reader(stream, points, tmp_path)


def test_any_range_is_read_in_any_order(tmp_path: Path) -> None:
    data, _, gzip = two_points(tmp_path)
    draw = random.Random(0)
    ranges = [(draw.randrange(len(data)), draw.choice((0, 1, 5000, 350_000))) for _ in range(60)]
    ranges += [(0, 10), (10, 20), (30, 299_990), (300_000, 1), (299_999, 2), (0, len(data)), (len(data), 0)]
    for offset, size in ranges:
        assert gzip.read(offset, size) == data[offset : offset + size]
    assert gzip.read(len(data) - 5, 10) == data[-5:]  # fewer at the end
    assert gzip.read(0, 5) == data[:5]


def test_members_in_order_are_inflated_once_and_others_from_the_last_point(tmp_path: Path) -> None:
    data, stream, _ = two_points(tmp_path)
    asked: list[int] = []

    def pread(offset: int, size: int) -> bytes:
        asked.append(offset)
        return stream[offset : offset + size]

    gzip = GzipReader(pread, tmp_path / "index")
    for offset in range(0, 290_000, 10_000):
        gzip.read(offset, 10_000)
    assert asked == sorted(set(asked))
    asked.clear()
    gzip.read(600_000, 10)
    assert min(asked) > len(packed(data[:300_000])) - 100


def test_a_damaged_block_is_refused_and_what_another_point_leads_to_is_read(tmp_path: Path) -> None:
    data, stream, _ = two_points(tmp_path)
    cut = len(packed(data[:300_000], last=False))
    torn = stream[:cut] + b"\xff" * 1000 + stream[cut + 1000 :]
    gzip = GzipReader(lambda offset, size: torn[offset : offset + size], tmp_path / "index")
    for _ in range(2):
        with pytest.raises(Damaged, match="zlib says"):
            gzip.read(500_000, 10)
        assert gzip.read(200_000, 10) == data[200_000:200_010]
    short = GzipReader(lambda offset, size: stream[: cut + 1000][offset : offset + size], tmp_path / "index")
    assert len(short.read(500_000, 10)) == 0
    assert short.read(5, 10) == data[5:15]

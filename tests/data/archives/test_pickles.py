import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cromss_dist.data.archives.pickles import LONG_BYTES, PickleError, Span, Value, parse


def parsed(data: bytes) -> Value:
    return parse(lambda offset, size: data[offset : offset + size], len(data))


def resolved(data: bytes) -> Any:
    """The parsed value with its long strings read, as pickle.loads would return it."""
    value = parsed(data)

    def read(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(read(inner) for inner in part)
        return data[part.offset : part.offset + part.size] if isinstance(part, Span) else part

    return read(value)


PIXELS = bytes(range(256)) * 40  # longer than LONG_BYTES
DATA = [
    (PIXELS, (4, 13, 264, 264), 200),
    (PIXELS, (4, 264, 264), np.int64(251078)),  # what the published label script writes
    (b"", (), 0),
    ("text", "µ", None, True, False),
    (-1, 255, 256, 65536, -(2**31), 2**31, 2**63, -(2**63)),
    (b"x", b"x", (b"x", (b"x",))),
    (np.uint8(200), np.int16(-2), np.dtype(">i4").type(70000), np.int64(-5), np.int64(-5)),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", DATA, ids=[f"value{n}" for n in range(len(DATA))])
def test_data_is_parsed_as_pickle_itself_reads_it(protocol: int, value: tuple[Any, ...]) -> None:
    data = pickle.dumps(value, protocol)
    assert resolved(data) == pickle.loads(data)


def test_a_big_endian_numpy_integer_is_read_in_its_byte_order() -> None:
    data = pickle.dumps(np.int32(70000), 4)
    swapped = data.replace(b"\x8c\x01<", b"\x8c\x01>").replace(struct.pack("<i", 70000), struct.pack(">i", 70000))
    assert swapped != data
    assert parsed(swapped) == 70000


def test_long_strings_are_told_by_their_place_and_not_read() -> None:
    data = pickle.dumps((PIXELS * 100, (1, 2), 3), 4)
    read = []

    def reader(offset: int, size: int) -> bytes:
        read.append(size)
        return data[offset : offset + size]

    value = parse(reader, len(data))
    assert isinstance(value, tuple)
    pixels, shape, number = value
    assert isinstance(pixels, Span)
    assert data[pixels.offset : pixels.offset + pixels.size] == PIXELS * 100
    assert (shape, number) == ((1, 2), 3)
    assert sum(read) <= 2 * LONG_BYTES


class Command:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_command_in_a_pickle_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    command = Command(marker)
    for value in (command, (PIXELS, (4, 264, 264), command), (b"", (command,), 1), ((((command,),),),)):
        with pytest.raises(PickleError) as caught:
            parsed(pickle.dumps(value, protocol))
        assert caught.value.unsafe
    assert not marker.exists()
    pickle.loads(pickle.dumps(command, protocol))  # the payload does work where it is run
    assert marker.exists()


@pytest.mark.parametrize(
    "value",
    [
        [1], {1: 2}, {1}, 1.5, bytearray(b"x"), np.float64(1), np.zeros(3), np.datetime64("2020-01-01"), print, int,
        np.dtype("i8"), range(3), 2**80, Path("x"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_types_than_those_of_a_record_are_refused(value: object) -> None:
    for protocol in range(2, 6):
        with pytest.raises(PickleError):
            parsed(pickle.dumps((b"", value), protocol))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04cnumpy\ndtype\nR.",  # a call without a function
        b"\x80\x04cnumpy\ndtype\n(\x8c\x02f8\x89\x88tR.",
        b"\x80\x04cnumpy\ndtype\n(\x8c\x02O8\x89\x88tR.",
        b"\x80\x04c_codecs\nencode\n(\x8c\x01x\x8c\x03rottR.",
        b"\x80\x04c_codecs\nencode\n.",  # the name itself
        b"\x80\x04K\x01K\x02b.",  # the state of an integer
        b"\x80\x04K\x01K\x02.",  # two values
        b"\x80\x04.",
        b"\x80\x04\x85.",
        b"\x80\x04h\x07.",  # nothing is stored there
        b"\x80\x04t.",
        b"I12x\n.",
        b"",
    ],
)
def test_programs_that_are_not_those_of_a_record_are_refused(data: bytes) -> None:
    with pytest.raises(PickleError):
        parsed(data)


def test_bombs_end_at_once() -> None:
    nested = b"\x80\x04)" + b"\x85" * 10**6 + b"."
    laughs = b"\x80\x04)" + b"\x94h\x00\x86" * 200 + b"."  # a tuple of 2^200 parts, if one looked at them
    names = b"\x80\x04)" + b"2\x86" * 100 + b"\x8c\x01x\x93."
    huge = b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x"
    line = b"I" + b"1" * 10**7 + b"\n."
    for bomb in (nested, laughs, names, huge, line):
        with pytest.raises(PickleError):
            parsed(bomb)


def test_a_pickle_cut_anywhere_is_refused() -> None:
    data = pickle.dumps((PIXELS, (4, 264, 264), np.int64(7)), 4)
    for end in (*range(40), *range(len(data) - 200, len(data)), 5000):
        with pytest.raises(PickleError):
            parsed(data[:end])


def test_mutated_pickles_are_data_or_refused() -> None:
    rng = random.Random(0)
    for protocol in range(6):
        data = pickle.dumps((b"pixels", (4, 264, 264), np.int64(7)), protocol)
        for _ in range(500):
            mutant = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                mutant[rng.randrange(len(mutant))] = rng.randrange(256)
            try:
                parsed(bytes(mutant))
            except PickleError:
                continue

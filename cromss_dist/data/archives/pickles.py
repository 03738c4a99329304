"""Parses the pickles that the published code stores in its LMDBs, `(bytes, shape, id)`, without ever running one.

A pickle is a program that may name any function of any module. Here only tuples, bytes, integers, text and None are
known, and three calls are recognised by name and worked out by hand, nothing is imported: how old protocols write
bytes, and the two that make a numpy integer, because the published label script stores the id as `numpy.int64`.

Reference: zhu-xlab/CromSS, data_prepare/data_check_SSL4EO/construct_pretrain_lmdb/write_{images,labels}_to_lmdb.py for
what is stored; CPython's Lib/pickletools.py for the opcodes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

MAX_OPCODES = 256  # a record has about 50; this bounds stack, memo and depth at once
MAX_TEXT_BYTES = 64  # of an integer written as text; a record's have 3 digits
LONG_BYTES = 4096  # longer byte strings are told by their place: they are pixels, and a scan for ids need not read them

# name of a call -> what it does with its arguments, see _call
_ENCODE, _EMPTY_BYTES, _INT_TYPE, _SCALAR = "encode", "bytes", "dtype", "scalar"
_CALLS = {
    "_codecs encode": _ENCODE,
    "__builtin__ bytes": _EMPTY_BYTES,
    "builtins bytes": _EMPTY_BYTES,
    "numpy dtype": _INT_TYPE,
    "numpy.core.multiarray scalar": _SCALAR,  # numpy 1
    "numpy._core.multiarray scalar": _SCALAR,  # numpy 2
}
_INT_CODES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


class PickleError(ValueError):
    """The bytes are no pickle of the few types known here; `unsafe` where it asks for anything else than data."""

    def __init__(self, message: str, *, unsafe: bool = False) -> None:
        super().__init__(message)
        self.unsafe = unsafe


@dataclass(frozen=True)
class Span:
    """A long byte string that was not read: where it lies in the pickle."""

    offset: int
    size: int


@dataclass
class _IntType:
    """A numpy integer type; its byte order is set by the opcode after the one that made it."""

    code: str
    order: str = "<"

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.code[1])


@dataclass(frozen=True)
class _Name:
    """A call that a pickle names, as one of the values of _CALLS."""

    call: str


Value: TypeAlias = "bool | int | bytes | str | Span | tuple[Value, ...] | None"
_Item: TypeAlias = "Value | _IntType | _Name"


def parse(read: Callable[[int, int], bytes], size: int) -> Value:
    """The value of a pickle of `size` bytes; `read(offset, size)` returns a part of it, shorter only at its end.

    Byte strings over LONG_BYTES come back as a `Span`, unread.

    Raises:
        PickleError: cut, too long a program, or an opcode, a name or a call that is not known.
    """
    machine = _Machine(read, size)
    try:
        return machine.run()
    except (IndexError, KeyError, ValueError) as error:  # stack or memo empty, text that is no integer or no UTF-8
        if isinstance(error, PickleError):
            raise
        raise PickleError(f"it is damaged at byte {machine.position}: {type(error).__name__}") from error


class _Machine:
    """Stack, memo and position of a pickle being parsed."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self.position = 0
        self._window = b""
        self._window_start = 0
        self._stack: list[_Item] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Item] = {}

    def run(self) -> Value:
        for _ in range(MAX_OPCODES):
            opcode = self._take(1)
            if opcode == b".":
                value = self._stack.pop()
                if self._stack or not _is_data(value):
                    raise PickleError("it does not end with one value")
                return value  # type: ignore[return-value]  # _is_data
            self._step(opcode)
        raise PickleError(f"it has more than {MAX_OPCODES} opcodes", unsafe=True)

    def _step(self, opcode: bytes) -> None:
        stack = self._stack
        match opcode:
            case b"\x80":  # PROTO
                self._take(1)
            case b"\x95":  # FRAME
                self._take(8)
            case b"(":
                self._marks.append(len(stack))
            case b"N":
                stack.append(None)
            case b"\x88":
                stack.append(True)
            case b"\x89":
                stack.append(False)
            case b"K" | b"M":
                stack.append(self._number(1 if opcode == b"K" else 2))
            case b"J":
                stack.append(int.from_bytes(self._take(4), "little", signed=True))
            case b"\x8a" | b"\x8b":  # LONG1, LONG4
                stack.append(self._long(1 if opcode == b"\x8a" else 4))
            case b"I" | b"L":
                text = self._line(MAX_TEXT_BYTES)
                stack.append({b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text.rstrip(b"L")))
            case b"C" | b"B" | b"\x8e":
                stack.append(self._bytes(self._number({b"C": 1, b"B": 4, b"\x8e": 8}[opcode])))
            case b"\x8c" | b"X" | b"\x8d":
                size = self._number({b"\x8c": 1, b"X": 4, b"\x8d": 8}[opcode])
                stack.append(self._take(size).decode("utf-8", "surrogatepass"))
            case b"V":
                stack.append(self._line(self._size).decode("raw-unicode-escape"))
            case b")":
                stack.append(())
            case b"\x85" | b"\x86" | b"\x87":
                self._tuple(len(stack) - (opcode[0] - 0x84))
            case b"t":
                self._tuple(self._marks.pop())
            case b"q" | b"r" | b"\x94" | b"p":
                self._memo[len(self._memo) if opcode == b"\x94" else self._index(opcode)] = stack[-1]
            case b"h" | b"j" | b"g":
                stack.append(self._memo[self._index(opcode)])
            case b"c":
                module = self._line(MAX_TEXT_BYTES).decode()
                stack.append(_name(module, self._line(MAX_TEXT_BYTES).decode()))
            case b"\x93":  # STACK_GLOBAL
                name, module_ = stack.pop(), stack.pop()
                stack.append(_name(module_, name))
            case b"R":
                arguments, call = stack.pop(), stack.pop()
                stack.append(_call(call, arguments))
            case b"b":
                _set_order(stack[-2], stack.pop())
            case _:
                raise PickleError(f"opcode {opcode!r} at byte {self.position - 1} is none of plain data", unsafe=True)

    def _take(self, size: int) -> bytes:
        if size > self._size - self.position:
            raise PickleError(f"it is cut: {size} bytes are due at byte {self.position} of {self._size}")
        start = self.position - self._window_start
        if start < 0 or start + size > len(self._window):
            self._window = self._read(self.position, min(max(size, LONG_BYTES), self._size - self.position))
            self._window_start, start = self.position, 0
            if len(self._window) < size:
                raise PickleError(f"it is cut: {size} bytes are due at byte {self.position}")
        self.position += size
        return self._window[start : start + size]

    def _line(self, limit: int) -> bytes:
        """A line of at most `limit` bytes, without its end."""
        start = self.position
        while True:
            self._take(1)  # the window now holds this byte and those after it
            begin = self.position - 1 - self._window_start
            end = self._window.find(b"\n", begin)
            self.position = self._window_start + (len(self._window) if end < 0 else end + 1)
            if self.position - start > limit + 1:
                raise PickleError(f"a line has more than {limit} bytes", unsafe=True)
            if end >= 0:
                return self._read(start, self.position - 1 - start)

    def _number(self, num_bytes: int) -> int:
        return int.from_bytes(self._take(num_bytes), "little")

    def _long(self, num_bytes: int) -> int:
        size = self._number(num_bytes)
        if size > 9:  # 64 bits and a sign
            raise PickleError(f"an integer has {size} bytes", unsafe=True)
        return int.from_bytes(self._take(size), "little", signed=True)

    def _bytes(self, size: int) -> bytes | Span:
        if size <= LONG_BYTES:
            return self._take(size)
        if size > self._size - self.position:
            raise PickleError(f"it is cut: {size} bytes are due at byte {self.position} of {self._size}")
        span = Span(self.position, size)
        self.position += size
        return span

    def _index(self, opcode: bytes) -> int:
        if opcode in (b"p", b"g"):
            return int(self._line(MAX_TEXT_BYTES))
        return self._number(1 if opcode in (b"q", b"h") else 4)

    def _tuple(self, start: int) -> None:
        if start < 0:
            raise PickleError("a tuple has fewer parts than it says")
        parts = self._stack[start:]
        del self._stack[start:]
        self._stack.append(tuple(parts))  # type: ignore[arg-type]  # what is no data is refused where it is used


def _is_data(value: _Item) -> bool:
    """Whether a record's value, and the parts of it if it is a tuple, are no calls. Deeper ones are never looked at."""
    parts = value if isinstance(value, tuple) else (value,)
    return not any(isinstance(part, _Name | _IntType) for part in parts)


def _name(module: _Item, name: _Item) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("it asks for something whose name is no text", unsafe=True)
    if (call := _CALLS.get(f"{module} {name}")) is None:
        raise PickleError(f"it asks for {module:.40}.{name:.40}, which is no data", unsafe=True)
    return _Name(call)


def _call(call: _Item, arguments: _Item) -> _Item:
    """What one of _CALLS makes of its arguments, and nothing else."""
    match call, arguments:
        case _Name(call="encode"), (str() as text, "latin1"):
            return text.encode("latin1")
        case _Name(call="bytes"), ():
            return b""
        case _Name(call="dtype"), (str() as code, bool() | int(), bool() | int()) if code in _INT_CODES:
            return _IntType(code)
        case _Name(call="scalar"), (kind, bytes() as value) if isinstance(kind, _IntType) and len(value) == kind.size:
            return int.from_bytes(value, "big" if kind.order == ">" else "little", signed=kind.code[0] == "i")
    raise PickleError("it calls a function with arguments that are not those of a number or of bytes", unsafe=True)


def _set_order(kind: _Item, state: _Item) -> None:
    """The state of a numpy integer type: (3, byte order, None, None, None, -1, -1, 0)."""
    orders = [order for order in "<>|" if state == (3, order, None, None, None, -1, -1, 0)]
    if not isinstance(kind, _IntType) or not orders:
        raise PickleError("it sets the state of an object that is no number", unsafe=True)
    kind.order = orders[0]

"""Reads the pickle inside a PyTorch checkpoint as data: nothing is imported, called or unpickled.

A pickle is a program that may name any function of any module. Here its few opcodes of plain data are worked out by hand.
Of the names it may ask for, those that make containers and tensors are recognised and done here; those of objects that
published checkpoints are known to hold beside their weights (options of a run, numpy numbers) become an `Inert` stand-in
without content; any other name is an error. The weights themselves are not in the pickle: a tensor is read as a `TensorRef`,
which says where its numbers lie.

Departs: from `torch.load(weights_only=True)`, which refuses a Namespace and numpy's numbers unless the process is told to
trust their classes, then makes such objects, and reads every tensor of the file, the optimizer's included.

Reference: CPython's Lib/pickletools.py for the opcodes; PyTorch's torch/serialization.py for the persistent ids.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cromss_dist.errors import PackageError

MAX_OPCODES = 1_000_000  # two U-Nets with their optimizer's state have about 60,000; this bounds time, stack and memo
MAX_NAME_BYTES = 200
MAX_DIMENSIONS = 16  # of a tensor
MAX_INT_KEY = 2**60  # larger ones may share a hash, and a dict of many such takes for ever

_REBUILD = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETER = "torch._utils _rebuild_parameter"
_ENCODE = "_codecs encode"
_DICT = "collections OrderedDict"
_SIZE = "torch Size"
_INERT = frozenset(
    {
        "argparse Namespace",  # options of a run: CromSS and other Lightning checkpoints, DINO
        "numpy dtype",
        "numpy ndarray",
        "numpy.core.multiarray scalar",  # numpy 1: a learning rate
        "numpy.core.multiarray _reconstruct",
        "numpy._core.multiarray scalar",  # numpy 2
        "numpy._core.multiarray _reconstruct",
        "collections defaultdict",
        "collections Counter",
        "builtins set",
        "__builtin__ set",
        "builtins dict",
        "__builtin__ dict",
        "builtins complex",
        "__builtin__ complex",
        "builtins bytearray",
        "__builtin__ bytearray",
        "pathlib Path",
        "pathlib PosixPath",
        "pathlib WindowsPath",
        "datetime datetime",
        "datetime timedelta",
        "torch device",
        "torch.serialization _get_layout",
        "pytorch_lightning.utilities.parsing AttributeDict",
        "lightning_fabric.utilities.data AttributeDict",
        "lightning.fabric.utilities.data AttributeDict",
        "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    }
    | {f"torch {name}{bits}" for name in ("float", "int") for bits in (8, 16, 32, 64)}
    | {"torch bfloat16", "torch uint8", "torch bool"}
)


@dataclass(frozen=True)
class Name:
    """Something that a pickle names: module and name, as text."""

    path: str


@dataclass(frozen=True)
class Inert:
    """Stands where an object would be that was asked for and not made."""

    path: str


@dataclass(frozen=True)
class StorageRef:
    """Where numbers lie: PyTorch's name of their type, the member of the file, how many numbers."""

    kind: str
    key: str
    num_elements: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that was not read: its storage, and first number, shape and strides in numbers of it."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _DamagedError(Exception):
    """The program is none of a checkpoint's; the message says how."""


def parse(content: bytes) -> Any:
    """What the pickle `content` describes: dict, list, tuple, str, bytes, numbers, None, TensorRef and Inert.

    Raises:
        PackageError: it is cut or damaged, too long, or asks for anything that is no data.
    """
    machine = _Machine(content)
    try:
        return machine.run()
    except (_DamagedError, LookupError, ValueError, TypeError, struct.error) as error:
        told = error if isinstance(error, _DamagedError) else type(error).__name__
        raise PackageError(
            f"The checkpoint's pickle cannot be read as data, at byte {machine.position} of {len(content)}: {told}. Nothing "
            "of it was run. Take the file from its publisher again."
        ) from None


class _Machine:
    """Stack, memo and position of a pickle being read."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = self._take(1)
            if opcode == b".":
                if len(self._stack) != 1:
                    raise _DamagedError("it does not end with one value")
                return self._stack[0]
            if (step := _STEPS.get(opcode)) is None:
                raise _DamagedError(f"opcode {opcode!r} is none of plain data")
            step(self)
        raise _DamagedError(f"it has more than {MAX_OPCODES} opcodes")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def skip(self, size: int) -> None:
        self._take(size)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def long(self) -> int:
        return int.from_bytes(self._take(self.number("<B")), "little", signed=True)

    def data(self, form: str) -> bytes:
        return self._take(self.number(form))

    def text(self, form: str) -> str:
        return self.data(form).decode("utf-8", "surrogatepass")

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def tuple(self, size: int | None = None) -> None:
        self.push(tuple(self._marked() if size is None else [self._pop() for _ in range(size)][::-1]))

    def remember(self, index: int | None = None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def extend(self, single: bool = False) -> None:
        """Items to the list below them; to a stand-in, nothing."""
        items = [self._pop()] if single else self._marked()
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise _DamagedError(f"it adds items to a {type(target).__name__}")

    def update(self, single: bool = False) -> None:
        """Keys and values to the dict below them; to a stand-in, nothing."""
        pairs = [self._pop() for _ in range(2)][::-1] if single else self._marked()
        target = self._stack[-1]
        if len(pairs) % 2 or not isinstance(target, dict | Inert):
            raise _DamagedError(f"it sets keys of a {type(target).__name__}")
        for key in pairs[::2]:  # of tuples in tuples the hash alone could take for ever
            if not isinstance(key, str | int | float | bytes | Name | None):
                raise _DamagedError(f"a key is a {type(key).__name__}")
            if isinstance(key, int) and abs(key) > MAX_INT_KEY:
                raise _DamagedError(f"a key is a number beyond {MAX_INT_KEY}")
        if isinstance(target, dict):
            target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def name_of_lines(self) -> None:
        module = self._line()
        self.push(_known(module, self._line()))

    def name_of_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self.push(_known(module, name))

    def call(self) -> None:
        """REDUCE and NEWOBJ: what one of the known names makes of its arguments."""
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise _DamagedError("it calls what is no name")
        if name.path == _ENCODE:  # the only call whose result takes memory of its own
            self._encoded += sum(len(argument) for argument in arguments if isinstance(argument, str))
            if self._encoded > len(self._content):
                raise _DamagedError("it encodes more text than it holds")
        self.push(_made(name.path, arguments))

    def build(self) -> None:
        """The state of an object: of no use here, and never set."""
        self._pop()
        if not isinstance(self._stack[-1], dict | Inert):
            raise _DamagedError(f"it sets the state of a {type(self._stack[-1]).__name__}")

    def storage(self) -> None:
        match self._pop():
            case ("storage", Name(path=path), str() as key, str(), int() as count) if path in _STORAGES and count >= 0:
                self.push(StorageRef(path.removeprefix("torch "), key, count))
            case _:
                raise _DamagedError("a persistent id is none of a storage")

    def _take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > len(self._content):
            self.position = start
            raise _DamagedError(f"it is cut: {size} bytes are due")
        return self._content[start : self.position]

    def _line(self) -> str:
        end = self._content.find(b"\n", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise _DamagedError(f"a name has no end in {MAX_NAME_BYTES} bytes")
        line = self._take(end + 1 - self.position)
        return line[:-1].decode()

    def _pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise _DamagedError("it takes values from below a mark")
        return self._stack.pop()

    def _marked(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m.skip(1),  # PROTO
    b"\x95": lambda m: m.skip(8),  # FRAME
    b"(": _Machine.mark,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.push(m.long()),  # LONG1
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8c": lambda m: m.push(m.text("<B")),
    b"X": lambda m: m.push(m.text("<I")),
    b"C": lambda m: m.push(m.data("<B")),
    b"B": lambda m: m.push(m.data("<I")),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.tuple(1),
    b"\x86": lambda m: m.tuple(2),
    b"\x87": lambda m: m.tuple(3),
    b"t": lambda m: m.tuple(),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.extend(single=True),
    b"e": lambda m: m.extend(),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.update(single=True),
    b"u": lambda m: m.update(),
    b"\x8f": lambda m: m.push(Inert("builtins set")),
    b"\x90": lambda m: m.extend(),  # ADDITEMS
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(),  # MEMOIZE
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"c": _Machine.name_of_lines,
    b"\x93": _Machine.name_of_stack,
    b"R": _Machine.call,
    b"\x81": _Machine.call,  # NEWOBJ
    b"b": _Machine.build,
    b"Q": _Machine.storage,  # BINPERSID
}
_STORAGES = frozenset(
    f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
)
_MADE = frozenset({*_REBUILD, _PARAMETER, _ENCODE, _DICT, _SIZE})


def _known(module: Any, name: Any) -> Name:
    path = f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else "something whose name is no text"
    if path not in _MADE and path not in _STORAGES and path not in _INERT:
        raise PackageError(
            f"The checkpoint asks for {path[:MAX_NAME_BYTES].replace(' ', '.', 1)!r}, which is neither a tensor nor known to "
            "belong to a published checkpoint. Running it could do anything, so nothing of the file was run or loaded. Do not "
            "open it with another program either, unless you know why it asks for that; take the file from its publisher again."
        )
    return Name(path)


def _made(path: str, arguments: tuple[Any, ...]) -> Any:
    """What a known name makes of its arguments."""
    if path in _INERT:
        return Inert(path)
    match path, arguments:
        case p, (StorageRef() as storage, int() as offset, tuple() as shape, tuple() as strides, *_) if p in _REBUILD:
            numbers = (offset, *shape[:MAX_DIMENSIONS], *strides[:MAX_DIMENSIONS])
            ranks = len(shape) == len(strides) <= MAX_DIMENSIONS
            if not ranks or not all(type(n) is int and 0 <= n < 2**40 for n in numbers):
                raise _DamagedError("a tensor's shape or strides are none")
            return TensorRef(storage, offset, shape, strides)
        case p, (TensorRef() as tensor, *_) if p == _PARAMETER:
            return tensor
        case p, () if p == _DICT:
            return {}
        case p, (tuple() as shape,) if p == _SIZE:
            return shape
        case p, (str() as text, "latin1") if p == _ENCODE:  # how old protocols write bytes
            return text.encode("latin1")
    raise _DamagedError(f"it calls {path.replace(' ', '.')} with other arguments than PyTorch writes")

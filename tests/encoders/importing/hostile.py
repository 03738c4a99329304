"""Checkpoints that try to run something, to fill the memory, or to write where they should not.

`runs` are real: PyTorch's own unpickler, told to trust the file, leaves the marker (the tests show that). The others are
programs and zips that PyTorch never writes.
"""

import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Write = Callable[[Path, Path], None]  # (path of the file, path of the marker)


class Calls:
    """An object whose pickle is a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


class Sets(dict[str, Any]):
    """A dict whose pickle also sets a state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.state


def _touch(marker: Path) -> Calls:
    return Calls(os.system, f"touch {marker}")


def _namespace(**attributes: Any) -> Namespace:
    space = Namespace()
    space.__dict__.update(attributes)
    return space


def _deep(payload: Any) -> Any:
    for _ in range(50):
        payload = {"a": [(payload,)]}
    return payload


# What lies beside the weights: each leaves the marker when it is unpickled.
RUNS: dict[str, Callable[[Path], Any]] = {
    "os.system": _touch,
    "builtins.exec": lambda m: Calls(exec, f"import os; os.mkdir({str(m)!r})"),
    "builtins.eval": lambda m: Calls(eval, f"__import__('os').mkdir({str(m)!r})"),
    "os.mkdir": lambda m: Calls(os.mkdir, str(m)),
    "pathlib": lambda m: Calls(Path.touch, m),
    "an attribute of a Namespace": lambda m: Namespace(n_channels=13, hook=_touch(m)),
    "a special attribute of a Namespace": lambda m: _namespace(__class__=_touch(m), __dict__=_touch(m), __reduce__=_touch(m)),
    "a Namespace in a Namespace": lambda m: Namespace(args=Namespace(args=_touch(m))),
    "the state of a dict": lambda m: Sets({"_metadata": _touch(m)}),
    "deep inside": lambda m: _deep(_touch(m)),
    "the arguments of a tensor": lambda m: Calls(torch._utils._rebuild_parameter, _touch(m), False, OrderedDict()),
    "the hooks of a tensor": lambda m: Calls(torch._utils._rebuild_parameter, torch.zeros(1), False, _touch(m)),
    "a call in a call": lambda m: Calls(getattr, _touch(m), "real"),
    "a pickle in a pickle": lambda m: Calls(pickle.loads, pickle.dumps(_touch(m))),
    "numpy's scalar": lambda m: Calls(complex, _touch(m)),
}


def save_payload(path: Path, payload: Any, protocol: int = 2) -> None:
    """A checkpoint of PyTorch with the payload beside some weights."""
    content = {"state_dict": {"conv1.weight": torch.zeros(64, 13, 7, 7)}, "hyper_parameters": payload}
    torch.save(content, path, pickle_protocol=protocol)


def save_raw(path: Path, pickled: bytes, more: dict[str, bytes] | None = None) -> None:
    """A zip as PyTorch's, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **(more or {})}.items():
            file.writestr(f"archive/{name}", content)


def _tensor(shape: tuple[int, ...], strides: tuple[int, ...], key: str = "0", count: int = 4, offset: int = 0) -> bytes:
    """A pickle of a state dict with one tensor, as PyTorch writes it, with any numbers."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX" + struct.pack("<I", len(key)) + key.encode()
    storage += b"X\x03\0\0\0cpu\x8a\x08" + struct.pack("<q", count) + b"tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers((offset,))[1:-1] + numbers(shape) + numbers(strides)
    return b"\x80\x02}X\x01\0\0\0w" + made + b"\x89}tRs."


# Programs that PyTorch never writes: opcode or call -> pickle for a marker.
PROGRAMS: dict[str, Callable[[str], bytes]] = {
    "INST": lambda m: b"(S'touch " + m.encode() + b"'\nios\nsystem\n.",
    "OBJ": lambda m: b"\x80\x02(cos\nsystem\nX" + struct.pack("<I", len(m)) + m.encode() + b"o.",
    "protocol 0": lambda m: b"cos\nsystem\n(S'touch " + m.encode() + b"'\ntR.",
    "STACK_GLOBAL": lambda m: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(m)]) + m.encode() + b"\x85R.",
    "a name out of parts": lambda m: b"\x80\x04\x8c\x08builtins\x8c\x0fgetattr.__self__\x93.",
    "EXT1": lambda m: b"\x80\x02\x82\x01.",
    "PERSID as text": lambda m: b"Pstorage\n.",
    "a persistent id that is a call": lambda m: b"\x80\x02(X\x07\0\0\0storagecos\nsystem\nX\x01\0\0\x000X\x01\0\0\0cK\x01tQ.",
    "a buffer from outside": lambda m: b"\x80\x05\x97.",
    "a codec that unpacks": lambda m: b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.",
    "state of a list": lambda m: b"\x80\x02]}b.",
    "a call of a string": lambda m: b"\x80\x02X\x02\0\0\0os)R.",
    "nothing": lambda m: b"",
    "cut": lambda m: b"\x80\x02}X\xff\xff\0\0abc",
    "two values": lambda m: b"\x80\x02NN.",
    "values from below a mark": lambda m: b"\x80\x02K\x01(\x85.",
    "a key that costs for ever": lambda m: b"\x80\x02}(N" + b"\x85q\0h\0h\0\x87" * 60 + b"Nu.",
    "a name without end": lambda m: b"\x80\x02c" + b"a" * 10_000,
    "no text": lambda m: b"\x80\x02X\x02\0\0\0\xff\xfe.",
    "memo of nothing": lambda m: b"\x80\x02q\0.",
    "memo that is not there": lambda m: b"\x80\x02h\x07.",
    "a text encoded again and again": lambda m: (
        b"\x80\x02c_codecs\nencode\nq\0X\x10\x27\0\0"
        + b"a" * 10_000
        + b"q\1X\x06\0\0\0latin1q\2]("
        + b"h\0h\1h\2\x86R" * 9
        + b"e."
    ),
    "keys of one hash": lambda m: (
        b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(9)) + b"u."
    ),
    "too long": lambda m: b"\x80\x02" + b"N0" * 10 + b"K\x00q\x00" + b"h\x00" * 1_000_001,
}

# Tensors that are not what they say. Each file has four numbers in data/0.
TENSORS: dict[str, bytes] = {
    "more numbers than there are": _tensor((5,), (1,)),
    "a terabyte of one number": _tensor((2**38,), (0,)),
    "behind the end": _tensor((2,), (1,), offset=3),
    "strides behind the end": _tensor((2, 2), (3, 1)),
    "negative": _tensor((-1,), (1,)),
    "negative strides": _tensor((2,), (-1,), offset=1),
    "huge": _tensor((2**62,), (1,)),
    "other ranks": _tensor((2, 2), (1,)),
    "twenty dimensions": _tensor((1,) * 20, (1,) * 20),
    "a member that is not there": _tensor((4,), (1,), key="1"),
    "another member": _tensor((4,), (1,), key="../data.pkl"),
    "fewer numbers than stored": _tensor((2,), (1,), count=2),
    "a negative count": _tensor((1,), (1,), count=-1),
}


def _zip(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Write:
    def write(path: Path, marker: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name twice
            for name, content in members:
                file.writestr(name, content)

    return write


def _bytes(content: bytes) -> Write:
    def write(path: Path, marker: Path) -> None:
        path.write_bytes(content)

    return write


def _bare(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(_touch(marker)))


def _bomb_directory(path: Path, marker: Path) -> None:
    """A directory that says it has 17 million bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", _GOOD)
        file.writestr("archive/data/0", bytes(17_000_000))
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\5\6")
    content[end + 12 : end + 20] = struct.pack("<II", 17_000_000, 100)
    path.write_bytes(content)


def _overlapping(path: Path, marker: Path) -> None:
    """A thousand members of one megabyte that are the same bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", _GOOD)
        file.writestr("archive/data/0", bytes(1_000_000))
        first = file.infolist()[1]
        for number in range(1, 1000):
            twin = zipfile.ZipInfo(f"archive/data/{number}")
            twin.CRC, twin.file_size, twin.compress_size, twin.header_offset = (
                first.CRC,
                1_000_000,
                1_000_000,
                first.header_offset,
            )
            file.filelist.append(twin)


def _legacy(path: Path, marker: Path) -> None:
    torch.save({"state_dict": {}, "x": _touch(marker)}, path, _use_new_zipfile_serialization=False)


def _tar(path: Path, marker: Path) -> None:
    content = pickle.dumps(_touch(marker))
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "../escape"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


def _encrypted(path: Path, marker: Path) -> None:
    save_raw(path, _GOOD)
    content = bytearray(path.read_bytes())
    for at in (content.find(b"PK\3\4") + 6, content.find(b"PK\1\2") + 8):
        content[at] |= 1
    path.write_bytes(content)


_GOOD = b"\x80\x02}."
# Files that are no checkpoint, or zips that PyTorch never writes: name -> writer, words of the error.
FILES: dict[str, tuple[Write, str]] = {
    "PyTorch before 1.6": (_legacy, "before 1.6"),
    "a tar": (_tar, "before 1.6"),
    "a bare pickle": (_bare, "before 1.6"),
    "TorchScript": (_zip(("a/data.pkl", _GOOD), ("a/code/__torch__.py", b"x")), "TorchScript, which is a program"),
    "TorchScript's constants": (_zip(("a/data.pkl", _GOOD), ("a/constants.pkl", b"x")), "TorchScript"),
    "safetensors": (_bytes(b"\x80\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32"}}'.ljust(128)), "is a safetensors file"),
    "an empty file": (_bytes(b""), "is empty"),
    "a page": (_bytes(b"<html>login</html>"), "is text"),
    "HDF5": (_bytes(b"\x89HDF\r\n\x1a\n\0\0"), "HDF5"),
    "other bytes": (_bytes(b"\xff" * 600), "is no zip"),
    "half a zip": (_bytes(b"PK\3\4" + bytes(600)), "no whole checkpoint"),
    "a packed bomb": (_zip(("a/data.pkl", _GOOD), ("a/data/0", bytes(2**26)), compression=zipfile.ZIP_DEFLATED), "is packed"),
    "a packed pickle": (_zip(("a/data.pkl", b"N" * 2**20), compression=zipfile.ZIP_DEFLATED), "is packed"),
    "a bomb of overlapping members": (_overlapping, "overlap"),
    "a directory of 17 MB": (_bomb_directory, "directory has more than"),
    "a pickle of 34 MB": (lambda p, m: save_raw(p, b"\x80\x02" + bytes(2**25 + 1)), "pickle has more than"),
    "an encrypted member": (_encrypted, "packed or encrypted"),
    "a member twice": (_zip(("a/data.pkl", _GOOD), ("a/data.pkl", _GOOD)), "twice"),
    "two folders": (_zip(("a/data.pkl", _GOOD), ("b/version", b"3")), "2 folders"),
    "no pickle": (_zip(("a/version", b"3")), "no data.pkl"),
    "no folder": (_zip(("data.pkl", _GOOD)), "is none of a checkpoint's"),
    "a path up": (_zip(("a/data.pkl", _GOOD), ("../escape", b"x")), "is none of a checkpoint's"),
    "a path up in the middle": (_zip(("a/data.pkl", _GOOD), ("a/data/../../escape", b"x")), "is none of a checkpoint's"),
    "a folder named up": (_zip(("../data.pkl", _GOOD)), "is none of a checkpoint's"),
    "a path from the root": (_zip(("a/data.pkl", _GOOD), ("/etc/escape", b"x")), "is none of a checkpoint's"),
    "another system's path": (_zip(("a/data.pkl", _GOOD), ("a\\..\\data", b"x")), "is none of a checkpoint's"),
    "a program beside": (_zip(("a/data.pkl", _GOOD), ("a/setup.py", b"x")), "is none of a checkpoint's"),
    "big-endian": (lambda p, m: save_raw(p, _GOOD, {"byteorder": b"big"}), "not little-endian"),
}

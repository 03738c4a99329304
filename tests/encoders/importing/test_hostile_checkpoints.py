"""Nothing of a foreign file is run, and nothing of it can fill the memory: each attempt is an error, and leaves no marker."""

import io
import random
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cromss_dist.encoders.importing import checkpoint
from cromss_dist.encoders.importing.checkpoint import open_checkpoint
from cromss_dist.encoders.importing.import_encoder import import_encoder
from cromss_dist.encoders.importing.pickles import Inert, TensorRef
from cromss_dist.errors import CromssError, PackageError
from tests.encoders.importing.hostile import FILES, PROGRAMS, RUNS, TENSORS, Write, save_payload, save_raw
from tests.encoders.importing.look_alikes import cromss, dino


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_a_payload_is_refused_by_name_and_does_nothing(name: str, protocol: int, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "payload.ckpt"
    save_payload(path, RUNS[name](marker), protocol)
    with pytest.raises(PackageError, match=r"asks for '(posix|builtins|__builtin__|pathlib|_?pickle)\.") as caught:
        import_encoder(path, tmp_path / "package", "s2")
    assert "nothing of the file was run" in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "package").exists()
    with suppress(AttributeError):  # of a tensor made of what the payload returns
        torch.load(path, weights_only=False)  # the payload is a real one
    assert marker.exists()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_no_data_is_refused(name: str, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "program.ckpt"
    save_raw(path, PROGRAMS[name](str(marker)))
    with pytest.raises(PackageError, match=r"cannot be read as data|asks for"):
        import_encoder(path, tmp_path / "package", "s2")
    assert not marker.exists()


@pytest.mark.parametrize(("write", "words"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_refused_before_it_is_read(
    write: Write, words: str, tmp_path: Path, marker: Path
) -> None:
    path = tmp_path / "inner" / "file.pth"
    path.parent.mkdir()
    write(path, marker)
    with pytest.raises(PackageError, match=words) as caught:
        import_encoder(path, tmp_path / "package", "s2")
    assert str(path) in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"inner"}
    assert [entry.name for entry in path.parent.iterdir()] == ["file.pth"]


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_what_it_says_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tensor.pth"
    save_raw(path, TENSORS[name], {"data/0": bytes(16)})
    with pytest.raises(PackageError), open_checkpoint(path) as opened:
        opened.read(opened.content)


def test_more_than_an_encoder_needs_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_READ_BYTES", 1000)
    path = tmp_path / "large.pth"
    torch.save({"w": torch.zeros(200)}, path)
    with pytest.raises(PackageError, match="at most 1000 are read"), open_checkpoint(path) as opened:
        opened.read(opened.content)


def test_a_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(torch.tensor(500.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackageError, match="data/0 is damaged"), open_checkpoint(path) as opened:
        opened.read(opened.content)


def test_a_pickle_nested_a_hundred_thousand_deep_ends_in_an_error_or_a_value(tmp_path: Path) -> None:
    for nested in (
        b"\x80\x02N" + b"\x85" * 10**5 + b".",
        b"\x80\x02" + b"(" * 10**5,
        b"\x80\x02" + b"]" * 10**5 + b"a" * 99_999 + b".",
    ):
        path = tmp_path / "nested.pth"
        save_raw(path, nested)
        with pytest.raises(PackageError):
            import_encoder(path, tmp_path / "package", "s2")


def test_a_message_shows_little_of_a_file_and_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    path, weights = tmp_path / "loud.pth", {"w\x1b[2J\n" + "x" * 10_000: torch.zeros(1)}
    torch.save({f"part {number}\x1b]0;a" + "y" * 10_000: weights for number in range(100)}, path)
    with pytest.raises(PackageError, match="no encoder for s2") as caught:
        import_encoder(path, tmp_path / "package", "s2")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


def test_one_dict_under_many_names_is_not_looked_through_each_time(tmp_path: Path) -> None:
    weights = {f"w{number}": None for number in range(5000)}
    torch.save({f"part {number}": weights for number in range(20_000)}, tmp_path / "twins.pth")  # 100 million entries to see
    with pytest.raises(PackageError, match="no tensors by name, but 'part 0'"):
        import_encoder(tmp_path / "twins.pth", tmp_path / "package", "s2")


def test_what_published_checkpoints_hold_beside_their_weights_is_read_as_nothing(tmp_path: Path) -> None:
    small = {"conv1.weight": torch.rand(2, 13)}
    torch.save(cromss("middle", small, small), tmp_path / "cromss.ckpt")
    torch.save(dino(small), tmp_path / "dino.pth")
    with open_checkpoint(tmp_path / "cromss.ckpt") as opened:
        assert opened.content["hyper_parameters"] == {"args": Inert("argparse Namespace")}
        assert opened.content["epoch"] == 199
    with open_checkpoint(tmp_path / "dino.pth") as opened:
        assert opened.content["args"] == Inert("argparse Namespace")
        assert isinstance(opened.content["optimizer"]["param_groups"][0]["lr"], Inert)
        assert isinstance(opened.content["teacher"]["module.backbone.conv1.weight"], TensorRef)
        read = opened.read({"w": opened.content["teacher"]["module.backbone.conv1.weight"]})
    assert torch.equal(read["w"], small["conv1.weight"])


def _mutated(content: bytes, draws: random.Random) -> bytes:
    """Flipped, cut, doubled or zeroed bytes."""
    kind, at, size = draws.randrange(4), draws.randrange(len(content)), draws.randrange(1, 9)
    if kind == 0:
        return content[:at] + bytes(draws.randrange(256) for _ in range(size)) + content[at + size :]
    if kind == 1:
        return content[:at] + content[at + size :]
    if kind == 2:
        return content[:at] + content[at : at + size] * 2 + content[at + size :]
    return content[:at]


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_mutated_checkpoints_are_read_or_refused(count: int, tmp_path: Path, marker: Path) -> None:
    """Half of them mutated in the pickle, whose payload would leave the marker, half anywhere in the file."""
    small = {"conv1.weight": torch.rand(2, 3), "bn1.bias": torch.rand(2)}
    torch.save(cromss("middle", small, small), tmp_path / "good.ckpt")
    whole = (tmp_path / "good.ckpt").read_bytes()
    save_payload(tmp_path / "payload.ckpt", RUNS["a Namespace in a Namespace"](marker))
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        good = file.read("good/data.pkl")
    with zipfile.ZipFile(tmp_path / "payload.ckpt") as file:
        payload = file.read("payload/data.pkl")
    draws, path = random.Random(7), tmp_path / "mutated.ckpt"
    refused = 0
    for number in range(count):
        if number % 2:
            path.write_bytes(_mutated(whole, draws))
        else:
            save_raw(path, _mutated((good, payload)[number % 4 // 2], draws), {"data/0": bytes(24)})
        try:
            with open_checkpoint(path) as opened:
                content = opened.content.get("state_dict") if isinstance(opened.content, dict) else {}
                found = content if isinstance(content, dict) else {}
                opened.read({str(key): value for key, value in found.items() if isinstance(value, TensorRef)})
        except CromssError:
            refused += 1
    assert not marker.exists()
    assert refused > count / 2  # most are found out; the others changed what nobody reads, as a comment of the zip


_AUDITED = """
import sys
from pathlib import Path
from cromss_dist.encoders.importing.import_encoder import import_encoder
from cromss_dist.errors import CromssError

events, watching = [], False
HARMLESS = ("open", "object.__getattr__", "compile", "marshal.loads")

def hook(event, arguments):
    if watching and (event not in HARMLESS or event == "open" and "w" in str(arguments[1])):
        events.append((event, str(arguments)[:200]))

sys.addaudithook(hook)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for watching in (False, True):  # once for what this code imports and caches on its way
        try:
            import_encoder(path, Path(sys.argv[2]), "s2")
        except CromssError:
            continue
        finally:
            watched, watching = watching, False
        raise SystemExit(f"{path.name} was imported")
print(len(list(Path(sys.argv[1]).iterdir())), events)
"""


@pytest.mark.slow
def test_an_import_of_a_payload_imports_calls_and_writes_nothing(tmp_path: Path, marker: Path) -> None:
    """The interpreter's own audit events are the oracle: import, exec, pickle.find_class, os.system, subprocess, socket, ..."""
    files = tmp_path / "files"
    files.mkdir()
    for number, payload in enumerate(RUNS.values()):
        save_payload(files / f"run-{number:02}.ckpt", payload(marker))
    for number, program in enumerate(PROGRAMS.values()):
        save_raw(files / f"program-{number:02}.ckpt", program(str(marker)))
    for number, (write, _) in enumerate(FILES.values()):
        write(files / f"file-{number:02}.ckpt", marker)
    done = subprocess.run([sys.executable, "-c", _AUDITED, files, tmp_path / "package"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(RUNS) + len(PROGRAMS) + len(FILES)} []"
    assert not marker.exists()

"""Mutated inputs of every kind from end to end under a memory cap, and payloads that must come to nothing.

What was signed is signed again after it was changed: an attacker who writes an archive or a dataset also writes its checksums.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from cromss_dist.data.archives.layout.description import dump, load
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Rejected, Source
from cromss_dist.data.store.cube.writer import open_cube
from cromss_dist.data.store.index import open_shards
from cromss_dist.data.store.manifest import canonical
from cromss_dist.data.store.verify.verify import verify
from cromss_dist.errors import CromssError
from tests.data.archives import test_lmdb_archive, test_zarr_archive
from tests.data.archives.test_geotiff import tif
from tests.data.archives.test_hostile import MEMBERS, mutated
from tests.data.fake_source import FakeSource
from tests.data.tiny_archive import KEYS, S1_SCENES, S2_SCENES, write_archive

# Address space a process may take beyond what the libraries have mapped once they are imported and every kind was read.
CAP_MIB = 512
RAPIDGZIP_CAP_MIB = 4096  # its allocator takes 1 to 2 GiB at once, and ends the process where it does not get them
GOOD = KEYS[1]  # the other location is changed

WEIRD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, 2**70, 10**12, -(10**12), 1e308, float("nan"), 0.5, "", "x" * 5000, "\0",
    "../x", "/etc/passwd", "pipe:touch marker", "uint8", "object", [], {}, [[]], {"name": "pickle"}, [1, 2, 3], ["a"],
)  # fmt: skip


def change_json(node: Any, draw: random.Random) -> Any:
    """A JSON value with one place of it replaced, removed or repeated."""
    if isinstance(node, dict | list) and node and draw.random() < 0.85:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        at = draw.choice(keys)
        if draw.random() < 0.1:
            del node[at]
        elif draw.random() < 0.1 and isinstance(node, list):
            node.append(node[at])
        else:
            node[at] = change_json(node[at], draw)
        return node
    return draw.choice(WEIRD)


def change_file(path: Path, draw: random.Random) -> None:
    """Changes bytes, or, half the time for JSON, a value."""
    data = path.read_bytes()
    path.unlink()  # it may be a hard link
    if path.suffix in (".json", ".jsonl") and draw.random() < 0.5:
        path.write_text(json.dumps(change_json(json.loads(data), draw)))
    else:
        path.write_bytes(mutated(data, draw))


def change_tar(data: bytes, draw: random.Random) -> bytes:
    """Changes bytes; half the time only those of headers, whose sums are mended."""
    if draw.random() < 0.5:
        return mutated(data, draw)
    out = bytearray(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = draw.choice(tar.getmembers())
    header = bytearray(mutated(data[member.offset : member.offset + 512], draw)[:512].ljust(512, b"\0"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    out[member.offset : member.offset + 512] = header
    return bytes(out)


def change_zip(data: bytes, draw: random.Random) -> bytes:
    """Changes bytes; half the time those of a member, which is packed again."""
    if draw.random() < 0.5:
        return mutated(data, draw)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        infos = old.infolist()
        chosen = draw.choice([info for info in infos if draw.random() < 0.5 or ".z" in info.filename[-9:]] or infos)
        for info in infos:
            member = old.read(info)
            if info is chosen:
                is_json = info.filename.endswith((".zarray", ".zattrs", ".zgroup", ".json"))
                member = json.dumps(change_json(json.loads(member), draw)).encode() if is_json else mutated(member, draw)
            new.writestr(info.filename, member)
    return out.getvalue()


def replace(path: Path, change: Callable[[bytes, random.Random], bytes], draw: random.Random) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(change(data, draw))


def sign(folder: Path) -> None:
    """Makes records and manifest of a dataset agree with what is there, as far as they can be read."""
    manifest_path, cube_path = folder / "manifest.json", folder / "cube.json"
    try:
        manifest = json.loads(manifest_path.read_bytes())
        for entry in manifest["shards"]:
            tar = (folder / entry["name"]).read_bytes()
            record_path = (folder / entry["name"]).with_suffix(".json")
            record = json.loads(record_path.read_bytes())
            record["size"], record["sha256"] = len(tar), hashlib.sha256(tar).hexdigest()
            for sample in record["samples"]:
                for member in sample["members"]:
                    data = tar[member["offset"] : member["offset"] + member["size"]]
                    member["crc32c"] = google_crc32c.value(data)
                    if member["season_crc32c"]:
                        size = int(np.prod(manifest["arrays"][member["name"].removesuffix(".npy")]["shape"][1:]))
                        pixels = data[-4 * size :]
                        seasons = [pixels[at : at + size] for at in range(0, 4 * size, size)]
                        member["season_crc32c"] = [google_crc32c.value(season) for season in seasons]
            overwrite(record_path, canonical(record))
            entry["size"], entry["sha256"] = record["size"], record["sha256"]
            entry["record_sha256"] = hashlib.sha256(canonical(record)).hexdigest()
    except (ValueError, KeyError, TypeError, OSError, IndexError, AttributeError, MemoryError):
        pass  # this much could be signed
    try:
        cube = json.loads(cube_path.read_bytes())
        for file in cube["files"]:
            data = (folder / "cube.zarr" / file["path"]).read_bytes()
            file["size"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        overwrite(cube_path, canonical(cube))
    except (ValueError, KeyError, TypeError, OSError):
        pass
    try:
        manifest = json.loads(manifest_path.read_bytes()) if "manifest" not in locals() else manifest
        manifest["cube"]["record_sha256"] = hashlib.sha256(cube_path.read_bytes()).hexdigest()
        manifest.pop("digest", None)
        overwrite(manifest_path, json.dumps({**manifest, "digest": hashlib.sha256(canonical(manifest)).hexdigest()}).encode())
    except (ValueError, KeyError, TypeError, OSError, AttributeError):
        pass


def overwrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def read_archive(root: Path, **options: Any) -> str:
    """Reads all locations; what became of them."""
    source = open_archive(root, **options)
    return ", ".join(read_one(source, key) for key in source.keys)


def read_one(source: Source, key: str) -> str:
    try:
        sample = source.read(key)
    except Rejected as rejected:
        return rejected.reason
    for name, array in sample.arrays.items():
        assert array.shape == source.spec.shape(name)
    json.dumps(sample.metadata, allow_nan=False)
    return "read"


def read_dataset(folder: Path) -> str:
    """Reads a dataset in all ways there are; where it was refused."""
    told = []
    try:
        told.append("found" if verify(folder, deep=True).problems else "verified")
    except CromssError:
        told.append("refused")
    try:
        index = open_shards(folder)
        for sample in range(len(index)):
            index.metadata(sample)
            index.read(sample, 1, index.arrays)
            told.append("read")
    except CromssError:
        told.append("unreadable")
    try:
        cube = open_cube(folder)
        for name in cube:
            array = cube[name]
            array[dict.fromkeys(array.dims, 0)].load()
        told.append("loaded")
    except (CromssError, ValueError) as error:  # ValueError: Zarr's, for a damaged chunk
        told.append(type(error).__name__)
    return ", ".join(told)


def digests(source: Source, key: str) -> list[str]:
    return [hashlib.sha256(array.tobytes()).hexdigest() for array in source.read(key).arrays.values()]


VRT = (
    b'<VRTDataset rasterXSize="48" rasterYSize="48"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
    b"<SourceFilename>/etc/passwd</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
)


class Payload:
    """Its pickle makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch marker",)


def add_evil_members(path: Path) -> None:
    """Puts every member before the others that unpacking would fall for."""
    data = path.read_bytes()
    data = b"".join(evil for evil, _, _ in MEMBERS.values()) + (gzip.decompress(data) if path.suffix == ".gz" else data)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


class Inputs:
    """Small valid inputs of every kind, and how each is changed and read.

    Args:
        folder: Written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tree = write_archive(folder / "tree", KEYS[:2])
        (tree / "layout.yaml").write_text(dump(load("noldo_s12")))
        for kind in ("tar", "tar.gz", "zip"):
            (folder / kind).mkdir()
            self.pack(tree, folder / kind / f"all.{kind}")
        lmdb = test_lmdb_archive
        lmdb.write(folder / "lmdb", lmdb.rows_of(lmdb.IDS[:2]), subdir=False)
        for path in (folder / "lmdb").glob("*-lock"):
            path.unlink()
        stores = test_zarr_archive
        stores.write_s1(folder / "zarr.zip")
        stores.write_s2(folder / "zarr.zip")
        for scene in stores.S2_TIMES:
            stores.write_label(folder / "zarr.zip", stores.IDS[0], scene)
        convert(FakeSource(2), folder / "dataset", write="both", max_reject_fraction=0.5)
        self.good = digests(open_archive(tree), GOOD)

    @staticmethod
    def pack(tree: Path, path: Path) -> None:
        files = sorted(file for file in tree.rglob("*") if file.is_file())
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in files:
                    archive.write(file, file.relative_to(tree))
            return
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for file in files:
                tar.add(file, file.relative_to(tree))
        path.write_bytes(gzip.compress(out.getvalue(), 1) if path.suffix == ".gz" else out.getvalue())

    def copy(self, base: str, to: Path) -> Path:
        return Path(shutil.copytree(self.folder / base, to, copy_function=os.link))

    def run(self, kind: str, draw: random.Random, root: Path) -> str:
        """Changes one input of a kind and reads it; what became of it."""
        base, pattern, how = KINDS[kind]
        self.copy(base, root)
        path = draw.choice(sorted(file for file in root.glob(pattern) if file.is_file()))
        how(path, draw)
        try:
            if base == "dataset":
                sign(root)
                return read_dataset(root)
            if kind == "description":
                return read_archive(root, description=path)
            if base == "tree":
                source = open_archive(root)
                assert kind == "csv" or digests(source, GOOD) == self.good
            return read_archive(root)
        except CromssError as error:
            return type(error).__name__
        finally:
            shutil.rmtree(root)


def _tar(path: Path, draw: random.Random) -> None:
    replace(path, change_tar, draw)


def _zip(path: Path, draw: random.Random) -> None:
    replace(path, change_zip, draw)


def _tar_gz(path: Path, draw: random.Random) -> None:
    if draw.random() < 0.5:
        return replace(path, mutated, draw)
    return replace(path, lambda data, draw: gzip.compress(change_tar(gzip.decompress(data), draw), 1), draw)


How = Callable[[Path, random.Random], None]
KINDS: dict[str, tuple[str, str, How]] = {
    "tif": ("tree", f"*/{KEYS[0]}/*/*.tif", change_file),
    "metadata.json": ("tree", f"s2c/{KEYS[0]}/*/metadata.json", change_file),
    "csv": ("tree", "*.csv", change_file),
    "description": ("tree", "layout.yaml", change_file),
    "tar": ("tar", "*", _tar),
    "tar.gz": ("tar.gz", "*", _tar_gz),
    "zip": ("zip", "*", _zip),
    "lmdb": ("lmdb", "*", change_file),
    "zarr.zip": ("zarr.zip", "**/*.zarr.zip", _zip),
    "npy": ("dataset", "*.tar", change_file),
    "record": ("dataset", "shard-*.json", change_file),
    "manifest": ("dataset", "manifest.json", change_file),
    "zarr.json": ("dataset", "cube.zarr/**/zarr.json", change_file),
    "chunk": ("dataset", "cube.zarr/*/c*", change_file),
}


def main(folder: str, first: str, last: str) -> None:
    """Every line is an input that did no worse than an error of ours, flushed so that the last one names a crash or a hang."""
    import faulthandler
    import resource

    zarr.config.set({"threading.max_workers": 1})  # each new thread maps 64 MiB and more, and waits for ever where it cannot
    inputs = Inputs(Path(folder))
    for base in sorted({base for base, _, _ in KINDS.values()}):  # maps all libraries
        _ = read_dataset(inputs.folder / base) if base == "dataset" else read_archive(inputs.folder / base)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    kinds = list(KINDS)
    for seed in range(int(first), int(last)):
        kind = kinds[seed % len(kinds)]
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (RAPIDGZIP_CAP_MIB if kind == "tar.gz" else CAP_MIB) * 2**20, -1))
        faulthandler.dump_traceback_later(60, exit=True)
        start = time.process_time()
        print(f"{kind}: {inputs.run(kind, random.Random(seed), inputs.folder / str(seed))}", flush=True)
        assert time.process_time() - start < 5  # of the processor: others may keep it busy
    # Not ru_maxrss, which begins at what the process had that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) // 1024, mapped // 2**20)


def run_main(folder: Path, first: int, last: int) -> Counter[str]:
    """How often each kind was read whole, or refused."""
    code = f"from tests.data.test_hostile_inputs import main; main({str(folder)!r}, '{first}', '{last}')"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 2 * (last - first), check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"input {first + len(lines)} ended it with {done.returncode}: {done.stderr[-3000:]}"
    resident_mb, _ = map(int, lines.pop().split())
    assert len(lines) == last - first
    assert resident_mb < 512
    return Counter(lines)


PAYLOADS = {  # of location 3, and the reason it is rejected for
    "VRT": ("s2c/0000003/{s2}/B3.tif", VRT, "unreadable"),
    "script": ("s2c/0000003/{s2}/B3.tif", b"#!/bin/sh\ntouch MARKER\n", "unreadable"),
    "pickled": ("s2c/0000003/{s2}/B3.tif", pickle.dumps(Payload()), "unreadable"),
    "npy of objects": ("s1/0000003/{s1}/VV.tif", b"\x93NUMPY\1\0" + pickle.dumps(Payload()), "unreadable"),
    "TIFF bomb": (
        "dw_noisy_labels/0000003/{s2}/label.tif",
        tif(np.zeros((1, 8000, 8000), "uint8"), compress="deflate"),
        "too_big",
    ),
    "metadata": ("s2c/0000003/{s2}/metadata.json", b"!!python/object/apply:os.system ['touch MARKER']", "bad_metadata"),
}


@pytest.mark.parametrize("packed", ["", "tar", "tar.gz", "zip"])
@pytest.mark.parametrize("case", PAYLOADS)
def test_a_payload_is_counted_comes_to_nothing_and_the_other_location_is_converted(
    case: str, packed: str, archive_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, payload, reason = PAYLOADS[case]
    tree = Path(shutil.copytree(archive_template, tmp_path / "archive"))
    evil = tree / name.format(s1=S1_SCENES[0], s2=S2_SCENES[0])
    monkeypatch.chdir(tmp_path)
    evil.write_bytes(payload.replace(b"MARKER", str(tmp_path / "marker").encode()))
    root = tree
    if packed:
        root = tmp_path / "packed"
        root.mkdir()
        Inputs.pack(tree, root / f"all.{packed}")
        if packed.startswith("tar"):
            add_evil_members(root / f"all.{packed}")
    before = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    summary = convert(open_archive(root), tmp_path / "out", max_reject_fraction=0.5)
    lines = {line["key"]: line for line in map(json.loads, (tmp_path / "out/ledger.jsonl").read_text().splitlines())}
    assert lines["0000003"]["reason"] == reason
    assert [lines[key]["status"] for key in KEYS[1:]] == ["written", "written"]
    assert summary.num_samples == 2
    after = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    assert after - before == {tmp_path / "out"}  # no marker, and nothing unpacked


@pytest.mark.slow
def test_2000_mutated_inputs_of_all_kinds_end_in_an_error_of_ours_and_never_in_a_crash(tmp_path: Path) -> None:
    told = run_main(tmp_path, 0, 143 * len(KINDS))
    for kind in KINDS:
        outcomes = {line.removeprefix(f"{kind}: ") for line in told if line.startswith(f"{kind}: ")}
        assert len(outcomes) > 1, f"{kind}: {outcomes}"

"""What an attacker who wrote the archive may try: names, links and devices in tars and zips, bombs, mutated bytes."""

import gzip
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from cromss_dist.data.archives.inventory import listing
from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.inventory.inventory import take_inventory
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import CromssError, UnreadableInputError
from tests.data.archives.test_geotiff import tif

GOOD = "s1/good/scene/B1.tif"


def match(path: str) -> Match | None:
    pieces = path.split("/")
    return Match("s1", pieces[1], pieces[2], "", pieces[3]) if len(pieces) == 4 and pieces[0] == "s1" else None


def member(name: str, data: bytes = b"x", **fields: object) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for field, value in fields.items():
        setattr(header, field, value)
    return header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def sparse(name: str) -> bytes:
    """An old GNU sparse header: one extended block, and 512 bytes of data."""
    block = bytearray(member(name, bytes(512), type=tarfile.GNUTYPE_SPARSE))
    block[482] = 1  # a further block of the map follows
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block[:512]) + bytes(512) + bytes(block[512:])


EVIL = "s1/evil/scene/B1.tif"
LINK = {"linkname": "/etc/passwd", "size": 0}
# A member, the kind it is counted as, and the reason a read of its location gives; None where it has no location.
MEMBERS = {
    "absolute": (member("/tmp/evil.tif"), "absolute", None),
    "dotdot": (member("s1/../../../evil/B1.tif"), "dotdot", None),
    "symlink": (member(EVIL, b"", type=tarfile.SYMTYPE, **LINK), "symlink", "path_escape"),
    "hardlink": (member(EVIL, b"", type=tarfile.LNKTYPE, **LINK), "hardlink", "path_escape"),
    "character device": (member(EVIL, b"", type=tarfile.CHRTYPE), "device", "unreadable"),
    "block device": (member(EVIL, b"", type=tarfile.BLKTYPE), "device", "unreadable"),
    "pipe": (member(EVIL, b"", type=tarfile.FIFOTYPE), "device", "unreadable"),
    "old sparse": (sparse(EVIL), "sparse", "unreadable"),
    "unknown type": (member(EVIL, type=b"V"), "other", "unreadable"),
    "name of 5 KB": (member("a/" * 2500 + "x"), "long_name", None),
    "part of 300 bytes": (member("a" * 300), "long_name", None),
    "no UTF-8": (member("s1/\udcff\udcfe/scene/B1.tif"), "bad_name", None),
    "line break": (member("s1/a\nb/scene/B1.tif"), "bad_name", None),
}


@pytest.mark.parametrize("case", MEMBERS)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_tar_member_that_is_no_plain_file_is_counted_and_the_next_is_read(case: str, suffix: str, tmp_path: Path) -> None:
    evil, kind, reason = MEMBERS[case]
    data = evil + member(GOOD, b"good") + bytes(1024)
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(data) if suffix == "tar.gz" else data)
    inventory = take_inventory(tmp_path, match, None)
    assert inventory.refused == {kind: 1}
    assert inventory.read(inventory.files("good")[0]) == b"good"
    assert list(inventory.keys("s1")) == (["good"] if reason is None else ["evil", "good"])
    for entry in inventory.files("evil"):
        with pytest.raises(Rejected) as caught:
            inventory.read(entry)
        assert caught.value.reason == reason


def test_a_pax_sparse_member_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        header = tarfile.TarInfo(EVIL)
        header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)}
        tar.addfile(header)
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    assert take_inventory(tmp_path, match, None).refused == {"sparse": 1}


def test_zip_members_that_are_links_or_encrypted_are_refused_and_the_next_is_read(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("s1/evil/scene/B1.tif")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("../up.tif", "x")
        archive.writestr(GOOD, "good")
        archive.writestr("s1/locked/scene/B1.tif", "secret")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1  # the flag of encryption
    (tmp_path / "a.zip").write_bytes(data)
    inventory = take_inventory(tmp_path, match, None)
    assert inventory.refused == {"dotdot": 1, "encrypted": 1, "symlink": 1}
    assert inventory.read(inventory.files("good")[0]) == b"good"


def test_links_of_a_folder_that_leave_it_are_refused_and_others_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for key in ("good", "evil", "linked"):
        (root / "s1" / key / "scene").mkdir(parents=True)
    (root / GOOD).write_bytes(b"good")
    (root / EVIL).symlink_to("/etc/passwd")
    (root / "s1/linked/scene/B1.tif").symlink_to(root / GOOD)
    (root / "s2").symlink_to("/etc")
    os.mkfifo(root / "s1/good/scene/B2.tif")
    inventory = take_inventory(root, match, None)
    assert inventory.refused == {"symlink": 2, "device": 1}
    assert inventory.read(inventory.files("linked")[0]) == b"good"
    for entry in (inventory.files("evil")[0], inventory.files("good")[1]):
        with pytest.raises(Rejected):
            inventory.read(entry)


def test_more_members_than_plausible_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_MEMBERS", 100)
    (tmp_path / "a.tar").write_bytes(b"".join(member(f"s1/{n}/scene/B1.tif") for n in range(101)) + bytes(1024))
    with pytest.raises(UnreadableInputError, match="more than 100 members"):
        take_inventory(tmp_path, match, None)


@pytest.mark.parametrize(
    "tar",
    [
        member(GOOD)[:512] + b"?" * 512,  # data that is not there
        member(GOOD) + b"\xff" * 512,  # a header that is none, where tarfile sees the end
        member(GOOD) + bytes(512) + member(GOOD),  # a lone block of zeros
        member("x", type=tarfile.GNUTYPE_LONGNAME, size=2**40),
        member("x", type=tarfile.XHDTYPE, data=b"99 path=a\n"),
        member("x", type=tarfile.XHDTYPE, data=b"14 size=-1000\n"),
        b"",
    ],
    ids=["no data", "damaged header", "lone zeros", "huge name", "pax length", "pax size", "empty"],
)
def test_a_damaged_tar_is_no_short_one(tar: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar)
    with pytest.raises(UnreadableInputError, match=r"a\.tar is cut off"):
        take_inventory(tmp_path, match, None)


def zeros(mebibytes: int) -> bytes:
    """A raw deflate stream of so many MiB of zeros, without its end; made of equal pieces, so that it is quickly made."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (squeeze.compress(bytes(2**24)) + squeeze.flush(zlib.Z_FULL_FLUSH)) * (mebibytes // 16)


def gzip_bomb() -> bytes:
    """A tar.gz of 4 MB with a member of 4 GB of zeros."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = squeeze.compress(member(EVIL, b"", size=4 * 2**30)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return start + zeros(4 * 2**10) + b"\3\0" + bytes(8)


def zip_bomb(declared: int) -> bytes:
    """A zip with 1 GB of zeros that declares to have fewer, and a good member."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(EVIL, zeros(2**10) + b"\3\0")
        archive.writestr(GOOD, "good")
    data = bytearray(out.getvalue())
    entry = data.index(b"PK\1\2")
    data[8], data[entry + 10] = zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED  # what was stored is to be inflated
    data[entry + 24 : entry + 28] = struct.pack("<I", declared)
    return bytes(data)


# Reports what became of each location, then the largest resident set in MB.
READ_ALL = """
import sys
from pathlib import Path
from cromss_dist.data.archives import geotiff
from cromss_dist.data.archives.inventory.inventory import take_inventory
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import CromssError
from tests.data.archives.test_hostile import match
try:
    inventory = take_inventory(Path(sys.argv[1]), match, None)
    for key in inventory.keys("s1"):
        for entry in inventory.files(key):
            try:
                data = inventory.read(entry)
                if data[:2] in (b"II", b"MM"):
                    geotiff.decode(data, entry.path, ("uint8",), 1, None)
                print(key, "read")
            except Rejected as rejected:
                print(key, rejected.reason)
except CromssError as error:
    print(type(error).__name__, error)
status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of the process which started this one, if larger
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


def read_all(root: Path) -> tuple[list[str], int]:
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(root)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *told, resident_mb = done.stdout.splitlines()
    return told, int(resident_mb)


def test_a_gzip_bomb_is_given_up_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip_bomb())
    (told,), resident_mb = read_all(tmp_path)
    assert told.startswith("UnreadableInputError a.tar.gz")
    assert "decompression bomb" in told
    assert resident_mb < 512


@pytest.mark.parametrize(("declared", "reason"), [(2**30, "too_big"), (1000, "unreadable")])
def test_a_zip_bomb_is_refused_in_little_memory_and_the_next_member_read(declared: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_bomb(declared))
    told, resident_mb = read_all(tmp_path)
    assert told == [f"evil {reason}", "good read"]
    assert resident_mb < 512


@pytest.mark.parametrize("case", ["declares 37 GB", "deflate", "many strips", "many tags"])
def test_a_tiff_bomb_is_refused_in_little_memory_and_the_next_file_read(case: str, tmp_path: Path) -> None:
    good = tif(np.ones((1, 16, 16), "uint8"))
    evil = {
        "declares 37 GB": tif(np.zeros((1, 16, 16), "uint8"), SPARSE_OK=True).replace(
            struct.pack("<HHIHH", 256, 3, 1, 16, 0), struct.pack("<HHII", 256, 4, 1, 2**31)
        ),
        "deflate": tif(np.zeros((1, 8000, 8000), "uint8"), compress="deflate"),
        "many strips": tif(np.ones((1, 4000, 16), "uint8"), blockysize=1).replace(
            struct.pack("<HHI", 273, 4, 4000), struct.pack("<HHI", 273, 4, 2**32 - 1)
        ),
        "many tags": good[:8] + struct.pack("<H", 65535) + good[10:],
    }[case]
    for path, data in ((EVIL, evil), (GOOD, good)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(data)
    told, resident_mb = read_all(tmp_path)
    assert told[1] == "good read"
    assert told[0] in ("evil too_big", "evil unreadable", "evil truncated")
    assert resident_mb < 512


def seeds() -> dict[str, bytes]:
    """Small valid inputs of every kind."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 9, (1, 40, 40)).astype("uint8")
    tifs = [
        tif(pixels, **o) for o in ({}, {"compress": "lzw"}, {"compress": "deflate"}, {"compress": "jpeg"}, {"BIGTIFF": "YES"})
    ]
    packed = b"".join(member(f"s1/{n}/scene/B1.tif", data) for n, data in enumerate(tifs)) + bytes(1024)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, data in enumerate(tifs):
            archive.writestr(f"s1/{number}/scene/B1.tif", data)
    named = {f"s1/{n}/scene/B1.tif": data for n, data in enumerate(tifs)}
    return {**named, "a.tar": packed, "a.tar.gz": gzip.compress(packed), "a.zip": out.getvalue()}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Flipped bytes, an overwritten number, a cut, a repeated or a removed piece."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(out) or 1)
        match draw.randrange(5):
            case 0:
                out[at : at + 1] = draw.randbytes(1)
            case 1:
                out[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f"))
            case 2:
                del out[at:]
            case 3:
                out[at:at] = out[at : at + draw.randrange(64)]
            case _:
                del out[at : at + draw.randrange(64)]
    return bytes(out)


# Every line is an input that did no worse than a CromssError, flushed so that the last one names a crash or a hang.
FUZZ = """
import faulthandler, random, resource, shutil, sys
from pathlib import Path
from tests.data.archives.test_hostile import fuzz_one, seeds
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
inputs = seeds()
for seed in range(int(sys.argv[2]), int(sys.argv[3])):
    faulthandler.dump_traceback_later(5, exit=True)
    print(seed, fuzz_one(inputs, seed, Path(sys.argv[1])), flush=True)
"""


def fuzz_one(inputs: dict[str, bytes], seed: int, folder: Path) -> str:
    """Reads one mutated input; which it was."""
    draw = random.Random(seed)
    path = draw.choice(sorted(inputs))
    root = folder / str(seed)
    (root / path).parent.mkdir(parents=True)
    (root / path).write_bytes(mutated(inputs[path], draw))
    try:
        inventory = take_inventory(root, match, None)
        for key in inventory.keys("s1"):
            for entry in inventory.files(key):
                try:
                    geotiff_of(inventory.read(entry), entry.path)
                except Rejected as rejected:
                    path = f"{path} {rejected.reason}"
    except CromssError as error:
        path = f"{path} {type(error).__name__}"
    return path


def geotiff_of(data: bytes, path: str) -> None:
    from cromss_dist.data.archives import geotiff

    geotiff.decode(data, path, ("uint8",), 1, None)
    geotiff.place(data, path)


def run_fuzz(folder: Path, first: int, last: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(folder), str(first), str(last)],
        capture_output=True,
        text=True,
        timeout=60 + (last - first),
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"seed {first + len(lines)} ended it with {done.returncode}: {done.stderr[-2000:]}"
    assert len(lines) == last - first


def test_100_mutated_inputs_end_in_an_error_and_never_in_a_crash(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 0, 100)

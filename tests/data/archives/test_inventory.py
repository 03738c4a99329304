"""Inventories of folders and containers. The oracle of containers is what tarfile and zipfile wrote into them."""

import gzip
import io
import os
import pickle
import random
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cromss_dist.data.archives.inventory.entries import Entry, Match
from cromss_dist.data.archives.inventory.inventory import Inventory, take_inventory
from cromss_dist.data.sample import Rejected
from cromss_dist.errors import ArchiveMissingError, InputChangedError, UnreadableInputError

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
PATH = re.compile(r"(?P<role>s1|s2c|labels)/(?P<key>[^/]+)/(?P<scene>\w+)/(?P<band>\w+)\.tif")


def match(path: str) -> Match | None:
    if path == "list.csv":
        return Match("locations")
    found = PATH.fullmatch(path)
    return None if found is None else Match(found["role"], found["key"], found["scene"], "", found["band"])


def tree(num_locations: int = 4) -> dict[str, bytes]:
    """Files by path, of sizes around a block of 512 bytes and a chunk of a compressed one."""
    draw = random.Random(0)
    return {
        f"{role}/{location:07d}/scene/{band}.tif": draw.randbytes(draw.choice((0, 1, 511, 512, 513, 70_000, 300_000)))
        for role in ("labels", "s1", "s2c")
        for location in range(num_locations)
        for band in ("B1", "B2")
    }


def as_folder(files: dict[str, bytes], root: Path) -> None:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def as_tar(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for path, data in files.items():
            header = tarfile.TarInfo(path)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return out.getvalue()


def as_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return out.getvalue()


def as_split(files: dict[str, bytes], root: Path, suffixes: tuple[str, ...]) -> None:
    data = gzip.compress(as_tar(files))
    piece = len(data) // len(suffixes) + 1
    for number, suffix in enumerate(suffixes):
        (root / f"all.tar.gz{suffix}").write_bytes(data[number * piece : (number + 1) * piece])


def contents(inventory: Inventory) -> dict[str, bytes]:
    keys = {key for role in ("s1", "s2c", "labels") for key in inventory.keys(role)}
    return {entry.path: inventory.read(entry) for key in sorted(keys) for entry in inventory.files(key)}


def in_folders(files: dict[str, bytes], root: Path) -> None:
    as_folder(files, root)


ROUTES: dict[str, Callable[[dict[str, bytes], Path], object]] = {
    "folder": in_folders,
    "tar": lambda files, root: (root / "all.tar").write_bytes(as_tar(files)),
    "gnu tar": lambda files, root: (root / "all.tar").write_bytes(as_tar(files, tarfile.GNU_FORMAT)),
    "ustar": lambda files, root: (root / "all.tar").write_bytes(as_tar(files, tarfile.USTAR_FORMAT)),
    "tar with ./": lambda files, root: (root / "all.tar").write_bytes(as_tar({f"./{p}": d for p, d in files.items()})),
    "tar.gz": lambda files, root: (root / "all.tar.gz").write_bytes(gzip.compress(as_tar(files))),
    "tgz": lambda files, root: (root / "all.tgz").write_bytes(gzip.compress(as_tar(files))),
    "partaa": lambda files, root: as_split(files, root, (".partaa", ".partab", ".partac")),
    "part-000": lambda files, root: as_split(files, root, tuple(f".part-{n:03d}" for n in range(12))),
    "aa": lambda files, root: as_split(files, root, (".aa", ".ab")),
    "01": lambda files, root: as_split(files, root, (".01", ".02")),
    "zip": lambda files, root: (root / "all.zip").write_bytes(as_zip(files)),
    "stored zip": lambda files, root: (root / "all.zip").write_bytes(as_zip(files, zipfile.ZIP_STORED)),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_files_and_bytes(route: str, tmp_path: Path) -> None:
    files = tree()
    ROUTES[route](files, tmp_path)
    inventory = take_inventory(tmp_path, match, None)
    assert contents(inventory) == files
    assert inventory.num_files == len(files)
    assert list(inventory.keys("s2c")) == [f"{n:07d}" for n in range(4)]
    assert inventory.refused == {}


def test_modalities_in_separate_containers_meet_by_location(tmp_path: Path) -> None:
    files = tree()
    routes = {"s1": ".tar", "s2c": ".tar.gz", "labels": ".zip"}
    for role, suffix in routes.items():
        some = {path: data for path, data in files.items() if path.startswith(f"{role}/")}
        packed = {".tar": as_tar, ".tar.gz": lambda some: gzip.compress(as_tar(some)), ".zip": as_zip}[suffix](some)
        (tmp_path / f"{role}{suffix}").write_bytes(packed)
    inventory = take_inventory(tmp_path, match, None)
    assert [entry.path for entry in inventory.files("0000002")] == sorted(path for path in files if "/0000002/" in path)
    assert contents(inventory) == files
    assert inventory.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_unicode_names_come_through(kind: int, tmp_path: Path) -> None:
    files = {f"s1/{'ä ' * 60}/scene/B1.tif": b"a", f"s1/{'x' * 250}/{'y' * 200}/B1.tif": b"b", "s1/雪/scene/B1.tif": b"c"}
    (tmp_path / "all.tar").write_bytes(as_tar(files, kind))
    assert contents(take_inventory(tmp_path, match, None)) == files


def test_a_member_lies_where_its_container_would_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "all.zip").write_bytes(as_zip({"0000001/scene/B1.tif": b"here"}))
    assert contents(take_inventory(tmp_path, match, None)) == {"labels/0000001/scene/B1.tif": b"here"}


def test_an_inventory_works_in_other_processes_spawned_and_forked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    files = tree()
    ROUTES["tar.gz"](files, tmp_path / "a")
    inventory = take_inventory(tmp_path / "a", match, tmp_path / "work")
    assert contents(inventory) == files
    (tmp_path / "pickled").write_bytes(pickle.dumps(inventory))
    code = f"import pickle; i = pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb')); print(len(i.read(i.files('0000001')[1])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == len(inventory.read(inventory.files("0000001")[1]))
    assert done.stderr == ""
    if (child := os.fork()) == 0:
        os._exit(0 if contents(inventory) == files else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_strays_are_counted_by_folder_and_side_files_kept_apart(tmp_path: Path) -> None:
    as_folder({"list.csv": b"1", ".DS_Store": b"", "s1/Thumbs.db": b"", "s1/0000001/scene/B1.tif": b"x", "a/b/c": b""}, tmp_path)
    inventory = take_inventory(tmp_path, match, None)
    assert inventory.strays == {".": 1, "s1": 1, "a": 1}
    assert (inventory.num_files, inventory.num_strays) == (5, 3)
    assert [entry.path for entry in inventory.side_files("locations")] == ["list.csv"]


def test_the_fingerprint_changes_with_size_time_and_name_and_not_with_strays(tmp_path: Path) -> None:
    file = tmp_path / "s1/0000001/scene/B1.tif"
    as_folder({"s1/0000001/scene/B1.tif": b"x"}, tmp_path)
    os.utime(file, ns=(0, 10**18))
    seen = [take_inventory(tmp_path, match, None).fingerprint]
    (tmp_path / "stray").write_bytes(b"")
    assert take_inventory(tmp_path, match, None).fingerprint == seen[0]
    os.utime(file, ns=(0, 10**18 + 1))
    seen.append(take_inventory(tmp_path, match, None).fingerprint)
    (tmp_path / "all.tar").write_bytes(as_tar({"s1/0000002/scene/B1.tif": b"y"}))
    seen.append(take_inventory(tmp_path, match, None).fingerprint)
    file.rename(file.with_name("B2.tif"))
    seen.append(take_inventory(tmp_path, match, None).fingerprint)
    assert len(set(seen)) == 4


@pytest.mark.parametrize("route", ["folder", "tar", "tar.gz", "part-000", "zip"])
def test_a_changed_input_is_named(route: str, tmp_path: Path) -> None:  # catalogue C16
    ROUTES[route](tree(), tmp_path)
    inventory = take_inventory(tmp_path, match, None)
    entry = inventory.files("0000001")[0]
    inventory.read(entry)
    changed = tmp_path / entry.path if route == "folder" else sorted(tmp_path.iterdir())[-1]
    os.utime(changed, ns=(0, 0))
    for _ in range(2):
        with pytest.raises(InputChangedError, match=re.escape(changed.name)):
            inventory.read(entry)
    changed.unlink()
    with pytest.raises(InputChangedError, match="is gone"):
        pickle.loads(pickle.dumps(inventory)).read(entry)


@pytest.mark.parametrize("first", ["folder", "tar", "tar.gz", "zip"])
@pytest.mark.parametrize("second", ["tar", "partaa", "zip"])
def test_a_path_found_twice_is_kept_once_where_the_bytes_agree_and_refused_where_not(
    first: str, second: str, tmp_path: Path
) -> None:  # catalogue C11
    same, longer, other = (f"s1/0000003/scene/B{n}.tif" for n in range(3))
    files = {**tree(2), same: b"same" * 1000, longer: b"longer", other: b"other" * 1000}
    again = {same: files[same], longer: files[longer] + b"x", other: b"?" + files[other][1:]}
    ROUTES[first](files, tmp_path)
    (tmp_path / "z").mkdir()
    ROUTES[second](again, tmp_path / "z")
    for container in (tmp_path / "z").iterdir():
        container.rename(tmp_path / container.name.replace("all", "zz"))
    inventory = take_inventory(tmp_path, match, None)
    assert inventory.repeated == {"0000003": 1}
    assert inventory.conflicting == {"0000003": min(longer, other)}
    entries = {entry.path: entry for entry in inventory.files("0000003")}
    assert inventory.read(entries[same]) == files[same]
    for path in (longer, other):
        with pytest.raises(Rejected, match="conflicting_duplicate"):
            inventory.read(entries[path])


def test_a_member_appended_to_its_tar_again_is_a_repeat(tmp_path: Path) -> None:
    ROUTES["tar"]({"s1/a/scene/B1.tif": b"1", "s1/b/scene/B1.tif": b"1"}, tmp_path)
    with tarfile.open(tmp_path / "all.tar", "a") as tar:
        for path, data in (("s1/a/scene/B1.tif", b"1"), ("s1/b/scene/B1.tif", b"2")):
            header = tarfile.TarInfo(path)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    inventory = take_inventory(tmp_path, match, None)
    assert (inventory.repeated, set(inventory.conflicting)) == ({"a": 1}, {"b"})


def test_what_is_known_of_a_container_is_used_again_until_it_changes(tmp_path: Path) -> None:
    root, work = tmp_path / "a", tmp_path / "work"
    root.mkdir()
    ROUTES["tar.gz"](tree(), root)
    told: list[tuple[str, int, int]] = []
    first = take_inventory(root, match, work, progress=lambda *step: told.append(step))
    assert {name for name, _, _ in told} == {"all.tar.gz"}
    assert told[-1][1] <= told[-1][2] == (root / "all.tar.gz").stat().st_size
    told.clear()
    second = take_inventory(root, match, work, progress=lambda *step: told.append(step))
    assert told == []
    assert second.fingerprint == first.fingerprint
    assert contents(second) == tree()
    ROUTES["tar.gz"](tree(2), root)
    assert contents(take_inventory(root, match, work, progress=lambda *step: told.append(step))) == tree(2)
    assert told != []


def test_a_temporary_inventory_is_private_and_goes_with_its_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    inventory = take_inventory(tmp_path / "a", match, None)
    (folder,) = (tmp_path / "temporary").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    del inventory
    assert list((tmp_path / "temporary").iterdir()) == []
    (tmp_path / "a" / "x.tar").write_bytes(b"no tar")
    with pytest.raises(UnreadableInputError):
        take_inventory(tmp_path / "a", match, None)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("route", ["tar", "tar.gz", "partaa"])
def test_a_cut_container_is_refused_or_with_allow_partial_taken_up_to_the_cut(route: str, tmp_path: Path) -> None:  # C14
    files = tree()
    ROUTES[route](files, tmp_path)
    cut = sorted(tmp_path.iterdir())[-1]
    whole, work = cut.read_bytes(), tmp_path.parent / f"{tmp_path.name}-work"
    counts = set()
    for tenth in range(10):
        cut.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(UnreadableInputError, match=r"all\.tar.*is cut off"):
            take_inventory(tmp_path, match, work)
        try:
            inventory = take_inventory(tmp_path, match, work, allow_partial=True)
        except UnreadableInputError:  # rapidgzip cannot index every torn stream; the message names a way
            assert route != "tar"
            continue
        assert inventory.refused == {"truncated": 1}
        read = 0
        for entry in (entry for key in inventory.keys("labels") for entry in inventory.files(key)):
            with suppress(Rejected):  # what is in the torn end
                assert inventory.read(entry) == files[entry.path]
                read += 1
        counts.add(read)
    assert len(counts) > (route == "tar")
    for missing in (1, 4, 8) if route != "tar" else ():  # the last bytes say how much there should be
        cut.write_bytes(whole[:-missing])
        with pytest.raises(UnreadableInputError, match="cut off"):
            take_inventory(tmp_path, match, work)


def test_a_flipped_bit_in_a_compressed_tar_or_a_zip_is_found(tmp_path: Path) -> None:  # C7, with checksum
    draw = random.Random(0)
    for route in ("tar.gz", "zip"):
        ROUTES[route](tree(1), tmp_path)
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        for _ in range(30):
            data = bytearray(whole)
            data[draw.randrange(20, len(data) - (8 if route == "tar.gz" else 1000))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            with pytest.raises((UnreadableInputError, Rejected)):
                contents(take_inventory(tmp_path, match, None))
        file.unlink()


@pytest.mark.parametrize("level", [1, 6, 9])
def test_members_of_a_packed_tar_with_many_points_are_read_in_any_order(level: int, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [draw.randbytes(5) for _ in range(4000)]
    files = {f"s1/{n:07d}/scene/B1.tif": b"".join(draw.choices(words, k=20_000)) for n in range(60)}
    (tmp_path / "s1.tar.gz").write_bytes(gzip.compress(as_tar(files), level))
    inventory = take_inventory(tmp_path, match, tmp_path / ".work")
    entries = [entry for key in inventory.keys("s1") for entry in inventory.files(key)] * 3
    draw.shuffle(entries)
    assert all(inventory.read(entry) == files[entry.path] for entry in entries)


def test_a_packed_tar_that_is_damaged_after_it_was_listed_is_refused_where_it_is(tmp_path: Path) -> None:
    files = {f"s1/{n}/scene/B1.tif": random.Random(n).randbytes(400_000) for n in range(4)}
    ROUTES["tar.gz"](files, tmp_path)
    (file,) = tmp_path.iterdir()
    inventory, was = take_inventory(tmp_path, match, None), file.stat()
    with file.open("r+b") as stream:
        stream.seek(1_000_000)  # in the third
        stream.write(b"?")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(Rejected, match="unreadable"):
        inventory.read(inventory.files("2")[0])
    for key in "013":
        assert inventory.read(inventory.files(key)[0]) == files[f"s1/{key}/scene/B1.tif"]


@pytest.mark.parametrize(
    ("suffixes", "expected"),
    [
        ((".partaa", ".partac"), "'ab'"),
        ((".partab", ".partac"), "'aa'"),
        ((".part-000", ".part-002"), "'001'"),
        ((".02",), "'00'"),
    ],
)
def test_a_missing_part_is_named(suffixes: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    as_split(tree(1), tmp_path, suffixes)
    with pytest.raises(UnreadableInputError, match=rf"all\.tar\.gz is split.*expected {expected}"):
        take_inventory(tmp_path, match, None)


@pytest.mark.parametrize("name", ["x.tar.xz", "x.tar.bz2", "x.tar.gz.md5", "x.tar.gz.sha256", "x.zarr.zip", ".x.tar", "x.gz"])
def test_a_file_that_is_no_known_container_is_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no container")
    assert take_inventory(tmp_path, match, None).strays == {".": 1}


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArchiveMissingError, match="nowhere is not a folder"):
        take_inventory(tmp_path / "nowhere", match, None)


def test_a_file_larger_than_the_cap_is_not_read(tmp_path: Path) -> None:
    as_folder({"s1/a/scene/B1.tif": bytes(1001)}, tmp_path)
    inventory = take_inventory(tmp_path, match, None)
    with pytest.raises(Rejected, match=r"too_big.*1001 bytes; at most 1000"):
        inventory.read(inventory.files("a")[0], max_bytes=1000)


def test_real_containers_hold_the_real_tree() -> None:
    archives = [SHARED / name for name in ("noldo_real_mini", "noldo_real_mini_targz")]
    if not all(archive.is_dir() for archive in archives):
        pytest.skip("the shared archives are not beside this checkout")

    def any_tif(path: str) -> Match | None:
        return Match("s1", path.split("/")[1]) if path.endswith(".tif") else None

    unpacked, packed = (take_inventory(archive, any_tif, None) for archive in archives)

    def every(inventory: Inventory) -> list[Entry]:
        return [entry for key in inventory.keys("s1") for entry in inventory.files(key)]

    assert [unpacked.read(entry) for entry in every(unpacked)] == [packed.read(entry) for entry in every(packed)]
    assert len(every(packed)) == 384


# Takes an inventory where no file may grow beyond some bytes, as on a full disk.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.inventory.inventory import take_inventory
from cromss_dist.errors import StorageError
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    take_inventory(Path(sys.argv[1]), lambda path: Match("s1", path), Path(sys.argv[2]))
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "full"), [(2_000, "inventory.tmp"), (60_000, ".index")])
def test_a_full_disk_is_told_by_the_file_that_does_not_fit_and_the_same_again_goes_on(
    limit: int, full: str, tmp_path: Path
) -> None:
    root, work = tmp_path / "archive", tmp_path / "work"
    root.mkdir()
    draw = random.Random(0)
    words = [draw.randbytes(16) for _ in range(4000)]
    pixels = b"".join(draw.choices(words, k=500_000))  # the index holds 32 KB of each chunk of 256 KB, as packed data refers back
    (root / "s1.tar.gz").write_bytes(gzip.compress(as_tar({"s1/a/scene/B1.tif": pixels}), 1))
    command = [sys.executable, "-c", ON_A_FULL_DISK, str(root), str(work), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{full})" in done.stdout
    assert str(work) in done.stdout
    inventory = take_inventory(root, lambda path: Match("s1", path), work)
    assert inventory.num_files == 1

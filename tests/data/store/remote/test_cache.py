import errno
import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.data.store.manifest import ShardEntry
from cromss_dist.data.store.remote import cache as cache_module
from cromss_dist.data.store.remote.cache import CachedFiles, ShardCache
from cromss_dist.data.store.remote.remote import Patience, Remote
from cromss_dist.errors import ConfigError, DownloadError, ShardError, StorageError
from tests.data.file_server import FileServer

SIZE = 4096
FILES = {f"shard-{n:06d}.tar": random.Random(n).randbytes(SIZE) for n in range(12)}
SHA256 = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
A, B, C, D = list(FILES)[:4]
IMPATIENT = Patience(tries=3, backoff_s=0.001, stall_s=5, deadline_s=30)


def room_for(num_files: int) -> float:
    return num_files * SIZE / 2**30


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer(dict(FILES)) as server:
        yield server


@pytest.fixture
def remote(server: FileServer) -> Remote:
    return Remote(server.url, IMPATIENT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def get(cache: ShardCache, remote: Remote, name: str) -> bytes:
    return content(cache.open(remote, name, SIZE, SHA256[name]))


def content(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def age(cache: ShardCache, *names: str) -> None:
    """Makes files last used long ago, the first of them longest."""
    for hours, name in enumerate(reversed(names), start=1):
        os.utime(cache.folder / SHA256[name], times=(time.time() - 3600 * hours,) * 2)


def kept(cache: ShardCache) -> set[str]:
    there = {path.name for path in cache.folder.iterdir() if path.suffix != ".lock"}
    return {name for name in FILES if SHA256[name] in there} | (there - set(SHA256.values()))


def test_a_file_is_fetched_once_and_named_by_its_digest(server: FileServer, remote: Remote, folder: Path) -> None:
    for cache in (ShardCache(folder, 1), ShardCache(folder, 1)):
        assert get(cache, remote, A) == FILES[A]
    assert server.requests == {A: 1}
    assert kept(cache) == {A}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_datasets_share_what_they_have_in_common(server: FileServer, remote: Remote, folder: Path) -> None:
    get(ShardCache(folder, 1), remote, A)
    with FileServer({"of-another-name.tar": FILES[A]}) as other:
        opened = ShardCache(folder, 1).open(Remote(other.url, IMPATIENT), "of-another-name.tar", SIZE, SHA256[A])
        assert content(opened) == FILES[A]
        assert other.requests == {}


@pytest.mark.parametrize("fault", ["wrong", "short", "cut", 500])
def test_bytes_that_are_not_the_manifests_never_get_a_name(
    server: FileServer, remote: Remote, folder: Path, fault: str | int
) -> None:
    server.faults[A], server.always = [fault], {A}
    with pytest.raises(DownloadError):
        get(ShardCache(folder, 1), remote, A)
    assert kept(ShardCache(folder, 1)) == set()


def get_in_child(folder: Path, url: str, name: str, failpoint: str) -> None:
    os.environ["CROMSS_FAILPOINT"] = failpoint
    assert get(ShardCache(folder, 1), Remote(url, IMPATIENT), name) == FILES[name]


def child(folder: Path, url: str, name: str, failpoint: str = "") -> Any:
    process = multiprocessing.get_context("spawn").Process(target=get_in_child, args=(folder, url, name, failpoint))
    process.start()
    return process


def test_threads_and_processes_of_a_node_fetch_a_file_once(server: FileServer, remote: Remote, folder: Path) -> None:
    server.faults[A] = [503, 503]  # so that the others come while the first is at it
    processes = [child(folder, server.url, A) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: get(ShardCache(folder, 1), remote, A), range(8)))
    for process in processes:
        process.join(60)
    assert found == [FILES[A]] * 8
    assert [process.exitcode for process in processes] == [0, 0]
    assert server.requests[A] == 3


@pytest.mark.parametrize("place", ["after_open", "before_fsync", "before_replace", "after_replace"])
def test_a_process_killed_while_it_fetches_is_in_nobodys_way(
    server: FileServer, remote: Remote, folder: Path, place: str
) -> None:
    process = child(folder, server.url, A, place)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert get(ShardCache(folder, 1), remote, A) == FILES[A]
    assert kept(ShardCache(folder, 1)) == {A}


def test_what_killed_processes_left_of_other_files_goes_when_room_is_made(remote: Remote, folder: Path) -> None:
    cache = ShardCache(folder, room_for(2))
    get(cache, remote, A)
    (folder / f".{SHA256[B]}.0123456789abcdef.tmp").write_bytes(FILES[B][:100])
    get(cache, remote, C)
    assert kept(cache) == {A, C}


def test_what_was_not_used_for_longest_makes_room(server: FileServer, remote: Remote, folder: Path) -> None:
    cache = ShardCache(folder, room_for(3))
    for name in (A, B, C):
        get(cache, remote, name)
    age(cache, A, B, C)
    get(cache, remote, A)  # a use
    get(cache, remote, D)
    assert kept(cache) == {A, C, D}
    assert cache.num_bytes() == 3 * SIZE
    assert not (folder / f"{SHA256[B]}.lock").exists()


def test_files_that_are_not_the_caches_are_neither_counted_nor_deleted(remote: Remote, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / ("a" * 64)).mkdir()
    theirs = {"thesis.tex": b"x" * SIZE, f"{SHA256[A]}.bak": b"y" * SIZE, ".hidden.tmp": b"z" * SIZE}
    for name, data in theirs.items():
        (folder / name).write_bytes(data)
        os.utime(folder / name, times=(0, 0))
    cache = ShardCache(folder, room_for(1))
    for name in (A, B):
        get(cache, remote, name)
        age(cache, name)
    assert kept(cache) == {B, "a" * 64, *theirs}


def test_a_whole_cache_on_a_read_only_file_system_is_read(
    server: FileServer, remote: Remote, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(folder, 1)
    get(cache, remote, A)
    age(cache, A)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert get(cache, remote, A) == FILES[A]
    assert server.requests == {A: 1}


def test_what_is_open_is_read_to_its_end_though_its_room_went_to_another(remote: Remote, folder: Path) -> None:
    cache = ShardCache(folder, room_for(1))
    opened = [cache.open(remote, name, SIZE, SHA256[name]) for name in FILES]
    assert kept(cache) == {list(FILES)[-1]}
    assert [content(descriptor) for descriptor in opened] == list(FILES.values())


def test_files_that_are_being_fetched_keep_their_room(server: FileServer, remote: Remote, folder: Path) -> None:
    server.faults[A] = ["stall"]
    cache = ShardCache(folder, room_for(1))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(get, cache, Remote(server.url, replace(IMPATIENT, stall_s=1)), A)
        while not server.requests:
            time.sleep(0.01)
        with pytest.raises(StorageError, match=r"took all .* for 0\.1 s, and shard-000001\.tar needs room; raise its limit"):
            get(cache, Remote(remote.url, Patience(deadline_s=0.1)), B)
        assert slow.result(60) == FILES[A]


@pytest.mark.parametrize("target", ["whole", "nothing", "folder"])
def test_a_link_in_the_place_of_a_file_is_not_followed_but_replaced(
    server: FileServer, remote: Remote, folder: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "whole").write_bytes(FILES[B])
    (tmp_path / "folder").mkdir()
    folder.mkdir(mode=0o700)
    (folder / SHA256[A]).symlink_to(tmp_path / target)
    assert get(ShardCache(folder, 1), remote, A) == FILES[A]
    assert (tmp_path / "whole").read_bytes() == FILES[B]
    assert not (folder / SHA256[A]).is_symlink()


def test_room_is_waited_for_while_another_file_is_being_fetched(server: FileServer, remote: Remote, folder: Path) -> None:
    cache = ShardCache(folder, room_for(1))
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda name: get(cache, remote, name), list(FILES)[:6])) == list(FILES.values())[:6]
    assert cache.num_bytes() == SIZE


def test_many_threads_read_right_bytes_under_a_limit_that_holds(
    remote: Remote, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_S", 0.0)
    cache = ShardCache(folder, room_for(5))
    most = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for name in rng.choices(list(FILES), k=25):
            assert get(cache, remote, name) == FILES[name]
            most.append(cache.num_bytes())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(most) <= 5 * SIZE


def test_a_file_of_another_size_is_fetched_anew(server: FileServer, remote: Remote, folder: Path) -> None:
    cache = ShardCache(folder, 1)
    get(cache, remote, A)
    (folder / SHA256[A]).write_bytes(FILES[A][:-1])
    assert get(cache, remote, A) == FILES[A]
    assert server.requests == {A: 2}


def test_discarding_drops_damaged_bytes_and_keeps_whole_ones(server: FileServer, remote: Remote, folder: Path) -> None:
    entries = [ShardEntry(name, 1, SIZE, SHA256[name], "0" * 64) for name in FILES]
    files = CachedFiles(remote, entries, ShardCache(folder, 1))
    path = files.path(0)
    assert content(files.open(0)) == FILES[A]
    assert files.discard(0)
    assert path.read_bytes() == FILES[A]
    path.write_bytes(FILES[B])
    assert files.discard(0)
    assert not path.exists()
    assert files.discard(0)  # another process was first
    assert content(files.open(0)) == FILES[A]
    assert server.requests == {A: 2}


def test_whole_bytes_are_read_from_a_damaged_copy_by_fetching_anew(server: FileServer, remote: Remote, folder: Path) -> None:
    cache = ShardCache(folder, 1)
    assert cache.read(remote, A, SIZE, SHA256[A]) == FILES[A]
    (folder / SHA256[A]).write_bytes(FILES[B])
    assert cache.read(remote, A, SIZE, SHA256[A]) == FILES[A]
    assert server.requests == {A: 2}


def test_a_lock_that_is_held_for_too_long_is_named(remote: Remote, folder: Path) -> None:
    cache, entered, released = ShardCache(folder, 1), threading.Event(), threading.Event()
    get(cache, remote, B)

    def hold() -> None:
        with cache._locked(SHA256[A]):
            entered.set()
            released.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(60)
    with pytest.raises(StorageError, match=f"has held .*{SHA256[A]}.lock for 0.1 s"):
        get(cache, Remote(remote.url, Patience(deadline_s=0.05)), A)
    released.set()
    holder.join()
    assert get(cache, remote, A) == FILES[A]


def test_what_does_not_fit_is_refused(remote: Remote, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"more than the .* GiB of the shard cache .*; raise its limit"):
        get(ShardCache(folder, room_for(1) / 2), remote, A)
    for limit in (0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"limit of {limit} GiB is not allowed"):
            ShardCache(folder, limit)


def test_a_digest_that_is_a_path_is_refused(remote: Remote, folder: Path) -> None:
    for digest in ("../../etc/passwd", "", SHA256[A].upper(), SHA256[A] + "\n"):
        with pytest.raises(ShardError, match="which is none"):
            ShardCache(folder, 1).open(remote, A, SIZE, digest)


def test_a_folder_that_others_can_write_to_is_refused(remote: Remote, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"Others can write to the shard cache .*mode 777"):
        get(ShardCache(folder, 1), remote, A)

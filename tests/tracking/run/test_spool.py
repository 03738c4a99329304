import errno
import json
import os
import threading
from pathlib import Path

import pytest

from cromss_dist.errors import StorageError
from cromss_dist.tracking.run import spool as module
from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool, Tail, read_events, run_id_of, tell


def texts(folder: Path) -> list[str]:
    return [event["text"] for event in read_events(folder)]


def test_lines_are_read_as_they_were_written_in_order(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        for number in range(3):
            spool.append("progress", step=number, metrics={"loss": float("nan") if number == 1 else 1.5})
    events = list(read_events(tmp_path))
    assert [event["step"] for event in events] == [0, 1, 2]
    assert events[0]["metrics"] == {"loss": 1.5}
    assert events[1]["metrics"]["loss"] != events[1]["metrics"]["loss"]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


@pytest.mark.parametrize("length", [1, 70_000], ids=["short", "longer than a block"])
@pytest.mark.parametrize("whole", [0, 2])
def test_what_a_killed_process_left_of_a_line_is_cut(tmp_path: Path, length: int, whole: int) -> None:
    line = json.dumps({"event": "stage", "text": "whole"}) + "\n"
    (tmp_path / EVENTS_FILE).write_text(line * whole + "{" * length)
    tell(tmp_path, "after")
    assert texts(tmp_path) == ["whole"] * whole + ["after"]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def write_half(file: int, data: bytes) -> int:
        if len(data) < 20:  # what is left of the line
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:-10])

    with Spool(tmp_path) as spool:
        spool.append("stage", text="before")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_half)
            with pytest.raises(OSError, match="No space"):
                spool.append("stage", text="x" * 100)
        spool.append("stage", text="after")
    assert texts(tmp_path) == ["before", "after"]


def test_an_error_of_the_disk_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def refuse(file: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "SYNC_S", 0.01)
    spool = Spool(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        spool.append("stage", text="one")
        assert failed.wait(30)
        spool._syncing.join()
    with pytest.raises(OSError, match="Input/output"):
        spool.append("stage", text="two")
    spool.close()


def test_lines_reach_the_disk_without_a_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(module, "SYNC_S", 0.01)

    def sync(file: int) -> None:
        fsync(file)
        synced.set()

    monkeypatch.setattr(os, "fsync", sync)
    with Spool(tmp_path) as spool:
        spool.append("stage", text="one")
        assert synced.wait(30)


def test_a_closed_spool_takes_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.close()
    spool.close()
    with pytest.raises(OSError, match="is closed"):
        spool.append("stage", text="late")
    assert list(read_events(tmp_path)) == []


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    def write(spool: Spool, k: int) -> None:
        for n in range(200):
            spool.append("stage", text=f"{k}-{n}")

    with Spool(tmp_path) as spool:
        threads = [threading.Thread(target=write, args=(spool, k)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(texts(tmp_path)) == sorted(f"{k}-{n}" for k in range(4) for n in range(200))


def test_a_run_has_one_id_of_its_own_for_ever(tmp_path: Path) -> None:
    assert run_id_of(tmp_path) is None
    tell(tmp_path, "waiting for machines")
    assert run_id_of(tmp_path) is None
    ids = set()
    for _ in range(2):
        with Spool(tmp_path) as spool:
            ids.add(spool.begin("name", "cromss"))
            spool.append("stage", text="x" * 100_000)
    assert ids == {run_id_of(tmp_path)}
    assert [event["event"] for event in read_events(tmp_path)].count("run") == 1


def test_a_spool_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        Spool(tmp_path)


@pytest.mark.parametrize("most", [1, 30, 200, -1])
def test_a_tail_gives_each_whole_line_once(tmp_path: Path, most: int) -> None:
    path = tmp_path / EVENTS_FILE
    tail = Tail(path)
    assert tail.read(most) == []
    path.write_text("".join(json.dumps({"n": n, "fill": "x" * (n % 7)}) + "\n" for n in range(50)) + '{"n": 50')
    found = []
    while lines := tail.read(most, synced=True):
        found += [line["n"] for line in lines]
    assert found == list(range(50))
    with path.open("a") as file:
        file.write("}\n")
    assert Tail(path, tail.offset).read(most) == tail.read(most) == [{"n": 50}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).write_text('{"event": "stage"}\n{"event" \x00\n')
    with pytest.raises(StorageError, match=r"events.jsonl was damaged: .* is no event"):
        list(read_events(tmp_path))
    assert [event["event"] for event in read_events(tmp_path, "stage")] == ["stage"], "of these no line is damaged"

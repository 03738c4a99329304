"""What the tools show while they work, on a terminal and in a log."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.inventory.inventory import take_inventory
from tools import progress
from tools.progress import Bars, Rate, finding_files


def test_the_inventory_shows_files_of_the_folder_and_bytes_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_MOVE_EVERY_S", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with finding_files(console) as tell:
        tell(".", 12_000, 0)
        time.sleep(0.15)  # a terminal is drawn ten times a second
        tell("s2c.tar.gz", 0, 48_000_000_000)
        tell("s2c.tar.gz", 6_000_000_000, 48_000_000_000)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "12,000 files" in shown
    assert "Listing s2c.tar.gz" in shown
    assert "6.0 GB of 48.0 GB" in shown


def test_a_real_inventory_is_quick_to_tell(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number:04d}.txt").write_bytes(b"")
    told: list[tuple[str, int, int]] = []
    with finding_files(Console(file=io.StringIO())) as tell:

        def both(path: str, done: int, size: int) -> None:
            told.append((path, done, size))
            tell(path, done, size)

        inventory = take_inventory(tmp_path, lambda path: Match("file", path), None, progress=both)
    assert inventory.num_files == 1000
    assert told == [(".", 1000, 0)]


def test_a_log_has_a_line_now_and_then_and_no_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.05)
    console = Console(file=io.StringIO(), width=120)
    assert isinstance(console.file, io.StringIO)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), Rate("locations"))
    with Bars(console, *columns) as bars:
        task = bars.add_task("Converting", total=3)
        bars.advance(task)
        deadline = time.monotonic() + 10
        while "1/3" not in console.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "Converting 1/3" in console.file.getvalue()
        bars.advance(task, 2)
    lines = console.file.getvalue().splitlines()
    assert lines[-1].startswith("Converting 3/3")
    assert all(line.strip() for line in lines)
    with Bars(silent := Console(file=io.StringIO()), *columns, transient=True) as bars:
        bars.add_task("Reading", total=3)
    assert isinstance(silent.file, io.StringIO)
    assert silent.file.getvalue() == ""

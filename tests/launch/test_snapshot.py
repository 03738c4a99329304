"""The copy of the code in a run's folder."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from cromss_dist.errors import ConfigError
from launch import snapshot
from launch.snapshot import Snapshot

CODE = Snapshot("abc+dirty", {"cromss_dist/__init__.py": b"", "launch/work.py": b"print('here')\n"})


def test_it_has_the_code_of_this_process_and_nothing_else() -> None:
    taken = Snapshot.take()
    assert taken.files["launch/snapshot.py"] == (Path(__file__).resolve().parents[2] / "launch" / "snapshot.py").read_bytes()
    assert all(name.startswith(("cromss_dist/", "launch/")) for name in taken.files)
    assert not [name for name in taken.files if "__pycache__" in name]
    assert list(taken.files) == sorted(taken.files)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that nobody has touched for an hour."""
    root = CODE.write(tmp_path)
    for path in root.rglob("*.py"):
        os.utime(path, (time.time() - 3600,) * 2)
    monkeypatch.setattr(snapshot, "ROOT", root)
    return root


def test_code_that_is_being_edited_is_taken_whole_or_not_at_all(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Snapshot.take().files == CODE.files
    edited = checkout / "launch" / "work.py"
    slept: list[float] = []

    def edit(seconds: float) -> None:
        slept.append(seconds)
        edited.write_text(f"print({len(slept)})\n")
        if len(slept) == 3:
            os.utime(edited, (time.time() - 3600,) * 2)

    edited.write_text("print(0)\n")
    monkeypatch.setattr(time, "sleep", edit)
    assert Snapshot.take().files["launch/work.py"] == b"print(3)\n"
    monkeypatch.setattr(snapshot, "STILL_WAIT_S", 0.0)
    edited.write_text("print(5)\n")
    with pytest.raises(ConfigError, match="has changed for 0 s while it was copied"):
        Snapshot.take()
    edited.write_text("def half(\n")
    os.utime(edited, (time.time() - 3600,) * 2)
    with pytest.raises(ConfigError, match=r"launch/work\.py is no Python"):
        Snapshot.take()


def test_a_copy_that_was_edited_is_not_taken_for_the_code(tmp_path: Path) -> None:
    (CODE.write(tmp_path) / "launch" / "work.py").write_text("print('edited')")
    assert CODE.write(tmp_path).name == "code-2"


def test_python_runs_it_and_not_the_checkout_and_knows_its_commit(tmp_path: Path) -> None:
    folder = Snapshot("0123+dirty", Snapshot.take().files).write(tmp_path)
    program = "import cromss_dist.tracking.revision as r, launch.snapshot as s; print(r.__file__, s.__file__, r.git_revision())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert done.stdout.split() == [
        str(folder / "cromss_dist/tracking/revision.py"),
        str(folder / "launch/snapshot.py"),
        "0123+dirty",
    ], done.stderr


def test_the_same_code_lies_there_once_and_other_code_beside_it(tmp_path: Path) -> None:
    other = Snapshot("abc", {**CODE.files, "launch/work.py": b"print('there')\n"})
    places = [code.write(tmp_path).name for code in (CODE, CODE, other, other, CODE)]
    assert places == ["code", "code", "code-2", "code-2", "code-3"], "the newest is what runs"
    assert (tmp_path / "code-2/launch/work.py").read_bytes() == b"print('there')\n"
    record = json.loads((tmp_path / "code/code.json").read_text())
    assert record == {"revision": "abc+dirty", "sha256": CODE.sha256}


def test_its_digest_is_of_names_and_contents() -> None:
    moved = {"cromss_dist/__init__.p": b"", "ylaunch/work.py": CODE.files["launch/work.py"]}
    assert len({CODE.sha256, Snapshot("", moved).sha256, Snapshot("", {}).sha256}) == 3
    assert Snapshot("other", CODE.files).sha256 == CODE.sha256


def test_its_zip_is_the_same_bytes_every_time_and_has_what_is_added() -> None:
    packed = CODE.zipped({"job.json": b"{}"})
    assert packed == CODE.zipped({"job.json": b"{}"})
    with zipfile.ZipFile(io.BytesIO(packed)) as file:
        assert {name: file.read(name) for name in file.namelist()} == {**CODE.files, "code.json": CODE.record, "job.json": b"{}"}

"""The copy of the code in a run's folder."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from launch.snapshot import Snapshot

CODE = Snapshot("abc+dirty", {"cromss_dist/__init__.py": b"", "launch/work.py": b"print('here')\n"})


def test_it_has_the_code_of_this_process_and_nothing_else() -> None:
    taken = Snapshot.take()
    assert taken.files["launch/snapshot.py"] == (Path(__file__).resolve().parents[2] / "launch" / "snapshot.py").read_bytes()
    assert all(name.startswith(("cromss_dist/", "launch/")) for name in taken.files)
    assert not [name for name in taken.files if "__pycache__" in name]
    assert list(taken.files) == sorted(taken.files)


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

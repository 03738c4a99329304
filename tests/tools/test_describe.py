import os
import subprocess
import sys
from pathlib import Path

import pytest

from cromss_dist.data.archives.layout.description import load
from tests.data.invented_archives import DAYS, INVENTED, Pixel

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("describe") / "My Towns"
    INVENTED["towns"].write(root, Pixel())
    (root / "bonn" / f"s2_{DAYS[3]}.tif").write_bytes(b"")
    return root


def describe(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "describe.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_look_says_what_is_there_and_writes_a_draft(archive: Path, tmp_path: Path) -> None:
    done = describe(archive, "--out", tmp_path / "towns.yaml")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "48 files" in said
    assert "<word>/s2_<time>.tif" in said
    assert "4 with s1, 4 with s2, 4 with label" in said
    assert "Dates: 20200323 to 20201229" in said
    assert f"Odd: files of no bytes (1): bonn/s2_{DAYS[3]}.tif" in said
    assert "values.label.classes (edit)" in said
    assert f"--description {tmp_path / 'towns.yaml'}" in said
    assert load(tmp_path / "towns.yaml").name == "towns"
    again = describe(archive, "--out", tmp_path / "towns.yaml")
    assert again.returncode == 4
    assert again.stderr.startswith("OutputExistsError: ")


def test_without_a_file_the_draft_is_printed(archive: Path, tmp_path: Path) -> None:
    said = describe(archive).stdout
    (tmp_path / "printed.yaml").write_text(said[said.index("name: ") :])
    assert load(tmp_path / "printed.yaml").name == "my_towns"


def test_what_cannot_be_drafted_is_shown_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    failed = describe(tmp_path)
    assert failed.returncode == 11
    assert "notes.txt" in failed.stdout
    assert failed.stderr.startswith("ArchiveEmptyError: ")
    assert describe(tmp_path / "nowhere").returncode == 10


def test_a_container_that_was_cut_is_refused(archive: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "czf", tmp_path / "a.tar.gz", "."], cwd=archive, check=True)
    data = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) // 2])
    failed = describe(tmp_path)
    assert failed.returncode == 13
    assert "a.tar.gz" in failed.stderr


def test_a_reader_that_has_read_enough_ends_it_as_documented(archive: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "describe.py"), str(archive)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_lmdbs_are_said_to_need_no_description_and_a_folder_must_be_there_for_the_draft(tmp_path: Path) -> None:
    (tmp_path / "archive" / "s1.lmdb").mkdir(parents=True)
    (tmp_path / "archive" / "s1.lmdb" / "data.mdb").write_bytes(b"0")
    failed = describe(tmp_path / "archive")
    assert failed.returncode == 11
    assert "need no description" in failed.stderr
    assert describe(tmp_path / "archive", "--out", tmp_path / "nowhere" / "a.yaml").returncode == 2

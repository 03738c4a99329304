"""The folder that a conversion works in: who may have it, and what of it stays."""

import os
from pathlib import Path

import pytest

from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.conversion.workplace import claimed
from cromss_dist.errors import OutputExistsError
from tests.data.conversions import SMALL, tree
from tests.data.fake_source import FakeSource
from tests.forkserver import FORKSERVER


def fail_at_work(out: Path, error: type[BaseException], *files: str) -> None:
    """A converter that ends with an error and leaves these files."""
    with claimed(out) as work:
        for file in files:
            (work.folder / file).parent.mkdir(exist_ok=True)
            (work.folder / file).touch()
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_took_the_reader_of_the_archive_long_outlives_an_error_and_a_dry_run(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error) as raised:
        fail_at_work(tmp_path / "out", error, "inputs/containers/a.members", "inputs/containers/b.tmp")
    assert "found in the archive's containers is kept in" in raised.value.__notes__[0]
    with claimed(tmp_path / "out") as work:
        assert [path.name for path in work.inputs.rglob("*")] == ["containers", "a.members"]
    assert os.listdir(tmp_path) == [".out.partial"]
    convert(FakeSource(3), tmp_path / "out", **SMALL)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_found_again_at_once_does_not_stay(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:  # noqa: PT011
        fail_at_work(tmp_path / "out", OSError, "inputs/inventory.sqlite", "inputs/containers/half.tmp", ".plan.json.01.tmp")
    assert not hasattr(raised.value, "__notes__")
    assert os.listdir(tmp_path) == []


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """Whatever is in the folder is removed at the end."""
    (tmp_path / "home" / "dear").mkdir(parents=True)
    (tmp_path / ".out.partial").symlink_to(tmp_path / "home")
    with pytest.raises(OutputExistsError, match=r"\.out\.partial is needed as a folder"), claimed(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "home") == ["dear"]


@pytest.mark.parametrize("restart", [False, True])
def test_an_output_that_a_crash_left_aside_is_put_back_before_anything_else(tmp_path: Path, restart: bool) -> None:
    """On a file system that cannot swap folders, killed between the two renames."""
    out = tmp_path / "out"
    convert(FakeSource(3), out, **SMALL)  # type: ignore[arg-type]
    old = tree(out)
    (tmp_path / ".out.partial").mkdir()
    out.rename(tmp_path / ".out.partial" / "replaced")
    with pytest.raises(OutputExistsError, match="is there already"), claimed(out, restart=restart):
        pass
    assert tree(out) == old
    assert os.listdir(tmp_path) == ["out"]


def _contend(folder: Path, times: int) -> None:
    for number in range(times):
        try:
            with claimed(folder / "out") as work:
                inside = work.inputs / "containers"
                inside.mkdir()  # fails where another one is in here too
                (inside / "a.tmp").write_text("")
                (inside / "a.tmp").unlink()
                inside.rmdir()
                (folder / f"{os.getpid()}-{number}").touch()
        except OutputExistsError:
            continue


@pytest.mark.parametrize("times", [30, pytest.param(3000, marks=pytest.mark.slow)])
def test_never_are_two_at_work_however_quickly_they_come_and_go(tmp_path: Path, times: int) -> None:
    processes = [FORKSERVER.Process(target=_contend, args=(tmp_path, times)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert os.listdir(tmp_path)
    assert not (tmp_path / ".out.partial").exists()

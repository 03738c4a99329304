"""What a command prints and exits with."""

import errno
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from cromss_dist import errors
from cromss_dist.errors import CromssError, main_guard

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CromssError)]


def test_exit_codes_are_distinct() -> None:
    stated = [kind for kind in KINDS if "exit_code" in vars(kind)]  # a kind of another error has that one's code
    codes = {kind.exit_code for kind in stated}
    assert len(codes) == len(stated) >= 15
    assert 0 not in codes


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_becomes_one_line_and_its_exit_code(kind: type[CromssError], capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise kind("what, the value, what to do.")

    assert main_guard(main) == kind.exit_code
    assert capsys.readouterr().err == f"{kind.__name__}: what, the value, what to do.\n"


def test_a_full_disk_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/shard-000000.tar")

    assert main_guard(main) == errors.StorageError.exit_code
    assert capsys.readouterr().err.startswith("StorageError: No space left on device (/data/shard-000000.tar). Check")


def test_success_interruption_and_bugs() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def broken() -> None:
        raise AssertionError("a bug keeps its traceback")

    assert main_guard(lambda: None) == 0
    assert main_guard(lambda: 3) == 3
    assert main_guard(interrupted) == 130
    with pytest.raises(AssertionError):
        main_guard(broken)


def test_a_reader_that_went_away_ends_the_command_silently() -> None:
    code = "import sys; from cromss_dist.errors import main_guard; sys.exit(main_guard(lambda: print('x' * 10**6)))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_a_folder_in_the_way_is_a_storage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_guard(lambda: tmp_path.write_text("x") and None) == 3
    assert str(tmp_path) in capsys.readouterr().err

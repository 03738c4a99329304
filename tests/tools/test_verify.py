import functools
import json
from pathlib import Path

import pytest

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.errors import main_guard
from tests.data.tiny_archive import write_archive
from tools.verify import main


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "archive")


@pytest.fixture
def dataset(archive: Path, tmp_path: Path) -> Path:
    return convert(open_archive(archive), tmp_path / "dataset", write="both").folder


def test_a_whole_dataset_ends_with_0_and_says_so(dataset: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--deep"], ["--source", str(archive), "--description", "noldo_s12"]):
        assert main_guard(functools.partial(main, [str(dataset), *options])) == 0
        assert "is as it was written, digest" in capsys.readouterr().out


def test_a_damaged_dataset_ends_with_15_and_a_report_that_names_the_file(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "cube.zarr" / "label" / "c.0.0.0.0").unlink()
    assert main_guard(lambda: main([str(dataset), "--report", str(tmp_path / "report.json")])) == 15
    told = capsys.readouterr()
    assert "cube.zarr/label/c.0.0.0.0: is missing" in told.out
    assert "has 1 problem" in told.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [problem["file"] for problem in report["problems"]] == ["cube.zarr/label/c.0.0.0.0"]


def test_a_folder_that_is_no_dataset_ends_with_15(tmp_path: Path) -> None:
    assert main_guard(lambda: main([str(tmp_path)])) == 15


def test_a_description_without_a_source_is_refused(dataset: Path) -> None:
    assert main_guard(lambda: main([str(dataset), "--description", "noldo_s12"])) == 2


def test_a_source_that_is_not_there_ends_with_10(dataset: Path, tmp_path: Path) -> None:
    assert main_guard(lambda: main([str(dataset), "--source", str(tmp_path / "nowhere")])) == 10

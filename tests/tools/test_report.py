import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.reporting.report import measure, write_report
from cromss_dist.data.sample import Sample
from tests.data.fake_source import FakeSource, spec_of

REPOSITORY = Path(__file__).resolve().parents[2]


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "report.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_report_is_a_page_a_table_and_pictures_the_same_for_any_workers(synthetic_shards: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        done = report(synthetic_shards, "--out", tmp_path / workers, "--workers", workers, "--sheet", "2")
        assert done.returncode == 0, done.stderr
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / w).iterdir()} for w in ("1", "2"))
    assert one == two
    assert set(one) == {"report.md", "quality.csv", "contact_sheet.png", "map.png", "class_shares.png", "quality.png"}
    page = one["report.md"].decode()
    assert all(f"({name})" in page for name in one if name != "report.md")
    assert "12 locations x 4 seasons" in page
    with (tmp_path / "1" / "quality.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 48


def test_a_sample_is_measured_and_said_to_be_one(synthetic_shards: Path, tmp_path: Path) -> None:
    assert report(synthetic_shards, "--out", tmp_path / "out", "--sample", "3", "--workers", "1").returncode == 0
    assert "3 of 12, drawn by seed" in (tmp_path / "out" / "report.md").read_text()
    assert len((tmp_path / "out" / "quality.csv").read_text().splitlines()) == 13


def test_without_places_there_is_no_map(tmp_path: Path) -> None:
    class Nowhere(FakeSource):
        def read(self, key: str) -> Sample:
            sample = super().read(key)
            return replace(sample, metadata={**sample.metadata, "lon": None, "lat": None})

    convert(Nowhere(2, spec=spec_of(num_seasons=1)), tmp_path / "out")
    write_report(tmp_path / "out", measure(tmp_path / "out", None, 0, 1), tmp_path / "report", sheet=2, seed=0)
    assert not (tmp_path / "report" / "map.png").exists()
    assert "there is no map" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(("arguments", "code"), [(["--sample", "0"], 2), (["--workers", "0"], 2), (["--sheet", "0"], 2)])
def test_wrong_numbers_have_their_exit_code_and_leave_nothing(
    synthetic_shards: Path, tmp_path: Path, arguments: list[str], code: int
) -> None:
    failed = report(synthetic_shards, "--out", tmp_path / "out", *arguments)
    assert failed.returncode == code, failed.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_no_dataset_or_is_there_already_is_refused(synthetic_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert report(synthetic_shards, "--out", tmp_path / "out").returncode == 4
    failed = report(tmp_path, "--out", tmp_path / "other")
    assert failed.returncode == 15
    assert failed.stderr.startswith("ShardError: ")

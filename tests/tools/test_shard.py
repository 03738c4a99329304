import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.tiny_archive import LABEL, S2_FOLDER, Damage, cut, write_archive, write_tif

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("tool") / "archive")


def shard(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "shard.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_run_prints_ledger_and_classes_and_a_second_one_is_refused(archive: Path, tmp_path: Path) -> None:
    done = shard(archive, tmp_path / "out", "--shard-size-mib", "0.3", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "3 samples in 2 shards" in done.stdout
    assert "flooded_vegetation" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    again = shard(archive, tmp_path / "out")
    assert again.returncode == 4
    assert again.stderr.startswith("OutputExistsError: ")
    assert shard(archive, tmp_path / "out", "--overwrite").returncode == 0


def _cut_band(root: Path) -> None:
    cut(root / S2_FOLDER / "B3.tif", 0.5)


def _empty_label(root: Path) -> None:
    write_tif(root / LABEL, np.full((48, 48), 255, np.uint8))


def _remove_metadata_braces(root: Path) -> None:
    (root / S2_FOLDER / "metadata.json").write_text("{")


@pytest.mark.parametrize(("damage", "code"), [(_cut_band, 13), (_empty_label, 14), (_remove_metadata_braces, 12)])
def test_rejected_inputs_have_their_exit_codes_and_leave_nothing(tmp_path: Path, damage: Damage, code: int) -> None:
    root = write_archive(tmp_path / "archive", ("0000012",))
    damage(root)
    failed = shard(root, tmp_path / "out")
    assert failed.returncode == code, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "0000012" in failed.stderr
    assert os.listdir(tmp_path) == ["archive"]


def test_missing_and_empty_archives_and_wrong_arguments_have_their_exit_codes(archive: Path, tmp_path: Path) -> None:
    for folder in ("s1", "s2c", "dw_noisy_labels"):
        (tmp_path / "empty" / folder).mkdir(parents=True)
    assert shard(tmp_path / "nowhere", tmp_path / "out").returncode == 10
    assert shard(tmp_path / "empty", tmp_path / "out").returncode == 11
    assert shard(archive, tmp_path / "out", "--max-reject-fraction", "2").returncode == 2
    assert os.listdir(tmp_path) == ["empty"]


def test_an_output_inside_the_archive_and_a_dataset_as_archive_are_told_apart(archive: Path, tmp_path: Path) -> None:
    inside = shard(archive, archive / "out")
    assert (inside.returncode, (archive / "out").exists()) == (2, False)
    assert shard(archive, tmp_path / "out", "--workers", "1").returncode == 0
    again = shard(tmp_path / "out", tmp_path / "again")
    assert again.returncode == 10
    assert "looks like a dataset" in again.stderr


def test_help_names_arguments_and_exit_codes() -> None:
    text = shard("--help").stdout
    assert all(word in text for word in ("ARCHIVE", "--shard-size-mib", "--max-reject-fraction", "Exit codes", "ledger.jsonl"))


def test_a_dry_run_prints_what_it_would_take_and_writes_nothing(archive: Path, tmp_path: Path) -> None:
    done = shard(archive, tmp_path / "out", "--dry-run", "--write", "both")
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout for word in ("bytes in", "bytes out", "free on that disk", "parts", "time", "Nothing was written.")
    )
    assert os.listdir(tmp_path) == []


def test_a_cube_is_written_beside_the_shards_and_both_can_be_added_to(archive: Path, tmp_path: Path) -> None:
    assert shard(archive, tmp_path / "out", "--write", "both").returncode == 0
    other = write_archive(tmp_path / "other", ("0000500",))
    done = shard(other, tmp_path / "out", "--append")
    assert done.returncode == 0, done.stderr
    assert "4 samples in 2 shards and a cube" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]

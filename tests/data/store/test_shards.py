import gc
import hashlib
import io
import json
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.conversion.plan import locations_per_part
from cromss_dist.data.store.manifest import read_manifest
from cromss_dist.errors import (
    ConfigError,
    EmptyLabelError,
    OutputExistsError,
    RejectedInputsError,
    UnreadableInputError,
)
from cromss_dist.schema import NORMALISATION
from tests.data.tiny_archive import KEYS, LABEL, S2_FOLDER, S2_SCENES, TRAPS, append_line, cut, write_tif

ARRAYS = ("s1", "s2_10m", "s2_20m", "s2_60m", "label", "reference", "kind")


def ledger(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_plain_webdataset_opens_the_shards_with_equal_arrays(shards: Path, archive_template: Path) -> None:
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    assert len(urls) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset 1.0.2 leaves closing its files to the collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    assert [sample["__key__"] for sample in samples] == list(KEYS)
    archive = open_archive(archive_template)
    for sample in samples:
        expected = archive.read(sample["__key__"])
        assert [name for name in sample if not name.startswith("__")] == ["json", *(f"{name}.npy" for name in ARRAYS)]
        assert sample["json"] == expected.metadata
        for name in ARRAYS:
            np.testing.assert_array_equal(sample[f"{name}.npy"], expected.arrays[name])


def test_members_have_a_fixed_order_and_fixed_headers(shards: Path) -> None:
    with tarfile.open(shards / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:8]] == [f"{KEYS[0]}.json", *(f"{KEYS[0]}.{name}.npy" for name in ARRAYS)]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}
    assert (shards / "shard-000000.tar").stat().st_size % tarfile.RECORDSIZE == 0


def test_equal_input_gives_equal_bytes(shards: Path, archive_root: Path, tmp_path: Path) -> None:
    convert(open_archive(archive_root), tmp_path / "again", shard_size_mib=0.3)
    assert contents(tmp_path / "again") == contents(shards)


def test_a_tar_has_the_size_it_is_planned_to_have(shards: Path, archive_template: Path) -> None:
    spec = open_archive(archive_template).spec
    assert locations_per_part(spec, 0.3) == 2
    assert locations_per_part(spec, 0.001) == 1
    assert all(path.stat().st_size <= 0.3 * 2**20 for path in shards.glob("*.tar"))


def test_manifest_states_normalisation_counts_and_statistics(shards: Path, archive_template: Path) -> None:
    manifest = read_manifest(shards)
    archive = open_archive(archive_template)
    samples = [archive.read(key) for key in KEYS]
    assert manifest["normalisation"]["s2"]["digest"] == NORMALISATION["s2"].digest
    assert manifest["normalised_by"] == {"s1": "converter", "s2": "converter"}
    labels = np.stack([sample.arrays["label"] for sample in samples])
    assert manifest["class_counts"][2]["crops"] == int((labels[:, 2] == 4).sum())
    red = np.stack([sample.arrays["s2_10m"][:, 2] for sample in samples]).astype(np.float64)
    assert manifest["band_statistics"]["s2"]["B4"]["mean"] == pytest.approx(red.mean(), abs=1e-5)
    assert manifest["band_statistics"]["s2"]["B4"]["std"] == pytest.approx(red.std(), abs=1e-5)
    assert manifest["ledger"]["sha256"] == contents(shards)["ledger.jsonl"]


def test_uint8_archives_are_stored_as_they_are_and_say_so(uint8_archive: Path, tmp_path: Path) -> None:
    convert(open_archive(uint8_archive), tmp_path / "out")
    assert read_manifest(tmp_path / "out")["normalised_by"] == {"s1": "archive", "s2": "archive"}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_line_and_the_ledger_adds_up(archive_root: Path, tmp_path: Path, trap: str) -> None:
    reason, damage = TRAPS[trap]
    damage(archive_root)
    summary = convert(open_archive(archive_root), tmp_path / "out", max_reject_fraction=0.5)
    lines = [line for line in ledger(tmp_path / "out") if line["status"] == "rejected"]
    assert [(line["key"], line["reason"]) for line in lines] == [("0000012", reason)]
    counts = read_manifest(tmp_path / "out")["ledger"]
    assert counts["reasons"] == {reason: 1}
    assert counts["inputs"] == counts["written"] + counts["rejected"] + counts["duplicate"] == len(ledger(tmp_path / "out"))
    assert summary.num_samples == counts["written"] == 2


def test_a_repeated_line_is_a_duplicate_and_written_once(archive_root: Path, tmp_path: Path) -> None:
    append_line(archive_root, "12", *S2_SCENES)
    summary = convert(open_archive(archive_root), tmp_path / "out")
    assert summary.ledger == {"inputs": 4, "written": 3, "duplicate": 1, "rejected": 0}
    assert [(line["key"], line["status"]) for line in ledger(tmp_path / "out")][1:3] == [
        ("0000012", "written"),
        ("0000012", "duplicate"),
    ]


def test_a_shard_without_samples_is_not_written(archive_root: Path, tmp_path: Path) -> None:
    cut(archive_root / S2_FOLDER / "B3.tif", 0.5)
    convert(open_archive(archive_root), tmp_path / "out", shard_size_mib=0.001, max_reject_fraction=0.5)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000002.tar"]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda r: cut(r / S2_FOLDER / "B3.tif", 0.5), UnreadableInputError),
        (lambda r: write_tif(r / LABEL, np.full((48, 48), 255, np.uint8)), EmptyLabelError),
        (lambda r: shutil.rmtree(r / "s1" / "0000012"), RejectedInputsError),
    ],
)
def test_too_many_rejects_stop_early_name_the_path_and_leave_nothing(
    archive_root: Path, tmp_path: Path, damage: Callable[[Path], object], error: type[RejectedInputsError]
) -> None:
    damage(archive_root)
    before = sorted(os.listdir(tmp_path))
    seen: list[str] = []
    with pytest.raises(RejectedInputsError, match="0000012") as raised:
        convert(open_archive(archive_root), tmp_path / "out", progress=lambda key, _: seen.append(key))
    assert type(raised.value) is error
    assert seen == ["0000003", "0000012"]
    assert sorted(os.listdir(tmp_path)) == before


def test_an_interrupt_leaves_nothing(archive_root: Path, tmp_path: Path) -> None:
    def interrupt(key: str, status: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(open_archive(archive_root), tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == ["archive"]


def test_an_output_that_is_there_is_kept_unless_it_is_ours_and_may_go(archive_root: Path, tmp_path: Path) -> None:
    archive = open_archive(archive_root)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            convert(archive, out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "precious"
    shutil.rmtree(out)
    first = convert(archive, out).digest
    assert convert(archive, out, overwrite=True).digest == first
    assert sorted(os.listdir(tmp_path)) == ["archive", "out"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"shard_size_mib": 0},
        {"shard_size_mib": float("inf")},
        {"max_reject_fraction": 1.5},
        {"max_reject_fraction": float("nan")},
    ],
)
def test_arguments_out_of_range_are_config_errors(archive_template: Path, tmp_path: Path, arguments: dict[str, float]) -> None:
    archive = open_archive(archive_template)
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        convert(archive, tmp_path / "out", **arguments)  # type: ignore[arg-type]


def test_a_link_to_shards_is_not_replaced_and_nothing_is_left(shards: Path, archive_template: Path) -> None:
    link = shards.with_name("link")
    link.symlink_to(shards)
    before = contents(shards)
    with pytest.raises(OutputExistsError, match=f"is a link.*{shards}"):
        convert(open_archive(archive_template), link, overwrite=True)
    assert contents(shards) == before
    assert sorted(os.listdir(shards.parent)) == ["link", "shards"]


def test_payloads_are_plain_npy_files(shards: Path) -> None:
    with tarfile.open(shards / "shard-000000.tar") as tar:
        file = tar.extractfile(f"{KEYS[1]}.label.npy")
        assert file is not None
        assert np.load(io.BytesIO(file.read()), allow_pickle=False).shape == (4, 48, 48)

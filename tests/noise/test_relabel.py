"""Relabelled shards: nothing but the label differs, and the manifest says why."""

from pathlib import Path

import numpy as np
import pytest

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.manifest import read_manifest
from cromss_dist.errors import ConfigError, InputChangedError
from cromss_dist.noise.relabel import RelabelledArchive, relabel
from cromss_dist.noise.rule import Rule
from tests.noise.conftest import Some

RULE = Rule(doubt_below=0.2, replace_above=0.3, drop=True)


def test_a_rule_that_doubts_nothing_gives_the_same_bytes(
    dataset: StoredArchive, observations: StoredArchive, tmp_path: Path
) -> None:
    folder = relabel(dataset, observations, Rule(0, 1), tmp_path / "same").folder
    old = Path(dataset.location)
    names = sorted(path.name for path in old.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len([name for name in names if name.endswith(".tar")]) == 2
    for name in names:
        if name != "manifest.json":
            assert (folder / name).read_bytes() == (old / name).read_bytes(), name
    before, after = read_manifest(old), read_manifest(folder)
    origin = after.pop("origin")
    assert {name for name in before if before[name] != after[name]} == {"digest"}
    assert (origin["dataset"], origin["observations"]) == (dataset.digest, observations.digest)


def test_nothing_but_the_labels_differs_and_they_follow_the_rule(
    dataset: StoredArchive, observations: StoredArchive, tmp_path: Path
) -> None:
    written = relabel(dataset, observations, RULE, tmp_path / "cleaned")
    cleaned = StoredArchive.of(written.folder)
    num_changed = 0
    for key in dataset.keys:
        old, new, said = dataset.read(key), cleaned.read(key), observations.read(key).arrays
        assert new.metadata == old.metadata
        of_pixel = [said[name] for name in ("suggested", "label_confidence", "suggested_confidence")]
        expected = RULE.judge(old.arrays["label"], *of_pixel).cleaned
        assert np.array_equal(new.arrays.pop("label"), expected)
        num_changed += int(not np.array_equal(old.arrays.pop("label"), expected))
        for name, pixels in old.arrays.items():
            assert np.array_equal(new.arrays[name], pixels), name
    assert num_changed == written.manifest["ledger"]["notes"]["relabelled"] > 0
    origin = written.manifest["origin"]
    assert origin["rule"] == {"doubt_below": 0.2, "replace_above": 0.3, "drop": True}
    assert cleaned.dataset.archives[cleaned.digest]["origin"] == origin


def test_the_cube_of_another_dataset_is_refused(dataset: StoredArchive, observations: StoredArchive, tmp_path: Path) -> None:
    other = StoredArchive.of(convert(Some(dataset.location, dataset.digest), tmp_path / "other", write="cube").folder)
    with pytest.raises(ConfigError, match="give the dataset that the observatory looked at"):
        relabel(other, observations, RULE, tmp_path / "cleaned")
    assert not (tmp_path / "cleaned").exists()


def test_what_is_read_is_never_replaced(dataset: StoredArchive, observations: StoredArchive) -> None:
    for source in (dataset, observations):
        with pytest.raises(ConfigError, match="is the dataset that is read"):
            relabel(dataset, observations, RULE, Path(source.location), overwrite=True)


def test_a_cube_of_other_labels_is_refused(
    dataset: StoredArchive, observations: StoredArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RelabelledArchive(dataset, observations, RULE)
    seen = observations.read(dataset.keys[0])
    seen.arrays["label"] = (seen.arrays["label"] + 1) % 9
    monkeypatch.setattr(StoredArchive, "read", lambda self, key: seen if self == observations else _read(self, key))
    with pytest.raises(InputChangedError, match="has other labels"):
        source.read(dataset.keys[0])


_read = StoredArchive.read

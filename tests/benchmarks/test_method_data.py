"""The datasets of the proof, and how far single pixels give their classes away."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]

from benchmarks.method.data import Truth, dataset, make_datasets, parts_of
from benchmarks.method.plan import SIZES
from benchmarks.method.separability import NEIGHBOURS, nearest_classes, separability
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.store.open import open_dataset
from cromss_dist.schema import LABEL_ARRAY, REFERENCE_ARRAY


def test_truth_has_the_reference_as_its_label_and_tells_nothing_of_the_noise(synthetic_archive: Path) -> None:
    archive = open_archive(synthetic_archive)
    truth = Truth(archive)
    noisy, clean = archive.read(archive.keys[1]), truth.read(archive.keys[1])
    assert np.array_equal(clean.arrays[LABEL_ARRAY], noisy.arrays[REFERENCE_ARRAY])
    assert not np.array_equal(clean.arrays[LABEL_ARRAY], noisy.arrays[LABEL_ARRAY])
    assert set(clean.arrays) == {"s1", "s2_10m", "s2_20m", "s2_60m", LABEL_ARRAY} == set(truth.spec.names)
    assert all(np.array_equal(clean.arrays[name], noisy.arrays[name]) for name in set(clean.arrays) - {LABEL_ARRAY})
    assert truth.fingerprint != archive.fingerprint


def test_a_tile_is_one_season_of_a_place_and_places_take_turns(synthetic_archive: Path, tmp_path: Path) -> None:
    archive = open_archive(synthetic_archive)
    tiles = open_dataset(convert(Truth(archive, one_season=True), tmp_path / "tiles").folder)
    assert (tiles.num_seasons, len(tiles.locations)) == (1, 12)
    for number in (0, 5):
        whole = archive.read(tiles.locations[number])
        label, s1 = np.empty(tiles.shape(LABEL_ARRAY), np.uint8), np.empty(tiles.shape("s1"), np.uint8)
        tiles.read_into(number, 0, {LABEL_ARRAY: label, "s1": s1})
        assert np.array_equal(label[0], whole.arrays[REFERENCE_ARRAY][number % 4])
        assert np.array_equal(s1, whole.arrays["s1"][number % 4])


def test_the_nearest_neighbours_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.random((400, 3), np.float32), rng.random((1200, 3), np.float32)
    known = (train[:, 0] * 4).astype(np.int64)
    oracle = KNeighborsClassifier(NEIGHBOURS).fit(train, known)
    # Equal votes are rare with 25; scikit-learn takes the first class, too.
    assert (nearest_classes(train, known, test, 4) == oracle.predict(test)).mean() > 0.995


@pytest.mark.slow
def test_noise_changes_the_labels_alone_and_is_what_was_asked_for(tmp_path: Path) -> None:
    size = SIZES["smoke"]
    told = {name: make_datasets(tmp_path, size, *name, Console(quiet=True)) for name in parts_of(size)}
    assert not (tmp_path / "archives" / "pretraining-default").exists()
    noisy, clean = (open_dataset(dataset(tmp_path, name)) for name in ("default", "clean"))
    assert noisy.locations == clean.locations
    assert 0.25 < told["pretraining", "default"]["report"]["noise_rate"] < 0.4
    scores = separability(dataset(tmp_path, "clean"), dataset(tmp_path, "test-tiles"))
    assert scores["s1"]["oa"] < scores["s2"]["oa"] < scores["both"]["oa"] < 0.9

"""The cube against the network's own words, its promises, and what is refused."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.sample import from_measure
from cromss_dist.data.store.cube.writer import open_cube
from cromss_dist.data.store.manifest import read_manifest
from cromss_dist.data.store.verify.verify import verify
from cromss_dist.errors import BandError, CheckpointError, ConfigError, OutputExistsError
from cromss_dist.noise.observatory import Observatory, look, observe, open_observations
from cromss_dist.noise.segmenter import Segmenter, _network, images_of
from cromss_dist.schema import IGNORE
from tests.noise.conftest import NUM_LOCATIONS, write_network

T = TypeVar("T")
J = TypeVar("J")
R = TypeVar("R")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_said_of_a_pixel_follows_the_published_formulas() -> None:
    p1 = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])  # three pixels, three classes
    p2 = np.array([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.3, 0.4, 0.3]])
    label = np.array([0, 1, IGNORE], np.uint8)
    probs = torch.tensor(np.stack([p1, p2]), dtype=torch.float32).permute(0, 2, 1)[:, None, :, None]  # (2, S, C, H, W)
    said = look(probs, label[None, None])
    mean = (p1 + p2) / 2
    c1, c2 = p1[[0, 1], label[:2]], p2[[0, 1], label[:2]]
    refined = ((c1 + c1 * c2) / 2 + (c2 + c1 * c2) / 2) / 2
    assert said["suggested"].ravel().tolist() == mean.argmax(1).tolist() == [0, 2, 1]
    close = 0.5 / 254 + 1e-6
    assert from_measure(said["suggested_confidence"]).ravel() == pytest.approx(mean.max(1), abs=close)
    assert from_measure(said["label_confidence"]).ravel()[:2] == pytest.approx(refined, abs=close)
    assert said["label_confidence"].ravel()[2] == IGNORE
    assert from_measure(said["agreement"]).ravel() == pytest.approx(np.minimum(p1, p2).sum(1), abs=close)


def test_the_cube_holds_what_both_branches_say_of_whole_patches(
    dataset: StoredArchive, observations: StoredArchive, segmenter: Segmenter
) -> None:
    key = dataset.keys[2]
    seen, said = dataset.read(key), observations.read(key)
    network = _network(segmenter)
    images = images_of(dataset.spec, seen.arrays, segmenter.bands)
    with torch.no_grad():
        of_seasons = [network(images["s1"][season : season + 1], images["s2"][season : season + 1]) for season in range(4)]
        probs = torch.stack([torch.cat([logits[branch].softmax(1) for logits in of_seasons]) for branch in (0, 1)])
    expected = look(probs, seen.arrays["label"])
    for name, values in expected.items():
        found = said.arrays[name]
        assert found.shape == (4, 96, 96)
        # Another order of adding in the network moves a rounding now and then.
        assert (np.abs(found.astype(int) - values) <= (0 if name == "suggested" else 1)).mean() > 0.999
    assert said.metadata == seen.metadata
    for name in ("label", "reference", "kind"):
        assert np.array_equal(said.arrays[name], seen.arrays[name])


def test_patches_that_do_not_divide_are_padded_with_their_own_pixels(dataset: StoredArchive, segmenter: Segmenter) -> None:
    seen = dataset.read(dataset.keys[0])
    plain = images_of(dataset.spec, seen.arrays, {"s2": ("B4", "B11")})
    padded = images_of(dataset.spec, seen.arrays, {"s2": ("B4", "B11")}, multiple=36)["s2"].numpy()
    assert list(plain) == ["s2"]
    assert np.array_equal(padded, np.pad(plain["s2"].numpy(), ((0, 0), (0, 0), (6, 6), (6, 6)), mode="reflect"))


def test_xarray_shows_confidences_as_shares_and_labels_as_classes(observations: StoredArchive, dataset: StoredArchive) -> None:
    cube = open_cube(observations.location)
    row = cube.sel(location=dataset.keys[1], season=1)
    stored = observations.read(dataset.keys[1]).arrays
    np.testing.assert_allclose(row.label_confidence.values, from_measure(stored["label_confidence"][1]), rtol=1e-6)
    assert row.suggested.dtype == np.uint8
    assert cube.suggested.attrs["flag_meanings"].split()[:2] == ["water", "trees"]
    assert cube.agreement.attrs["long_name"].startswith("overlap of what the two branches say")
    assert float(cube.lon[0]) == dataset.read(dataset.keys[0]).metadata["lon"]


def test_the_manifest_names_dataset_and_model_and_every_byte_verifies(
    observations: StoredArchive, dataset: StoredArchive, segmenter: Segmenter
) -> None:
    manifest = read_manifest(Path(observations.location))
    assert manifest["origin"] == {
        "kind": "noise observatory",
        "dataset": dataset.digest,
        "model_sha256": segmenter.sha256,
        "run_id": "",
    }
    report = verify(observations.location, deep=True)
    assert not report.problems
    assert report.counts["cube_files"] > 3


def test_a_killed_command_goes_on_and_the_bytes_are_the_same(
    dataset: StoredArchive, segmenter: Segmenter, observations: StoredArchive, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def run_some(function: Callable[[T, J], R], shared: T, jobs: Sequence[J]) -> Generator[R, None, None]:
        yield function(shared, jobs[-1])
        raise KilledError

    def run_rest(function: Callable[[T, J], R], shared: T, jobs: Sequence[J]) -> Generator[R, None, None]:
        assert len(jobs) == NUM_LOCATIONS - 1
        for job in jobs:
            yield function(shared, job)

    observatory, out = Observatory(dataset, segmenter), tmp_path / "cube"
    with pytest.raises(KilledError):
        observe(observatory, out, run=run_some)
    assert not out.exists()
    observe(observatory, out, run=run_rest)
    assert contents(out) == contents(Path(observations.location))


def test_a_cube_that_is_there_is_taken_or_refused(
    dataset: StoredArchive, segmenter: Segmenter, observations: StoredArchive, tmp_path: Path
) -> None:
    def run_nothing(function: Callable[[T, J], R], shared: T, jobs: Sequence[J]) -> Generator[R, None, None]:
        raise AssertionError
        yield

    out = Path(observations.location)
    assert observe(Observatory(dataset, segmenter), out, run=run_nothing).digest == observations.digest
    other = write_network(tmp_path / "other", seed=1)
    with pytest.raises(OutputExistsError, match="is there already"):
        observe(Observatory(dataset, other), out, run=run_nothing)
    with pytest.raises(ConfigError, match="no cube of the noise observatory"):
        open_observations(dataset.location)
    with pytest.raises(ConfigError, match="part_mib=0"):
        observe(Observatory(dataset, segmenter), out, part_mib=0)


def test_what_is_read_is_never_replaced(dataset: StoredArchive, segmenter: Segmenter, tmp_path: Path) -> None:
    before = contents(Path(dataset.location))
    (tmp_path / "link").symlink_to(dataset.location)
    for out in (Path(dataset.location), tmp_path / "link", Path(dataset.location) / "." / ""):
        with pytest.raises(ConfigError, match="is the dataset that is read"):
            observe(Observatory(dataset, segmenter), out, overwrite=True)
    assert contents(Path(dataset.location)) == before


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(
    dataset: StoredArchive, segmenter: Segmenter, tmp_path: Path
) -> None:
    def check(other: Segmenter) -> None:
        observe(Observatory(dataset, other), tmp_path / "cube")

    cases = (
        (replace(segmenter, s2_bands=("B4", "B13")), BandError, r"lacks the s2 bands \['B13'\]"),
        (replace(segmenter, contracts=(("s1", "0" * 64),)), BandError, "normalised by contract"),
        (replace(segmenter, s2_bands=("B4", "B3")), CheckpointError, "another network"),
        (replace(segmenter, sha256="0" * 64), CheckpointError, "another file"),
    )
    for other, error, message in cases:
        with pytest.raises(error, match=message):
            check(other)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no GPU here"):
            check(replace(segmenter, device="cuda"))
    spec = dataset.spec
    other_classes = replace(spec.values[0], values=("sea", *spec.values[0].values[1:]))
    with pytest.raises(ConfigError, match="has the label classes sea, trees"):
        segmenter.check_takes(replace(spec, values=(other_classes, *spec.values[1:])))
    assert list(tmp_path.iterdir()) == []
    contract = dataset.spec.normalisation["s2"].select(segmenter.s2_bands).digest
    replace(segmenter, contracts=(("s2", contract),)).check_takes(dataset.spec)


def test_weights_and_runs_that_are_not_there_are_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has come to its end"):
        Segmenter.of_run(tmp_path)
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="has no encoders: give the folder of a pretraining"):  # a transfer run
        Segmenter.of_run(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights at"):
        Segmenter.of_file(tmp_path / "model.safetensors", tmp_path / "config.yaml")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(segmenter.weights.read_bytes()[:1000])
    broken = Segmenter.of_file(cut, segmenter.weights.with_name("config.yaml"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        _network(broken)

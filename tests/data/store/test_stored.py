"""Manifests of hostile writers: their digests hold, and yet they state what no dataset of ours has."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Json
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.manifest import MANIFEST, write_manifest
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import ShardError
from tests.data.fake_source import FakeSource, spec_of

READERS: tuple[Any, ...] = ("shards", "cube")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored") / "out"
    convert(FakeSource(3, spec_of(patch_px=12)), out, write="both", shard_size_mib=0.03)
    return out


@pytest.fixture
def dataset(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "dataset"))


def content(folder: Path) -> Json:
    manifest: Json = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    return manifest


def use(dataset: Dataset) -> None:
    """Asks for all that a loader asks for."""
    assert dataset.patch_px > 0
    assert len(dataset.class_names) > 0
    for image in dataset.images:
        assert image.modality is not None
        assert dataset.normalisation(image.modality).bands
    arrays = {name: np.empty(dataset.shape(name), np.uint8) for name in dataset.arrays}
    dataset.read_into(len(dataset.locations) - 1, 1, arrays)


def grow(manifest: Json) -> None:
    side = 60_000
    manifest.update(patch_px=side, arrays=json.loads(json.dumps(spec_of(patch_px=side).arrays())))


CHANGES: dict[str, Callable[[Json], object]] = {
    "no patches": lambda m: m.update(patch_px=0),
    "a text": lambda m: m.update(patch_px="12"),
    "true": lambda m: m["parts"].update(count=True),
    "half a location": lambda m: m["parts"].update(locations_per_part=1.5),
    "not a number": lambda m: m["parts"].update(locations_per_part=float("nan")),
    "more than int64 holds": lambda m: m["parts"].update(count=2**40, locations_per_part=2**40),
    "a sample that no memory holds": grow,
    "another side": lambda m: m["arrays"]["s1"]["shape"].__setitem__(3, 24),
    "other bands": lambda m: m["arrays"]["s1"]["bands"].append("HH"),
    "bands that are no text": lambda m: m["arrays"]["s1"].update(bands=[1, 2]),
    "a resolution below 10 m": lambda m: m["arrays"]["s1"].update(gsd_m=0),
    "a type of two bytes": lambda m: m["arrays"]["s1"].update(dtype="uint16"),
    "a path for a name": lambda m: m.update(arrays={"../x": m["arrays"].pop("s1"), **m["arrays"]}),
    "no classes": lambda m: m["arrays"]["label"].update(values=[]),
    "no label": lambda m: m["arrays"].pop("label"),
    "columns in another order": lambda m: m.update(arrays=dict(sorted(m["arrays"].items()))),
    "no statistics": lambda m: m["normalisation"].pop("s2"),
    "another digest": lambda m: m["normalisation"]["s1"].update(digest="0" * 64),
    "other statistics": lambda m: m["normalisation"]["s1"]["mean"].__setitem__(0, -12.0),
    "another rule": lambda m: m["normalisation"]["s1"].update(rule="v / 10000"),
    "infinite statistics": lambda m: m["normalisation"]["s1"]["std"].__setitem__(0, float("inf")),
    "a tar of less than nothing": lambda m: m["shards"][0].update(size=-1),
    "a tar of one and a half samples": lambda m: m["shards"][0].update(samples=1.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_dataset_of_ours_has_is_refused_at_opening(dataset: Path, change: str) -> None:
    manifest = content(dataset)
    CHANGES[change](manifest)
    write_manifest(dataset, manifest)
    for reader in READERS:
        with pytest.raises(ShardError, match="malformed"):
            open_dataset(dataset, reader=reader)


def strange(value: Any, rng: np.random.Generator) -> Any:
    """The value with something inside replaced by what nobody would expect."""
    if isinstance(value, dict) and value and rng.random() < 0.92:
        name = list(value)[rng.integers(len(value))]
        return {**value, name: strange(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = int(rng.integers(len(value)))
        return [*value[:place], strange(value[place], rng), *value[place + 1 :]]
    others: tuple[Any, ...] = (
        None,
        -1,
        0,
        5,
        2**40,
        10**40,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "../x",
        "\n\x1b[31m",
        "\udcff",
        [],
        [1],
        {},
        True,
    )
    return others[rng.integers(len(others))]


@pytest.mark.parametrize("times", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_strange_manifest_is_refused_or_of_no_consequence(dataset: Path, template: Path, times: int) -> None:
    rng = np.random.default_rng(times)
    for _ in range(times):
        manifest = content(template)
        name = list(manifest)[rng.integers(len(manifest))]
        write_manifest(dataset, {**manifest, name: strange(manifest[name], rng)})
        for reader in READERS:
            # Some of it shows only where it is read: parts of another size, say, for a cube's files.
            with suppress(ShardError):
                use(open_dataset(dataset, reader=reader))

"""The tables against sums over all pixels at once, and scikit-learn."""

import csv
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

import cromss_dist.noise.summary
from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Sample, SampleSpec
from cromss_dist.noise.panels import draw_worst, read_panels
from cromss_dist.noise.rule import Rule
from cromss_dist.noise.summary import NoiseSummary, region_of, summarise
from cromss_dist.schema import CLASS_NAMES, IGNORE
from cromss_dist.tracking.panels import to_png

RULE = Rule(doubt_below=0.2, replace_above=0.3)
T = TypeVar("T")
J = TypeVar("J")
R = TypeVar("R")


@pytest.fixture(scope="module")
def summary(observations: StoredArchive) -> NoiseSummary:
    return summarise(observations, RULE)


@pytest.fixture(scope="module")
def pixels(observations: StoredArchive) -> dict[str, np.ndarray]:
    """All of the cube: (N, S, H, W) of each array."""
    samples = [observations.read(key).arrays for key in observations.keys]
    return {name: np.stack([arrays[name] for arrays in samples]) for name in samples[0]}


def test_the_row_of_a_class_is_what_its_pixels_say(summary: NoiseSummary, pixels: dict[str, np.ndarray]) -> None:
    rows = {row["class"]: row for row in summary.classes()}
    assert tuple(rows) == CLASS_NAMES
    for value, name in enumerate(CLASS_NAMES):
        where = pixels["label"] == value
        confidence, suggested = pixels["label_confidence"][where] / 254, pixels["suggested"][where]
        doubted = pixels["label_confidence"][where] < 0.2 * 254
        replaced = doubted & (suggested != value) & (pixels["suggested_confidence"][where] > 0.3 * 254)
        row = rows[name]
        assert row["pixels"] == where.sum() > 0
        assert row["suspicious_share"] == pytest.approx(doubted.mean())
        assert row["replaced_share"] == pytest.approx(replaced.mean())
        assert row["mean_label_confidence"] == pytest.approx(confidence.mean())
        assert row["mean_agreement"] == pytest.approx((pixels["agreement"][where] / 254).mean())
        counts = np.bincount(suggested[suggested != value], minlength=9)
        if counts.any():
            assert row["suggested_instead"] == CLASS_NAMES[counts.argmax()]
            assert row["share_of_other_suggestions"] == pytest.approx(counts.max() / counts.sum())
    assert sum(row["pixels"] for row in summary.regions()) == (pixels["label"] != IGNORE).sum()
    assert sum(row["replaced"] for row in summary.confusion()) == round(
        summary.totals["replaced_share"] * summary.totals["pixels"]
    )


def test_the_worst_places_are_those_with_the_largest_share_in_a_season(
    summary: NoiseSummary, pixels: dict[str, np.ndarray], observations: StoredArchive
) -> None:
    shares = (pixels["label_confidence"] < 0.2 * 254).mean((2, 3))  # no pixel is ignored here
    order = np.argsort(-shares.max(1))
    assert [place.key for place in summary.tally.worst] == [observations.keys[i] for i in order]
    assert [place.season for place in summary.tally.worst] == shares.argmax(1)[order].tolist()
    assert [place.suspicious for place in summary.tally.worst] == pytest.approx(shares.max(1)[order].tolist())


def test_detection_is_scikit_learns_over_all_pixels(summary: NoiseSummary, pixels: dict[str, np.ndarray]) -> None:
    told = summary.to_json()
    wrong = (pixels["label"] != pixels["reference"]).ravel()
    expected = average_precision_score(wrong, 1 - pixels["label_confidence"].ravel() / 254)
    found = told["detection"]["label_confidence"]
    assert found["overall"]["average_precision"] == pytest.approx(expected, abs=1e-9)  # 8 bits are whole in 16
    assert set(told["detection"]) == {"label_confidence", "agreement", "other_seasons", "near_border"}
    assert set(found["by_kind"]) == {"border", "confusion", "appearance", "cloud"}
    assert told["relabelling"]["noise_before"] == pytest.approx(wrong.mean())


def test_parts_in_any_order_give_the_same_summary(
    summary: NoiseSummary, observations: StoredArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(function: Callable[[T, J], R], shared: T, jobs: Sequence[J]) -> Generator[R, None, None]:
        for job in reversed(jobs):
            yield function(shared, job)

    monkeypatch.setattr(cromss_dist.noise.summary, "_LOCATIONS_A_JOB", 1)
    done: list[int] = []
    again = summarise(observations, RULE, backwards, done.append)
    assert again.to_json() == summary.to_json()
    assert again.worst() == summary.worst()
    assert done == [1, 1, 1]


def test_files_are_strict_json_and_csv(summary: NoiseSummary, tmp_path: Path) -> None:
    summary.write(tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert told["rule"] == {"doubt_below": 0.2, "replace_above": 0.3, "drop": False}
    assert told["origin"]["kind"] == "noise observatory"
    rows = {}
    for name in ("classes", "regions", "confusion", "worst"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            rows[name] = list(csv.DictReader(file))
    assert [row["class"] for row in rows["classes"]] == list(CLASS_NAMES)
    assert len(rows["worst"]) == 3
    assert sum(int(row["pixels"]) for row in rows["confusion"]) == summary.totals["pixels"]


def test_classes_and_places_without_a_label_have_empty_figures(
    observations: StoredArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_water(archive: StoredArchive, key: str) -> Sample:
        sample = read(archive, key)
        sample.arrays["label"][sample.arrays["label"] == 0] = IGNORE
        if key == observations.keys[0]:
            sample.arrays["label"][:] = IGNORE
        return sample

    read = StoredArchive.read
    monkeypatch.setattr(StoredArchive, "read", without_water)
    summary = summarise(observations, RULE)
    summary.write(tmp_path)
    with (tmp_path / "classes.csv").open(newline="") as file:
        water, trees = list(csv.DictReader(file))[:2]
    assert water.keys() == trees.keys()
    assert {name: value for name, value in water.items() if value} == {"class": "water", "pixels": "0"}
    assert summary.to_json()["classes"]["water"].keys() == summary.to_json()["classes"]["trees"].keys()
    assert sorted(place.key for place in summary.tally.worst) == list(observations.keys[1:])


def test_a_cube_without_any_label_has_empty_tables(
    observations: StoredArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blank(archive: StoredArchive, key: str) -> Sample:
        sample = read(archive, key)
        sample.arrays["label"][:] = IGNORE
        return sample

    read = StoredArchive.read
    monkeypatch.setattr(StoredArchive, "read", blank)
    summary = summarise(observations, RULE)
    summary.write(tmp_path)
    assert (tmp_path / "worst.csv").read_text() == "suspicious,key,season\n"
    assert (tmp_path / "confusion.csv").read_text() == "label,suggested,pixels,replaced\n"
    told = summary.to_json()
    assert told["all"]["pixels"] == 0
    assert told["relabelling"]["noise_before"] is None


def test_a_cube_without_truth_has_no_detection(observations: StoredArchive, tmp_path: Path) -> None:
    class WithoutTruth(StoredArchive):
        @property
        def spec(self) -> SampleSpec:
            whole = super().spec
            values = tuple(value for value in whole.values if value.name not in ("reference", "kind"))
            return SampleSpec(whole.patch_px, whole.num_seasons, (), values, {}, {}, whole.measures)

        def read(self, key: str) -> Sample:
            sample = super().read(key)
            return Sample(key, {name: sample.arrays[name] for name in self.spec.names}, sample.metadata, ())

    blind = WithoutTruth(observations.location, observations.digest)
    cube = convert(blind, tmp_path / "cube", write="cube", origin=observations.dataset.manifest["origin"]).folder
    told = summarise(StoredArchive.of(cube), RULE).to_json()
    assert told["detection"] is None
    assert told["relabelling"] is None
    assert told["all"]["pixels"] > 0


@pytest.mark.parametrize(
    ("lon", "lat", "name"),
    [(17.3, 48.2, "N40 E010"), (-0.1, -0.1, "S10 W010"), (180.0, -90.0, "S90 E180"), (None, 3.0, "unknown")],
)
def test_regions_are_cells_named_by_their_south_western_corner(lon: float | None, lat: float | None, name: str) -> None:
    assert region_of(lon, lat) == name


def test_the_worst_places_are_drawn_with_all_that_is_known_of_them(
    summary: NoiseSummary, dataset: StoredArchive, observations: StoredArchive
) -> None:
    panels = read_panels(dataset, observations, RULE, summary.tally.worst[:2])
    worst = summary.tally.worst[0]
    assert np.array_equal(panels[0].label, dataset.read(worst.key).arrays["label"][worst.season])
    assert np.array_equal(panels[0].suggested, observations.read(worst.key).arrays["suggested"][worst.season])
    figure = draw_worst(panels, CLASS_NAMES, "worst")
    titles = [axes.get_title() for axes in figure.axes[:7]]
    assert titles == ["Sentinel-2", "Sentinel-1", "noisy label", "confidence in it", "suggestion", "cleaned label", "reference"]
    assert len(figure.axes) == 2 * 7 + 1
    assert to_png(figure).startswith(b"\x89PNG")

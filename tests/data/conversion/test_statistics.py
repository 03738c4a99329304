"""Band sums and class counts. The oracle is NumPy on int64."""

from dataclasses import replace

import numpy as np
import pytest

from cromss_dist.data.conversion.statistics import MAX_EXACT, Statistics
from cromss_dist.data.sample import Sample, SampleSpec, ValueSpec
from cromss_dist.schema import IGNORE, IMAGE_ARRAYS, NORMALISATION, NUM_SEASONS

SPEC = SampleSpec(
    patch_px=264,
    num_seasons=NUM_SEASONS,
    images=IMAGE_ARRAYS,
    values=(ValueSpec("label", ("water", "trees")),),
    normalisation=dict(NORMALISATION),
    normalised_by={"s1": "archive", "s2": "archive"},
)


def sample_of(spec: SampleSpec, seed: int | None) -> Sample:
    """A sample of random pixels, or, without a seed, of the brightest there are."""
    rng = np.random.default_rng(seed)
    images = {image.name: rng.integers(0, 256, spec.shape(image.name), np.uint8) for image in spec.images}
    if seed is None:
        images = {name: np.full_like(pixels, 255) for name, pixels in images.items()}
    labels = rng.choice(np.array([0, 1, IGNORE], np.uint8), spec.shape("label"))
    return Sample("0", {**images, "label": labels}, {}, ())


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("patch_px", [264, 6, 6 * 43])
def test_sums_are_those_of_integers_for_the_brightest_pixels_and_any_size(patch_px: int, seed: int | None) -> None:
    spec = replace(SPEC, patch_px=patch_px)
    sample, statistics = sample_of(spec, seed), Statistics(spec)
    for times in (1, 2):
        statistics.add(sample)
        for image in spec.images:
            pixels = sample.arrays[image.name].astype(np.int64)
            expected = [[band.size, band.sum(), (band**2).sum()] for band in np.moveaxis(pixels, 1, 0)]
            assert np.array_equal(statistics.moments[image.name], times * np.array(expected))


def test_a_row_of_the_brightest_pixels_is_summed_without_rounding_in_float32() -> None:
    assert MAX_EXACT * 255**2 < 2**24 < (MAX_EXACT + 3) * 255**2


def test_class_counts_are_those_of_each_season_with_the_ignored_last() -> None:
    sample, statistics = sample_of(SPEC, 3), Statistics(SPEC)
    statistics.add(sample)
    expected = [[int((season == value).sum()) for value in (0, 1, IGNORE)] for season in sample.arrays["label"]]
    assert statistics.class_counts.tolist() == expected


def test_statistics_go_on_after_a_round_trip_through_the_manifest() -> None:
    one, other = sample_of(SPEC, 4), sample_of(SPEC, 5)
    together, begun = Statistics(SPEC), Statistics(SPEC)
    begun.add(one)
    again = Statistics.from_json(SPEC, begun.to_json())
    again.add(other)
    together.add(one)
    together.add(other)
    assert again.to_json() == together.to_json()

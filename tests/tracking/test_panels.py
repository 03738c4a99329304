import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from cromss_dist.errors import BandError
from cromss_dist.schema import CLASSES, S1_BANDS, S2_9, S2_BANDS
from cromss_dist.tracking.panels import PanelSample, class_colours, draw_panels, to_png

SIDE = 16


@pytest.fixture
def sample() -> PanelSample:
    draw = np.random.default_rng(0)
    label = draw.integers(0, 9, (SIDE, SIDE)).astype(np.uint8)
    weights = draw.random((SIDE, SIDE))
    return PanelSample(
        "0000042", 2, draw.random((2, SIDE, SIDE)), draw.random((13, SIDE, SIDE)), label, label, label, weights, weights, label
    )


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_a_row_shows_images_labels_predictions_and_weights(sample: PanelSample) -> None:
    figure = draw_panels([sample, sample], S1_BANDS, S2_BANDS, "epoch 3")
    expected = [
        "Sentinel-2",
        "Sentinel-1",
        "noisy label",
        "reference",
        "prediction S1",
        "prediction S2",
        "weights S1",
        "weights S2",
    ]
    assert titles(figure) == expected
    assert len(figure.axes) == 2 * len(expected) + 1  # and the scale of the weights
    assert figure.axes[0].texts[0].get_text() == "0000042\nseason 2"
    assert figure.get_suptitle() == "epoch 3"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [c.name.replace("_", " ") for c in CLASSES] + ["ignored"]


def test_the_reference_is_left_out_where_no_sample_has_one(sample: PanelSample) -> None:
    without = replace(sample, reference=None)
    assert "reference" not in titles(draw_panels([without], S1_BANDS, S2_BANDS))
    mixed = draw_panels([sample, without], S1_BANDS, S2_BANDS)
    assert mixed.axes[8 + 3].texts[0].get_text() == "none"


def test_sentinel_2_is_shown_as_b4_b3_b2_each_stretched(sample: PanelSample) -> None:
    image = np.asarray(draw_panels([sample], S1_BANDS, S2_BANDS).axes[0].images[0].get_array())
    for colour, band in enumerate(("B4", "B3", "B2")):
        values = sample.s2[S2_BANDS.index(band)]
        low, high = np.percentile(values, 2), np.percentile(values, 98)
        np.testing.assert_allclose(image[..., colour], np.clip((values - low) / (high - low), 0, 1), atol=1e-12)


@pytest.mark.parametrize(("s1_bands", "s2_bands"), [(("VV",), S2_9), (("VH", "VV"), ("B8",)), (S1_BANDS, ("B8", "B11"))])
def test_any_band_subset_can_be_drawn(sample: PanelSample, s1_bands: tuple[str, ...], s2_bands: tuple[str, ...]) -> None:
    part = replace(sample, s1=sample.s1[: len(s1_bands)], s2=sample.s2[: len(s2_bands)])
    assert to_png(draw_panels([part], s1_bands, s2_bands)).startswith(b"\x89PNG")


def test_flat_images_and_ignored_labels_can_be_drawn(sample: PanelSample) -> None:
    flat = replace(sample, s1=np.zeros_like(sample.s1), s2=np.ones_like(sample.s2), label=np.full((SIDE, SIDE), 255, np.uint8))
    assert to_png(draw_panels([flat], S1_BANDS, S2_BANDS)).startswith(b"\x89PNG")


def test_images_with_other_bands_than_named_are_refused(sample: PanelSample) -> None:
    with pytest.raises(BandError, match=r"0000042: images with 2 S1 and 13 S2 bands"):
        draw_panels([sample], S1_BANDS, S2_9)


def test_class_maps_have_the_classes_colours() -> None:
    label = np.array([[c.value for c in CLASSES] + [255]], np.uint8)
    colours = class_colours(label)[0].tolist()
    assert colours[:9] == [list(c.colour) for c in CLASSES]
    assert colours[9] not in colours[:9]


def test_equal_samples_give_equal_bytes_and_no_pyplot_figure(sample: PanelSample) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    first, second = (to_png(draw_panels([sample], S1_BANDS, S2_BANDS)) for _ in range(2))
    assert first == second
    assert plt.get_fignums() == before
    pixels = plt.imread(io.BytesIO(first), format="png")
    assert pixels.std() > 0.1  # something was drawn

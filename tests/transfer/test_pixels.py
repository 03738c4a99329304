"""Pixels that quick looks learn from, and their features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cromss_dist.data.loading.selection import Selection, select
from cromss_dist.data.sample import Uint8Array
from cromss_dist.errors import ConfigError
from cromss_dist.models.downstream import EncoderSpec
from cromss_dist.models.encoder import build_encoder
from cromss_dist.schema import IGNORE, LABEL_ARRAY
from cromss_dist.transfer import pixels as pixels_module
from cromss_dist.transfer.pixels import FrozenEncoders, Pixels, draw_pixels, features_at
from tests.data.fake_dataset import FakeDataset

SPEC = EncoderSpec("resnet18", 3, 2)


class WithoutTheLastClass(FakeDataset):
    """Labels have no snow."""

    def pixels(self, sample_id: int, season: int, name: str) -> Uint8Array:
        values = super().pixels(sample_id, season, name)
        return np.where(values == 8, np.uint8(IGNORE), values) if name == LABEL_ARRAY else values


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pixels of each class that are drawn."""
    monkeypatch.setattr(pixels_module, "PIXELS_PER_CLASS", 25)
    return 25


def places_of(pixels: Pixels) -> set[tuple[int, ...]]:
    return set(zip(*(getattr(pixels, name).tolist() for name in ("ids", "seasons", "rows", "cols", "classes")), strict=True))


def test_pixels_are_labelled_ones_of_the_selection_and_equally_many_of_each_class(few: int) -> None:
    dataset = FakeDataset((3, 2), num_seasons=2)
    selection = select(dataset, seasons=[1]).take(np.array([0, 2, 3]))
    drawn = draw_pixels(dataset, selection, seed=5)
    labels = {int(i): dataset.pixels(int(i), 0, LABEL_ARRAY) for i in selection.ids}
    assert all(labels[i][season, row, col] == kind for i, season, row, col, kind in places_of(drawn))
    assert set(drawn.ids.tolist()) == {0, 2, 3}
    assert set(drawn.seasons.tolist()) == {1}
    assert np.bincount(drawn.classes).tolist() == [few] * 9
    counts = np.bincount(np.concatenate([label[1].ravel() for label in labels.values()]), minlength=256)
    assert drawn.frequency.tolist() == counts[:9].tolist()
    assert drawn.weight == pytest.approx(counts[:9] / few)
    used = drawn.selection(2)
    assert used.ids.tolist() == [0, 2, 3]
    assert used.seasons.tolist() == [[False, True]] * 3


def test_of_a_rare_class_all_pixels_are_drawn_and_of_one_that_is_missing_none() -> None:
    dataset = WithoutTheLastClass((2,), num_seasons=1)
    drawn = draw_pixels(dataset, select(dataset), seed=0)
    assert np.bincount(drawn.classes, minlength=9).tolist() == drawn.frequency.tolist()
    assert drawn.frequency[8] == 0
    assert drawn.weight.tolist() == [1.0] * 8 + [0.0]


@pytest.mark.usefixtures("few")
def test_pixels_depend_on_seed_and_tiles_and_not_on_the_order_in_which_tiles_are_read() -> None:
    dataset = FakeDataset((6,), num_seasons=1)
    every, some = select(dataset), Selection(np.array([1, 4]), np.ones((2, 1), bool))
    assert places_of(draw_pixels(dataset, every, 1)) == places_of(draw_pixels(dataset, every, 1))
    assert places_of(draw_pixels(dataset, every, 1)) != places_of(draw_pixels(dataset, every, 2))
    backwards = Selection(every.ids[::-1], every.seasons)
    assert places_of(draw_pixels(dataset, backwards, 1)) == places_of(draw_pixels(dataset, every, 1))
    of_more = {place for place in places_of(draw_pixels(dataset, every, 1)) if place[0] in (1, 4)}
    assert of_more <= places_of(draw_pixels(dataset, some, 1))


def test_a_quick_look_takes_few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels_module, "MAX_TILES", 2)
    dataset = FakeDataset((6,), num_seasons=1)
    drawn = draw_pixels(dataset, select(dataset), seed=0)
    assert len(set(drawn.ids.tolist())) == 2
    assert drawn.frequency.sum() == sum((dataset.pixels(i, 0, LABEL_ARRAY) < 9).sum() for i in set(drawn.ids.tolist()))


def test_one_class_is_refused() -> None:
    dataset = FakeDataset((1,), class_names=("water",))
    with pytest.raises(ConfigError, match=r"1 training tiles have labels of water, .* raise labels\.fraction"):
        draw_pixels(dataset, select(dataset), 0)


def test_features_of_pixels_are_those_of_upsampled_maps() -> None:
    torch.manual_seed(0)
    stages = [torch.randn(2, 5, 16, 16), torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)]
    rows, cols = torch.tensor([0, 31, 7, 16, 31]), torch.tensor([0, 31, 22, 1, 0])
    found = features_at(stages, rows, cols, 32)
    whole = torch.cat([F.interpolate(stage, (32, 32), mode="bilinear", align_corners=False) for stage in stages], 1)
    torch.testing.assert_close(found, whole[:, :, rows, cols].transpose(1, 2))


def test_encoders_stay_as_they_are() -> None:
    source = build_encoder(SPEC.name, SPEC.depth, SPEC.in_channels)
    frozen = FrozenEncoders({"s1": EncoderSpec("resnet18", 3, 2, source.state_dict())}, seed=0)
    frozen.train()
    images = torch.rand(2, 2, 32, 32)
    maps = frozen(images)
    assert not any(stage.requires_grad for stage in maps)
    assert all(
        torch.equal(value, source.state_dict()[name.removeprefix("encoders.s1.")]) for name, value in frozen.state_dict().items()
    )
    assert [tuple(stage.shape) for stage in maps] == [(2, 64, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
    assert (frozen.widths, frozen.input_multiple) == ((64, 64, 128), 8)


def test_batch_norms_of_a_drawn_encoder_alone_get_the_statistics_of_the_tiles() -> None:
    weights = build_encoder("resnet18", 3, 3).state_dict()
    both = FrozenEncoders({"s1": SPEC, "s2": EncoderSpec("resnet18", 3, 3, weights)}, seed=0)
    batches = [(torch.rand(4, 2, 16, 16), torch.rand(4, 3, 16, 16)) for _ in range(3)]
    both.settle(batches)
    first = both.encoders["s1"].get_submodule("conv1")
    means = torch.stack([first(s1).mean((0, 2, 3)) for s1, _ in batches])
    torch.testing.assert_close(both.encoders["s1"].state_dict()["bn1.running_mean"], means.mean(0))
    assert all(torch.equal(value, weights[name]) for name, value in both.encoders["s2"].state_dict().items())
    one, other = both(*batches[0]), both(*batches[0])
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "evaluation mode again"


def test_features_of_two_encoders_stand_side_by_side_s1_first() -> None:
    both = FrozenEncoders({"s2": EncoderSpec("resnet18", 3, 3), "s1": SPEC}, seed=4)
    s1 = FrozenEncoders({"s1": SPEC}, seed=4)
    images = torch.rand(1, 2, 16, 16), torch.rand(1, 3, 16, 16)
    assert all(torch.equal(one, other) for one, other in zip(both(*images)[:3], s1(images[0]), strict=True))
    assert both.widths == s1.widths * 2

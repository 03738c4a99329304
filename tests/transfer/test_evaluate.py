"""Every pixel of every test tile, once; the published evaluation; pictures of it."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score  # type: ignore[import-untyped]
from torch import Tensor, nn

from cromss_dist.config import BatchPlan, ReadingConfig
from cromss_dist.data.loading.selection import select
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import ConfigError
from cromss_dist.schema import CLASS_NAMES, LABEL_ARRAY
from cromss_dist.train.figures.scores import Scores
from cromss_dist.transfer import evaluate as module
from cromss_dist.transfer.evaluate import ScoredTiles, evaluate, select_tiles
from cromss_dist.transfer.panels import class_palette, draw_tiles
from cromss_dist.transfer.results import Tiles
from cromss_dist.world import World
from tests.data.fake_dataset import FakeDataset

READING = ReadingConfig()
ALONE = World(0, 1, torch.device("cpu"))


class Brightness(nn.Module):
    """Predicts a class from a pixel's first band alone, so that what it says of a tile is known; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: set[int] = set()

    def forward(self, *images: Tensor) -> tuple[Tensor]:
        assert not self.training
        self.sides |= {*images[0].shape[-2:]}
        levels = torch.arange(9)[:, None, None] / 9
        return (-(images[0][:, :1] - levels).abs(),)


@pytest.fixture(scope="module")
def tiles(synthetic_shards: Path) -> ScoredTiles:
    dataset = open_dataset(str(synthetic_shards))
    return ScoredTiles(dataset, select(dataset), {"s2": ("B4", "B3")}, multiple=64)


def expected(tiles: ScoredTiles, place: int) -> np.ndarray:
    """scikit-learn's matrix of a tile."""
    dataset, sample_id = tiles.dataset, int(tiles.selection.ids[place])
    labels, predictions = [], []
    for season in np.flatnonzero(tiles.selection.seasons[place]):
        arrays = {name: np.empty(dataset.shape(name), np.uint8) for name in (LABEL_ARRAY, "s2_10m")}
        dataset.read_into(sample_id, int(season), arrays)
        b4 = arrays["s2_10m"][2].astype(np.float32) / 255  # B2, B3, B4, B8
        levels = np.arange(9, dtype=np.float32)[:, None, None] / 9
        labels.append(arrays[LABEL_ARRAY][season].ravel())
        predictions.append((-np.abs(b4 - levels)).argmax(0).ravel())
    label, prediction = np.concatenate(labels), np.concatenate(predictions)
    counted = label != 255
    matrix: np.ndarray = confusion_matrix(label[counted], prediction[counted], labels=range(9))
    return matrix


def test_tiles_are_scored_as_scikit_learn_does_it_with_padding_that_does_not_count(tiles: ScoredTiles) -> None:
    network = Brightness()
    places: list[str] = []
    found, panels = evaluate(network, tiles, BatchPlan(5, 5, 1, 1), ALONE, READING, 3, places.append)
    assert network.sides == {128}  # patches of 96 px
    assert network.training
    assert len(places) == 10  # 48 seasons, 5 at a time
    assert found.keys == tuple(sorted(tiles.keys))
    for i, key in enumerate(tiles.keys):
        assert np.array_equal(found.confusion[found.keys.index(key)], expected(tiles, i))
    assert found.confusion.sum() == 12 * 4 * 96 * 96
    assert [panel.key for panel in panels] == list(tiles.keys[:3])
    assert panels[0].images["s2"].shape == (2, 96, 96)
    figure = draw_tiles(panels, {"s2": ("B4", "B3")}, CLASS_NAMES, "title")
    assert len(figure.axes) == 3 * 4


def test_scores_of_tiles_are_those_of_their_pixels(tiles: ScoredTiles) -> None:
    some = replace(tiles, selection=select(tiles.dataset, seasons=[2]))
    found, _ = evaluate(Brightness(), some, BatchPlan(8, 8, 1, 1), ALONE, READING, 0, lambda _: None)
    total = np.array(found.total)
    label, prediction = (np.repeat(index.ravel(), total.ravel()) for index in np.indices(total.shape))
    scores = Scores.of(total, CLASS_NAMES)
    present = np.unique(label)
    assert scores.mean_iou == pytest.approx(jaccard_score(label, prediction, labels=present, average="macro"))
    assert scores.mean_f1 == pytest.approx(f1_score(label, prediction, labels=present, average="macro"))
    assert scores.overall_accuracy == pytest.approx((label == prediction).mean())


def test_ranks_score_each_tile_once_between_them(tiles: ScoredTiles) -> None:
    whole, _ = evaluate(Brightness(), tiles, BatchPlan(8, 8, 1, 1), ALONE, READING, 0, lambda _: None)
    parts = [
        evaluate(Brightness(), tiles, BatchPlan(15, 5, 1, 3), replace(ALONE, rank=rank), READING, 0, lambda _: None)[0]
        for rank in range(3)  # whose sums over ranks are their own
    ]
    assert np.array_equal(sum(part.confusion for part in parts), whole.confusion)
    assert Tiles(whole.keys, whole.confusion).total == whole.total


class Numbered(FakeDataset):
    @cached_property
    def locations(self) -> tuple[str, ...]:
        return tuple(sorted(f"test_p{i}" for i in range(sum(self.sizes))))


def test_the_published_evaluation_drops_the_last_partial_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PAPER_TEST_BATCH, "dw", 4)
    dataset = Numbered((11,))
    kept = select_tiles(dataset, None, "paper", "dw")
    # In the order of numbers, so that p10 is the last and p9 before it; 8 of 11 are in whole batches.
    assert sorted(int(dataset.locations[i].removeprefix("test_p")) for i in kept.ids) == list(range(8))
    assert len(select_tiles(dataset, None, "default", "dw").ids) == 11
    with pytest.raises(ConfigError, match="is how dw, osm, dfc2020 were scored, and task is 'mine'"):
        select_tiles(dataset, None, "paper", "mine")
    with pytest.raises(ConfigError, match="partial batch of 300 test tiles, which is all of 11"):
        select_tiles(dataset, None, "paper", "dfc2020")


def test_classes_without_a_colour_of_their_own_get_different_ones() -> None:
    palette = class_palette([f"osm_{i}" for i in range(13)])
    assert len(np.unique(palette[:13], axis=0)) == 13
    assert class_palette(CLASS_NAMES)[0].tolist() == [65, 155, 223]

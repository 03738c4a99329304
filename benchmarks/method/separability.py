"""How far the spectrum of a single pixel gives the class away. Where it does, every method reaches the same figure.

`train` and `test` are datasets of other places with the truth as labels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.open import open_dataset
from cromss_dist.schema import IGNORE, LABEL_ARRAY, MODALITIES
from cromss_dist.train.figures.scores import Scores

NEIGHBOURS = 25
TRAIN_PIXELS, TEST_PIXELS, PLACES = 20_000, 6_000, 60
_CHUNK = 1_000  # test pixels whose distances are in memory at a time

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def separability(train: Path, test: Path) -> dict[str, dict[str, float]]:
    """Accuracy and mean IoU of `NEIGHBOURS` nearest neighbours on stored values, for S1, S2 and both; clouds included.

    Returns:
        By 's1', 's2' and 'both': 'oa' and 'miou' in [0, 1].
    """
    names = open_dataset(train).class_names
    bands, known = draw_pixels(open_dataset(train), TRAIN_PIXELS)
    test_bands, truth = draw_pixels(open_dataset(test), TEST_PIXELS)
    told = {}
    for name, modalities in (("s1", ("s1",)), ("s2", ("s2",)), ("both", MODALITIES)):
        predicted = nearest_classes(
            np.concatenate([bands[m] for m in modalities], 1),
            known,
            np.concatenate([test_bands[m] for m in modalities], 1),
            len(names),
        )
        confusion = np.zeros((len(names), len(names)), np.int64)
        np.add.at(confusion, (truth, predicted), 1)
        scores = Scores.of(confusion, names)
        told[name] = {"oa": scores.overall_accuracy, "miou": scores.mean_iou}
    return told


def draw_pixels(dataset: Dataset, number: int) -> tuple[dict[str, Floats], Labels]:
    """Pixels of places and seasons spread over a dataset, drawn from a fixed seed.

    Bands of 20 m and 60 m are repeated: a pixel has the value it lies in.

    Args:
        dataset: With labels that are the truth.
        number: Of pixels, at most.

    Returns:
        By modality float32 (pixels, bands) in [0, 1], and int64 (pixels,): the class.
    """
    rng = np.random.default_rng(0)
    side, places = dataset.patch_px, len(dataset.locations)
    chosen = np.unique(np.linspace(0, places - 1, min(PLACES, places)).astype(np.int64))
    pixels: dict[str, list[npt.NDArray[Any]]] = {m: [] for m in MODALITIES}
    labels = []
    for turn, place in enumerate(chosen):
        season = turn % dataset.num_seasons
        arrays = {spec.name: np.empty(dataset.shape(spec.name), np.uint8) for spec in dataset.images}
        arrays[LABEL_ARRAY] = np.empty(dataset.shape(LABEL_ARRAY), np.uint8)
        dataset.read_into(int(place), season, arrays)
        label = arrays[LABEL_ARRAY][season].ravel()
        where = rng.choice(side * side, min(side * side, -(-number // len(chosen))), replace=False)
        where = where[label[where] != IGNORE]
        rows, cols = np.divmod(where, side)
        labels.append(label[where].astype(np.int64))
        for modality in MODALITIES:
            specs = [spec for spec in dataset.images if spec.modality == modality]
            values = [arrays[spec.name][:, rows // spec.scale, cols // spec.scale] for spec in specs]
            pixels[modality].append(np.concatenate(values).T)
    scale = np.float32(1 / 255)
    return {m: np.concatenate(values).astype(np.float32) * scale for m, values in pixels.items()}, np.concatenate(labels)


def nearest_classes(train: Floats, known: Labels, test: Floats, num_classes: int) -> Labels:
    """The most frequent class among the nearest neighbours of each test pixel, of equally frequent ones the first.

    Args:
        train: (N, D).
        known: (N,): their classes.
        test: (M, D).
        num_classes: C.

    Returns:
        int64 (M,).
    """
    squares = (train**2).sum(1)
    found = []
    for start in range(0, len(test), _CHUNK):
        # |x - y|^2 without |x|^2, which is the same for all neighbours of x
        distance = squares - 2 * test[start : start + _CHUNK] @ train.T
        nearest = known[np.argpartition(distance, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]]
        found.append((nearest[..., None] == np.arange(num_classes)).sum(1).argmax(1))
    return np.concatenate(found)

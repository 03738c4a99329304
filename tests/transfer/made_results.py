"""Transfer results with known figures, for tests of what reads them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cromss_dist.transfer.results import EncoderUsed, LabelsUsed, Tiles, TransferResult, read_result, write_result

NAMES = ("water", "trees", "crops")
S2 = EncoderUsed("cromss-s2@best", "pretrained", "resnet18", ("B4", "B3", "B2"), "c" * 64, "run1", "cromss-s2/3")


def made_tiles(accuracy: float, number: int = 12, seed: int = 0, pixels: int = 300) -> Tiles:
    """Tiles whose labels depend on the seed alone, and of whose pixels about `accuracy` are right."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 3, (number, pixels))
    right, other = generator.random((number, pixels)) < accuracy, generator.integers(1, 3, (number, pixels))
    cell = label * 3 + np.where(right, label, (label + other) % 3)
    return Tiles.of({f"tile{i:03}": np.bincount(cell[i], minlength=9).reshape(3, 3) for i in range(number)})


def made_result(tiles: Tiles, seed: int = 0, labels_seed: int = 0, **changed: Any) -> TransferResult:
    """The result that these tiles are of."""
    labels = LabelsUsed(tiles=20, digest=f"{labels_seed:064x}", fraction=0.1, seed=labels_seed)
    result = TransferResult(
        "dw", "frozen", "default", seed, {"s2": S2}, labels, "a" * 64, "b" * 64, NAMES, tiles.total, len(tiles.keys),
        "deeplabv3plus", steps=400, samples=3200, seconds=12.5,
    )  # fmt: skip
    return replace(result, **changed)


def made_run(run_dir: Path, accuracy: float = 0.6, tiles: Tiles | None = None, **given: Any) -> TransferResult:
    """A finished run in a folder; `tiles_seed` says which test pixels, the others go to `made_result`."""
    scored = tiles or made_tiles(accuracy, seed=given.pop("tiles_seed", 0))
    run_dir.mkdir(parents=True)
    write_result(run_dir, made_result(scored, **given), scored)
    return read_result(run_dir)

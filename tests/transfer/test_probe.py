"""Quick looks: what they compute of pixels, beside scikit-learn's own, and whole runs of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from torch import Tensor

from cromss_dist.config import EngineConfig, TrackingConfig
from cromss_dist.config.transfer import DownstreamConfig, EncoderConfig, LabelsConfig, TransferConfig
from cromss_dist.data.loading.selection import select
from cromss_dist.data.store.open import open_dataset
from cromss_dist.errors import CheckpointError
from cromss_dist.models.downstream import EncoderSpec
from cromss_dist.parse import CONFIG_FILE, ParsedRun, write_yaml
from cromss_dist.transfer import pixels as pixels_module
from cromss_dist.transfer.pixels import FrozenEncoders, Pixels, features_at
from cromss_dist.transfer.probe import NEIGHBOURS, PENALTY_C, TEMPERATURE, LinearProbe, NearestNeighbours, ScoredGrid
from cromss_dist.transfer.results import Mode, read_result, read_tiles
from cromss_dist.transfer.run import run_in_process, transfer
from tests.data.fake_dataset import FakeDataset

Quick = Callable[..., Path]

SIDE = 32
NUM_CLASSES = 4


@pytest.fixture(scope="module")
def encoders() -> FrozenEncoders:
    return FrozenEncoders({"s1": EncoderSpec("resnet18", 3, 2)}, seed=1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def every_pixel(encoders: FrozenEncoders, images: Tensor) -> Tensor:
    """Features of all pixels, made as they are defined: float (B * H * W, D)."""
    maps = [F.interpolate(stage, (SIDE, SIDE), mode="bilinear", align_corners=False) for stage in encoders(images)]
    return torch.cat(maps, 1).permute(0, 2, 3, 1).flatten(0, 2)


def learnt_from(every_pixel: Tensor, frequency: list[int]) -> tuple[Tensor, Pixels]:
    """Some pixels with invented classes that follow from the features; none of a class of frequency 0."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randperm(len(every_pixel), generator=generator)[:300]
    features = every_pixel[chosen]
    present = np.flatnonzero(frequency)
    directions = torch.randn(features.shape[1], len(present), generator=generator)
    score = (features - features.mean(0)) / features.std(0).clamp(1e-6) @ directions
    classes = present[score.argmax(1).numpy()]
    none = np.zeros(len(classes), np.int64)
    return features, Pixels(none, none, none, none, classes, np.array(frequency))


@pytest.mark.parametrize("frequency", [[900, 400, 30_000, 1000], [0, 700, 0, 500]], ids=["four classes", "two of four"])
def test_the_linear_probe_is_the_logistic_regression_of_upsampled_features(
    encoders: FrozenEncoders, images: Tensor, every_pixel: Tensor, frequency: list[int]
) -> None:
    features, pixels = learnt_from(every_pixel, frequency)
    (logits,) = LinearProbe.fit(encoders, features, pixels)(images)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY_C, max_iter=1000))
    oracle.fit(features.double(), pixels.classes)
    present = np.flatnonzero(frequency)
    # As frequent as in the tiles: Bayes' rule with the odds at which pixels of each class were drawn.
    odds = np.array(frequency)[present] / np.bincount(pixels.classes, minlength=NUM_CLASSES)[present]
    share = oracle.predict_proba(every_pixel.double()) * odds
    expected = np.zeros((len(every_pixel), NUM_CLASSES))
    expected[:, present] = share / share.sum(1, keepdims=True)
    found = logits.softmax(1).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-5)


def test_neighbours_are_scikit_learns(encoders: FrozenEncoders, images: Tensor, every_pixel: Tensor) -> None:
    features, pixels = learnt_from(every_pixel, [800, 900, 1000, 1100])
    lines = torch.tensor([3, 9, 20, 31])
    (votes,) = NearestNeighbours(encoders, features, pixels, lines, lines)(images)
    scaler = StandardScaler().fit(features.double())
    by_stage = np.repeat(1 / np.sqrt(encoders.widths), encoders.widths)
    oracle = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
    oracle.fit(scaler.transform(features.double()) * by_stage, pixels.classes)
    asked = features_at(encoders(images), lines.repeat_interleave(4), lines.repeat(4), SIDE).flatten(0, 1)
    share = oracle.predict_proba(scaler.transform(asked.double()) * by_stage) * pixels.weight
    found = votes[:, :, lines[:, None], lines].permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(
        found / found.sum(1, keepdim=True), torch.from_numpy(share / share.sum(1, keepdims=True)).float(), rtol=1e-3, atol=1e-5
    )
    elsewhere = torch.ones(SIDE, SIDE, dtype=torch.bool)
    elsewhere[lines[:, None], lines] = False
    assert not votes[:, :, elsewhere].any()


@pytest.mark.parametrize("patch_px", [12, 54, 264])
def test_a_grid_has_its_pixels_inside_the_tile_and_evenly_spaced(patch_px: int) -> None:
    dataset = FakeDataset((1,), patch_px=patch_px)
    lines = ScoredGrid(dataset, select(dataset), {"s1": ("VV",)}, 32).lines
    before = (-patch_px % 32) // 2
    steps = lines.diff()
    assert len(lines) == min(16, patch_px)
    assert before <= lines[0] <= before + patch_px / 16
    assert before + patch_px * 15 / 16 - 1 <= lines[-1] < before + patch_px
    assert steps.max() - steps.min() <= 1


@pytest.fixture
def quick(synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quick:
    """Runs a quick look of a random encoder, learnt and scored on the same twelve tiles."""
    monkeypatch.setattr(pixels_module, "PIXELS_PER_CLASS", 60)

    def run(mode: str, **changes: Any) -> Path:
        config = TransferConfig(
            output=str(tmp_path),
            mode=mode,  # type: ignore[arg-type]
            data=DownstreamConfig(train=str(synthetic_shards), test=str(synthetic_shards), seasons=(0,)),
            encoder=EncoderConfig(init="random", name="resnet18", depth=3, s1_bands=("VV", "VH"), s2_bands=("B4", "B8", "B12")),
            engine=EngineConfig(global_batch=5, device="cpu"),
            tracking=TrackingConfig(uri="offline"),
        )
        return Path(run_in_process(ParsedRun(replace(config, **changes)), Console(quiet=True)).run_dir)

    return run


def test_a_linear_look_scores_every_labelled_pixel_and_leaves_what_a_transfer_run_leaves(
    quick: Quick, synthetic_shards: Path
) -> None:
    run_dir = quick("linear")
    result = read_result(run_dir)
    dataset = open_dataset(synthetic_shards)
    label = np.empty(dataset.shape("label"), np.uint8)
    labelled = 0
    for sample_id in range(12):
        dataset.read_into(sample_id, 0, {"label": label})
        labelled += int(np.count_nonzero(label[0] != 255))
    assert result.matrix.sum() == read_tiles(result).confusion.sum() == labelled
    assert (result.mode, result.decoder, result.steps, result.tiles, result.labels.tiles) == ("linear", "", 0, 12, 12)
    assert result.modality == "s1+s2"
    assert result.scores.overall_accuracy > 1.5 * result.matrix.sum(1).max() / labelled  # than the largest class alone
    assert (run_dir / "panels" / "test.png").stat().st_size > 0
    assert read_result(quick("linear")).confusion == result.confusion


def test_a_nearest_neighbour_look_scores_a_grid_of_each_tile(quick: Quick) -> None:
    result = read_result(quick("knn", labels=LabelsConfig(fraction=0.5)))
    assert result.labels.tiles == 6
    assert 0.9 * 12 * 256 < result.matrix.sum() <= 12 * 256
    assert result.scores.overall_accuracy > 1.5 * result.matrix.sum(1).max() / result.matrix.sum()


@pytest.mark.parametrize(("was", "now"), [("frozen", "knn"), ("knn", "frozen"), ("linear", "knn")])
def test_a_folder_is_of_one_mode_though_a_quick_look_leaves_no_checkpoint(was: Mode, now: Mode, tmp_path: Path) -> None:
    config = TransferConfig(encoder=EncoderConfig(s2="nowhere"), mode=was)
    write_yaml(config, tmp_path / CONFIG_FILE)
    with pytest.raises(CheckpointError, match=f"mode was {was} and is {now}"):
        transfer(replace(config, mode=now), tmp_path)

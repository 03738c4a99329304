from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.loading.augment import (
    Geometry,
    PriorKind,
    bicubic_matrix,
    crop_to_patch,
    eval_geometry,
    padding_before,
    prepare,
    train_geometry,
    whole_geometry,
)
from cromss_dist.data.loading.draws import Draws
from cromss_dist.errors import ConfigError
from cromss_dist.schema import IMAGE_ARRAYS, S1_BANDS, S2_9, S2_BANDS, Batch, Example

H = 48


def random_batch(size: int = 3, patch_px: int = H, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def random(*shape: int, high: int = 256) -> Tensor:
        return torch.from_numpy(rng.integers(0, high, shape, dtype=np.uint8))

    return Batch(
        keys=tuple(map(str, range(size))),
        sample_ids=torch.arange(size),
        epochs=torch.zeros(size, dtype=torch.int64),
        seasons=torch.arange(size) % 4,
        weights=torch.ones(size),
        specs=IMAGE_ARRAYS,
        images={s.name: random(size, len(s.bands), patch_px // s.scale, patch_px // s.scale) for s in IMAGE_ARRAYS},
        labels=random(size, 4, patch_px, patch_px, high=9),
        reference=random(size, patch_px, patch_px, high=9),
    )


def run(batch: Batch, geometry: Geometry, prior: PriorKind = "ts") -> Example:
    return prepare(batch, geometry, S1_BANDS, S2_BANDS, prior, "cpu")


def layers(example: Example) -> dict[str, Tensor]:
    assert example.prior is not None
    assert example.reference is not None
    return {
        "s1": example.images["s1"], "s2": example.images["s2"], "prior": example.prior,
        "label": example.label[:, None], "reference": example.reference[:, None],
    }  # fmt: skip


def geometry_of(batch: Batch, crop_px: int, seed: int = 0, rotate_p: float = 0.5) -> Geometry:
    drawn = Draws(seed, batch.epochs.numpy(), batch.sample_ids.numpy())
    return train_geometry(drawn, batch.labels.shape[-1], crop_px, flip_p=0.7, rotate_p=rotate_p, rotate_max_deg=90)


def pil_resize(band: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.int64]:
    return np.asarray(Image.fromarray(band).resize((side, side), Image.Resampling.BICUBIC)).astype(np.int64)


def assert_s2_equals_pil(batch: Batch, side: int) -> None:
    counts = (run(batch, eval_geometry(len(batch.keys), side, side), "none").images["s2"] * 255).round().numpy()
    for spec in IMAGE_ARRAYS[1:]:
        for index, band in enumerate(spec.bands):
            for sample in range(len(batch.keys)):
                expected = pil_resize(batch.images[spec.name][sample, index].numpy(), side)
                difference = np.abs(counts[sample, S2_BANDS.index(band)] - expected)
                assert (difference <= 1).mean() > 0.997
                assert (difference == 0).mean() > (0.997 if spec.scale > 1 else 0.99999)


def test_s2_equals_pils_bicubic_resize_of_random_pixels() -> None:
    assert_s2_equals_pil(random_batch(2, 264), 264)


def test_s2_equals_pils_bicubic_resize_of_real_pixels(mini_archive: Path) -> None:
    arrays = open_archive(mini_archive).read("0000200").arrays
    batch = random_batch(4, 264)
    images = {spec.name: torch.from_numpy(arrays[spec.name]) for spec in IMAGE_ARRAYS}
    assert_s2_equals_pil(replace(batch, images=images), 264)


def test_bicubic_rows_sum_to_one() -> None:
    torch.testing.assert_close(bicubic_matrix(22, 132).sum(1), torch.ones(132))


def test_crop_and_flip_of_a_batch_equal_crop_and_flip_of_the_whole_patch() -> None:
    batch = random_batch(8)
    geometry = geometry_of(batch, 16, rotate_p=0)
    whole, cropped = layers(run(batch, eval_geometry(8, H, H))), layers(run(batch, geometry))
    for sample in range(8):
        rows, cols = geometry.rows[sample], geometry.cols[sample]
        for name in whole:
            expected = whole[name][sample][:, rows][:, :, cols]
            torch.testing.assert_close(cropped[name][sample], expected, rtol=0, atol=1e-6 if name == "prior" else 0)


def test_crops_lie_in_the_patch_and_reach_its_borders_and_all_flips_occur() -> None:
    drawn = Draws(0, np.zeros(4000, np.int64), np.arange(4000))
    geometry = train_geometry(drawn, 20, 16, flip_p=0.75, rotate_p=0.2, rotate_max_deg=90)
    assert (geometry.rows.diff(dim=1).abs() == 1).all()
    for line in (geometry.rows, geometry.cols):
        assert torch.bincount(line.amin(1), minlength=5).tolist() == pytest.approx([800] * 5, rel=0.15)
    kinds = 2 * (geometry.rows[:, 0] > geometry.rows[:, 1]).long() + (geometry.cols[:, 0] > geometry.cols[:, 1]).long()
    assert torch.bincount(kinds).tolist() == pytest.approx([1000] * 4, rel=0.15)
    rotated = geometry.angles_deg[geometry.angles_deg != 0]
    assert len(rotated) == pytest.approx(800, rel=0.15)
    assert 85 < rotated.abs().max() <= 90
    assert abs(rotated.mean()) < 5


def test_image_label_and_prior_move_together() -> None:
    """A square of one class, bright in all bands, must stay where its label and its prior are."""
    batch = random_batch(16)
    labels = torch.zeros_like(batch.labels)
    labels[..., 12:30, 18:36] = 5
    images = {s.name: (labels[:, :1, :: s.scale, :: s.scale] * 51).expand(-1, len(s.bands), -1, -1) for s in IMAGE_ARRAYS}
    example = run(replace(batch, images=images, labels=labels, reference=labels[:, 0]), geometry_of(batch, 32))
    inside = example.label == 5
    assert inside.float().mean(dim=(1, 2)).min() > 0.05
    assert example.prior is not None
    assert example.reference is not None
    assert torch.equal(example.label, example.reference)
    for found in (
        (example.prior[:, 5] > 0.5),
        *((example.images["s1"][:, band] > 0.5) for band in range(2)),
        *((example.images["s2"][:, i] > 0.5) for i in (1, 4)),
    ):
        # All but pixels at the border of the square, which filters and interpolation may move by one.
        assert (found != inside).float().mean(dim=(1, 2)).max() < 0.05


def test_rotation_by_a_quarter_equals_rot90() -> None:
    batch = random_batch(2)
    straight = eval_geometry(2, H, 32)
    turned = layers(run(batch, replace(straight, angles_deg=torch.tensor([90.0, -90.0], dtype=torch.float64))))
    for name, layer in layers(run(batch, straight)).items():
        for sample, quarter in ((0, 1), (1, -1)):
            torch.testing.assert_close(turned[name][sample], torch.rot90(layer[sample], quarter, (1, 2)), rtol=0, atol=2e-5)


def test_prior_sums_to_one_and_labels_stay_labels_under_rotation() -> None:
    batch = random_batch(4)
    batch.labels[:, :, :5] = 255
    geometry = replace(eval_geometry(4, H, H), angles_deg=torch.tensor([33.0, -71.0, 5.0, 0.0], dtype=torch.float64))
    example = run(batch, geometry)
    assert example.prior is not None
    torch.testing.assert_close(example.prior.sum(1), torch.ones(4, H, H))
    assert set(example.label.flatten().tolist()) <= {*range(9), 255}
    assert example.images["s2"].min() >= 0
    assert example.images["s2"].max() <= 1


def test_a_sample_does_not_depend_on_its_batch() -> None:
    batch = random_batch(8)
    geometry = geometry_of(batch, 32)
    assert 0 < int((geometry.angles_deg != 0).sum()) < 8
    together = layers(run(batch, geometry))
    for place in range(8):
        one = slice(place, place + 1)
        alone = replace(
            batch,
            keys=batch.keys[one],
            seasons=batch.seasons[one],
            weights=batch.weights[one],
            images={name: image[one] for name, image in batch.images.items()},
            labels=batch.labels[one],
            reference=None if batch.reference is None else batch.reference[one],
        )
        for name, layer in layers(run(alone, Geometry(geometry.rows[one], geometry.cols[one], geometry.angles_deg[one]))).items():
            torch.testing.assert_close(layer[0], together[name][place], rtol=0, atol=1e-6 if name == "prior" else 0)


def test_label_and_image_are_those_of_the_drawn_season() -> None:
    batch = random_batch(4)
    example = run(batch, eval_geometry(4, H, H), "none")
    assert example.prior is None
    for sample in range(4):
        assert torch.equal(example.label[sample], batch.labels[sample, sample].long())
    assert torch.equal((example.images["s1"] * 255).round().to(torch.uint8), batch.images["s1"])
    assert example.images["s1"].dtype == torch.float32


def test_bands_come_by_name_in_the_order_asked_for() -> None:
    batch = random_batch(2)
    geometry = eval_geometry(2, H, H)
    everything = run(batch, geometry, "none").images["s2"]
    for bands in (S2_9, S2_BANDS[::-1], ("B10", "B4", "B1")):
        part = prepare(batch, geometry, ("VH",), bands, "none", "cpu")
        assert torch.equal(part.images["s2"], everything[:, [S2_BANDS.index(band) for band in bands]])
        assert torch.equal((part.images["s1"][:, 0] * 255).round().to(torch.uint8), batch.images["s1"][:, 1])


def test_the_evaluation_crop_is_central() -> None:
    assert eval_geometry(1, 264, 256).rows[0, [0, -1]].tolist() == [4, 259]


def test_whole_patches_are_reflected_at_their_outermost_pixels_and_come_back() -> None:
    geometry = whole_geometry(2, 6, 9)
    assert geometry.rows.tolist() == [[1, 0, 1, 2, 3, 4, 5, 4, 3]] * 2
    assert crop_to_patch(geometry.cols[:1].expand(9, -1), 6)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert geometry.rows[0, padding_before(6, 9)] == 0
    assert whole_geometry(1, 6, 6).cols.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert whole_geometry(1, 3, 16).rows.shape == (1, 16)  # wider than the patch: reflected again


def test_a_crop_larger_than_the_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="crop_px=256 is larger than the patches of 48 px"):
        eval_geometry(1, 48, 256)
    with pytest.raises(ConfigError, match="crop_px"):
        geometry_of(random_batch(1), 64)

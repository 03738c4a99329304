from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cromss_dist.data.loading.prior import RADIUS_PX, label_prior, smoothing_matrix

GOLDEN = Path(__file__).resolve().parents[3].parent / "shared" / "golden"


def draw(size: int, B: int = 2) -> tuple[Tensor, Tensor]:
    """Blocky labels with a tenth of the pixels ignored, and drawn seasons."""
    generator = torch.Generator().manual_seed(size)
    blocks = torch.randint(0, 9, (B, 4, size // 8 + 1, size // 8 + 1), generator=generator)
    labels = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :size, :size].to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return labels.contiguous(), torch.randint(0, 4, (B,), generator=generator)


def by_scipy(labels: Tensor, seasons: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Oracle: one filter per sample, class and source, in float64."""
    y = labels.numpy()
    onehot = (y[:, :, None] == np.arange(9)[:, None, None]).astype(np.float64)
    sources = {"t": onehot.mean(1), "s": onehot[np.arange(len(y)), seasons.numpy()]}
    shares = []
    for k in kind:
        mass = np.array([[gaussian_filter(c, 3, mode="reflect", truncate=4) for c in sample] for sample in sources[k]])
        shares.append(mass / mass.sum(1, keepdims=True))
    return np.asarray(np.mean(shares, axis=0))


def test_smoothing_matrix_is_scipys_filter_of_a_block_with_its_margins() -> None:
    matrix = smoothing_matrix()
    whole = gaussian_filter1d(np.eye(matrix.shape[1]), 3, axis=0, mode="constant", truncate=4)
    np.testing.assert_allclose(matrix.numpy(), whole[RADIUS_PX:-RADIUS_PX], rtol=1e-7, atol=0)
    assert smoothing_matrix() is matrix
    assert RADIUS_PX == 12


@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 32, 45])
def test_small_patches_are_mirrored_as_often_as_it_takes(size: int) -> None:
    labels, seasons = draw(size)
    labels[:, :, 0, 0] = 3  # mass everywhere, so that the oracle has nothing to divide by zero
    np.testing.assert_allclose(label_prior(labels, seasons).numpy(), by_scipy(labels, seasons, "ts"), rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", ["t", "s", "ts"])
def test_prior_is_scipys_gaussian_filter(kind: Any) -> None:
    labels, seasons = draw(264)
    prior = label_prior(labels, seasons, kind)
    np.testing.assert_allclose(prior.numpy(), by_scipy(labels, seasons, kind), rtol=0, atol=2e-7)
    torch.testing.assert_close(prior.sum(1), torch.ones(2, 264, 264))


@pytest.mark.parametrize("kind", ["t", "s", "ts"])
def test_prior_is_the_published_one(kind: Any) -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"the golden numbers are not at {GOLDEN}")
    with (
        np.load(GOLDEN / "inputs.npz", allow_pickle=False) as inputs,
        np.load(GOLDEN / "smoothing.npz", allow_pickle=False) as expected,
    ):
        prior = label_prior(torch.from_numpy(inputs["labels"]), torch.from_numpy(inputs["seasons"]), kind)
        np.testing.assert_allclose(prior.numpy(), expected[f"prior_{kind}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["t", "s", "ts"])
@pytest.mark.parametrize("crop", [1, 16, 60, 70])
def test_a_flipped_crop_is_cut_from_the_whole(kind: Any, crop: int) -> None:
    labels, seasons = draw(70, B=5)
    starts = torch.tensor([0, 70 - crop, (70 - crop) // 2, min(3, 70 - crop), max(0, 67 - crop)])[:, None]
    rows, cols = starts + torch.arange(crop), starts.flip(0) + torch.arange(crop)
    rows[1::2] = rows[1::2].flip(1)
    cols[2:] = cols[2:].flip(1)
    whole = label_prior(labels, seasons, kind)
    part = label_prior(labels, seasons, kind, rows=rows, cols=cols)
    expected = torch.stack([whole[b][:, rows[b]][:, :, cols[b]] for b in range(5)])
    torch.testing.assert_close(part, expected, rtol=0, atol=3e-7)


def test_rows_and_columns_may_differ_in_length() -> None:
    labels, seasons = draw(64)
    rows, cols = torch.arange(10, 30).expand(2, 20), torch.arange(5, 55).expand(2, 50)
    part = label_prior(labels[:, :, :, :60], seasons, rows=rows, cols=cols)
    torch.testing.assert_close(part, label_prior(labels[:, :, :, :60], seasons)[:, :, 10:30, 5:55], rtol=0, atol=3e-7)


def test_autocast_does_not_coarsen_the_prior() -> None:
    labels, seasons = draw(40)
    with torch.autocast("cpu", torch.bfloat16):
        prior = label_prior(labels, seasons)
    assert torch.equal(prior, label_prior(labels, seasons))


def test_seasons_only_matter_to_the_spatial_prior() -> None:
    labels, seasons = draw(32)
    other = (seasons + 1) % 4
    assert torch.equal(label_prior(labels, seasons, "t"), label_prior(labels, other, "t"))
    alone = labels[torch.arange(2), seasons][:, None].expand(2, 4, 32, 32)
    torch.testing.assert_close(label_prior(labels, seasons, "s"), label_prior(alone, other, "t"))


def test_where_no_label_is_near_the_prior_is_uniform() -> None:
    labels = torch.full((1, 4, 64, 64), 255, dtype=torch.uint8)
    labels[0, 2, 0, 0] = 5
    prior = label_prior(labels, torch.tensor([2]), "ts")
    assert torch.equal(prior[0, :, 13:, :], torch.full((9, 51, 64), 1 / 9))
    torch.testing.assert_close(prior[0, 5, :13, :13], torch.ones(13, 13))
    assert not prior[0, :5, :13, :13].any()


def test_nothing_waits_for_the_device() -> None:
    # A fake tensor has no values: reading one on the host raises.
    labels, seasons = draw(40)
    rows = torch.arange(8, 24).expand(2, 16)
    smoothing_matrix(labels.device)  # cached before, so that no fake matrix stays in the cache
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (labels, seasons, rows)]
        assert label_prior(fake[0], fake[1], "ts", rows=fake[2], cols=fake[2]).shape == (2, 9, 16, 16)

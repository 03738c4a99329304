"""The spatial-temporal label prior: class shares around a pixel, over its neighbourhood and its seasons.

Shapes: B batch, T seasons, C classes, H x W patch, h x w the part asked for, R x S the window of the patch it depends on.
"""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from cromss_dist.schema import NUM_CLASSES

SIGMA_PX = 3.0
TRUNCATE = 4.0
RADIUS_PX = int(TRUNCATE * SIGMA_PX + 0.5)


@lru_cache(maxsize=64)
def smoothing_matrix(
    size: int,
    sigma: float = SIGMA_PX,
    truncate: float = TRUNCATE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The 1-D Gaussian filter with mirrored borders (d c b a | a b c d | d c b a) as a matrix: filtered = K @ values.

    The filter is separable, so a patch y is smoothed by K y K^T. Cached: do not write to the result.

    Args:
        size: Length of the axis, px; may be shorter than the filter's radius.
        sigma: Standard deviation, px.
        truncate: The filter ends at this many sigma.
        device: Where K lives.
        dtype: Type of K; it is computed in float64.

    Returns:
        K, shape (size, size), rows sum to 1; zero further than int(truncate * sigma + 0.5) px from the diagonal.
    """
    radius = int(truncate * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    taps /= taps.sum()
    source = (torch.arange(size)[:, None] + offset) % (2 * size)  # the mirrored axis repeats every 2 * size
    source = torch.where(source < size, source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, taps.expand(size, -1).contiguous())
    return matrix.to(device=device, dtype=dtype)


def _band(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows `index` (B, h) of K, cut to the window they depend on: the window (B, R) and K there (B, h, R).

    R depends on shapes alone and the start stays on the device, so that nothing waits for the GPU.
    """
    length = min(size, index.shape[1] + 2 * RADIUS_PX)
    start = (index.amin(1) - RADIUS_PX).clamp(0, size - length)
    window = start[:, None] + torch.arange(length, device=index.device)
    matrix = smoothing_matrix(size, device=index.device)
    return window, matrix[index[:, :, None], window[:, None, :]]


@torch.no_grad()
def label_prior(
    labels: Tensor,
    seasons: Tensor,
    kind: Literal["t", "s", "ts"] = "ts",
    num_classes: int = NUM_CLASSES,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> Tensor:
    """Class distribution of each pixel from its neighbours' noisy labels, all seasons ('t'), the drawn one ('s') or both.

    M_t = G * mean over seasons of one-hot labels, M_s = G * one-hot labels of the drawn season, G a Gaussian of sigma
    3 px cut at 12 px; each is divided by its sum over classes, 'ts' is their mean. Ignored pixels add nothing; where no
    class has mass the prior is uniform. Only the pixels that `rows` x `cols` depend on are read, and both filters run
    as one pair of batched products.

    Args:
        labels: uint8 (B, T, H, W), classes 0..C-1; any other value is ignored.
        seasons: int64 (B,), the drawn season of each sample.
        kind: 't' temporal, 's' spatial, 'ts' the mean of both.
        num_classes: C.
        rows: int64 (B, h), rows of the patch to return, in that order: consecutive ones, ascending or descending (a crop,
            flipped or not). All rows if None.
        cols: int64 (B, w), the same for columns.

    Returns:
        float32 (B, C, h, w) in [0, 1], sums to 1 over C; on the device of `labels`.

    Reference: CromSS, section III-B; scipy.ndimage.gaussian_filter(mode='reflect', sigma=3, truncate=4).
    Departs: batched matrix products on the training device in place of filters per class and sample on the data workers.
    """
    B, T, H, W = labels.shape
    device = labels.device
    rows = torch.arange(H, device=device).expand(B, H) if rows is None else rows
    cols = torch.arange(W, device=device).expand(B, W) if cols is None else cols
    window_R, K_BhR = _band(rows, H)
    window_S, K_BwS = _band(cols, W)

    batch = torch.arange(B, device=device)[:, None, None, None]
    classes_C1 = torch.arange(num_classes, dtype=torch.uint8, device=device)[:, None]
    sources = []  # one-hot labels in the order (row, class, column), in which neither product needs a transposed copy
    if "t" in kind:
        season = torch.arange(T, device=device)[:, None]
        y_BRTS = labels[batch, season, window_R[:, :, None, None], window_S[:, None, None, :]]
        sources.append((y_BRTS[:, :, :, None] == classes_C1).sum(2, dtype=torch.float32))
    if "s" in kind:
        y_BR1S = labels[batch, seasons[:, None, None, None], window_R[:, :, None, None], window_S[:, None, None, :]]
        sources.append((y_BR1S == classes_C1).float())

    onehot_BRKS = torch.stack(sources, 2).flatten(2, 3)
    with torch.autocast(device.type, enabled=False):
        across_BRKw = onehot_BRKS.flatten(1, 2) @ K_BwS.mT
        mass_BhKw = K_BhR @ across_BRKw.view(B, window_R.shape[1], -1)
    mass = mass_BhKw.view(B, rows.shape[1], len(sources), num_classes, cols.shape[1])
    total = mass.sum(3, keepdim=True)
    shares = torch.where(total > 0, mass / total, 1 / num_classes)
    return shares.mean(2).transpose(1, 2).contiguous()

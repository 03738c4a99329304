"""The spatial-temporal label prior: class shares around a pixel, over its neighbourhood and its seasons.

Shapes: B batch, T seasons, C classes, N sources (temporal, spatial), H x W patch, h x w the part asked for, R x S that part with
the filter's margin, its sides rounded up to whole blocks.
"""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from cromss_dist.schema import NUM_CLASSES

SIGMA_PX = 3.0
TRUNCATE = 4.0
RADIUS_PX = int(TRUNCATE * SIGMA_PX + 0.5)
_BLOCK_PX = 32  # measured: a product with less of the margin in it is too thin for a CPU's matrix kernels


@lru_cache(maxsize=8)
def smoothing_matrix(device: torch.device | str = "cpu") -> Tensor:
    """The 1-D Gaussian filter as a matrix, float32 (32, 32 + 24): 32 px from themselves and 12 px on either side.

    A line is filtered 32 px at a time, so that of the whole line's band matrix little more is multiplied than the band. The
    filter is separable: a block y is smoothed by K y K^T. Rows sum to 1. Cached: do not write to it.
    """
    offset = torch.arange(_BLOCK_PX + 2 * RADIUS_PX) - torch.arange(_BLOCK_PX)[:, None] - RADIUS_PX
    taps = torch.exp(-0.5 * (offset.double() / SIGMA_PX) ** 2) * (offset.abs() <= RADIUS_PX)
    return (taps / taps.sum(1, keepdim=True)).to(device=device, dtype=torch.float32)


def _with_margin(index: Tensor, size: int) -> Tensor:
    """The line `index` (B, h) in its direction, from 12 px before it, to 12 px after h rounded up to whole blocks: (B, R).

    Beyond the patch it is mirrored with the edge pixel repeated (d c b a | a b c d | d c b a), however often that takes.
    """
    length = -(-index.shape[1] // _BLOCK_PX) * _BLOCK_PX
    step = index[:, -1:].sub(index[:, :1]).sign() if index.shape[1] > 1 else 1
    line = index[:, :1] + step * torch.arange(-RADIUS_PX, length + RADIUS_PX, device=index.device)
    line = line % (2 * size)  # the mirrored axis repeats every 2 * size
    return torch.where(line < size, line, 2 * size - 1 - line)


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
    class has mass the prior is uniform. Only the pixels within 12 px of `rows` x `cols` are read, and samples, classes and
    sources are filtered together.

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
    h, w = rows.shape[1], cols.shape[1]
    rows, cols = _with_margin(rows, H), _with_margin(cols, W)
    R, S = rows.shape[1], cols.shape[1]
    batch = torch.arange(B, device=device)
    if kind == "s":
        labels, T = labels[batch, seasons][:, None], 1
        seasons = torch.zeros_like(seasons)
    y_BTRS = labels[batch[:, None, None], torch.arange(T, device=device)[:, None], rows[:, None]]
    y_BTRS = y_BTRS.gather(3, cols[:, None, None].expand(-1, T, R, -1))

    classes_C111 = torch.arange(num_classes, dtype=torch.uint8, device=device)[:, None, None, None]
    onehot_NCBRS = torch.empty(len(kind), num_classes, B, R, S, device=device)
    if "t" in kind:
        # Counted in bytes, which are four times as fast to pass over as floats.
        count_CBRS = (y_BTRS[:, 0] == classes_C111).view(torch.uint8)
        for season in range(1, T):
            count_CBRS += (y_BTRS[:, season] == classes_C111).view(torch.uint8)
        onehot_NCBRS[0] = count_CBRS
    if "s" in kind:
        onehot_NCBRS[-1] = y_BTRS[batch, seasons] == classes_C111

    mass_NCBhw = _smooth(onehot_NCBRS)[..., :h, :w]
    total_NBhw = mass_NCBhw.sum(1)
    known = total_NBhw > 0
    scale = torch.where(known, 1 / (len(kind) * total_NBhw), 0)
    prior = torch.where(known, 0, 1 / (len(kind) * num_classes)).sum(0)[:, None].repeat(1, num_classes, 1, 1)
    for source_CBhw, scale_Bhw in zip(mass_NCBhw, scale, strict=True):
        prior.addcmul_(source_CBhw.transpose(0, 1), scale_Bhw[:, None])
    return prior


def _smooth(values: Tensor) -> Tensor:
    """Filters the last two axes, of R and S px with margins, by blocks: float32 (..., R - 24, S - 24)."""
    *outer, R, S = values.shape
    height, width = R - 2 * RADIUS_PX, S - 2 * RADIUS_PX
    matrix = smoothing_matrix(values.device)
    reach = matrix.shape[1]
    lines = values.view(-1, S)
    across = values.new_empty(len(lines), width)
    smooth = values.new_empty(len(lines) // R, height, width)
    with torch.autocast(values.device.type, enabled=False):
        for x in range(0, width, _BLOCK_PX):
            torch.mm(lines[:, x : x + reach], matrix.mT, out=across[:, x : x + _BLOCK_PX])
        across = across.view(-1, R, width)
        for y in range(0, height, _BLOCK_PX):
            torch.bmm(matrix.expand(len(across), -1, -1), across[:, y : y + reach], out=smooth[:, y : y + _BLOCK_PX])
    return smooth.view(*outer, height, width)

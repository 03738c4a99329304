"""From stored values to what the model sees, on the training device: up-sampling, crop, flip, prior, rotation.

Crop and flip are one geometry a sample: which source row and column each output pixel takes. Every band, label and the
prior follow the same two index vectors, so they cannot come apart. Bands of 20 m and 60 m are resampled straight to
those rows and columns: bicubic resampling is K_rows X K_cols^T, of which only the rows asked for are computed.

Shapes: B batch, h x w output px, H x W patch px, S side of a band at its native resolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from cromss_dist.config import ViewConfig
from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.prior import label_prior
from cromss_dist.errors import ConfigError
from cromss_dist.schema import MODALITIES, NUM_CLASSES, Batch, Example, Modality

PriorKind = Literal["t", "s", "ts", "none"]

# Half a count is rounded up, as PIL does. Weights of scales 2 and 6 are multiples of 1/3456, so exact halves are told
# from all other values by less than that, and the order in which a device sums does not matter.
_ROUND_UP = 0.5 + 1e-4


@dataclass(frozen=True)
class Geometry:
    """Where the output pixels of B samples come from; on the host.

    Args:
        rows: int64 (B, h): source row at 10 m.
        cols: int64 (B, w): source column at 10 m.
        angles_deg: float64 (B,): rotation about the centre after that, counter-clockwise; 0 for none.
    """

    rows: Tensor
    cols: Tensor
    angles_deg: Tensor


def train_geometry(draws: Draws, patch_px: int, crop_px: int, flip_p: float, rotate_p: float, rotate_max_deg: float) -> Geometry:
    """Random crop, flip and rotation of each sample.

    Args:
        draws: From `draws.Draws` for the batch.
        patch_px: Side of the stored patch at 10 m.
        crop_px: Side of the output.
        flip_p: Probability of a flip: horizontal, vertical or both, equally likely.
        rotate_p: Probability of a rotation.
        rotate_max_deg: Angles are uniform in +- this.

    Raises:
        ConfigError: the crop is larger than the patch.

    Reference: CromSS, section IV-A.
    """
    _check_crop(patch_px, crop_px)
    starts = [np.floor(draw * (patch_px - crop_px + 1)).astype(np.int64)[:, None] for draw in (draws.row, draws.col)]
    kind = np.where(draws.flip < flip_p, 1 + np.floor(draws.flip_kind * 3).astype(np.int64), 0)[:, None]  # 1 h, 2 v, 3 both
    forward = np.arange(crop_px)
    rows = starts[0] + np.where(kind & 2, forward[::-1], forward)
    cols = starts[1] + np.where(kind & 1, forward[::-1], forward)
    angles = np.where(draws.rotate < rotate_p, (2 * draws.angle - 1) * rotate_max_deg, 0.0)
    return Geometry(torch.from_numpy(rows), torch.from_numpy(cols), torch.from_numpy(angles))


def eval_geometry(batch_size: int, patch_px: int, crop_px: int) -> Geometry:
    """The central crop for each of `batch_size` samples. Raises ConfigError when it is larger than the patch."""
    _check_crop(patch_px, crop_px)
    line = ((patch_px - crop_px) // 2 + torch.arange(crop_px)).expand(batch_size, -1)
    return Geometry(line, line, torch.zeros(batch_size, dtype=torch.float64))


def whole_geometry(batch_size: int, patch_px: int, multiple: int) -> Geometry:
    """The whole patch, in the middle of the next multiple; around it its own pixels, reflected at the outermost ones.

    `padding_before` says where it begins in the result, and `crop_to_patch` takes it out again.
    """
    before = padding_before(patch_px, multiple)
    line = np.pad(np.arange(patch_px), (before, -patch_px % multiple - before), mode="reflect")
    lines = torch.from_numpy(line).expand(batch_size, -1)
    return Geometry(lines, lines, torch.zeros(batch_size, dtype=torch.float64))


def padding_before(patch_px: int, multiple: int) -> int:
    """Rows above a patch in `whole_geometry`, and columns left of it; below and right of it there may be one more."""
    return (-patch_px % multiple) // 2


def crop_to_patch(values: Tensor, patch_px: int) -> Tensor:
    """(..., h, w) of `whole_geometry`, logits or labels or images, to (..., patch_px, patch_px)."""
    start = (values.shape[-1] - patch_px) // 2
    return values[..., start : start + patch_px, start : start + patch_px]


def train_example(
    batch: Batch,
    view: ViewConfig,
    bands_s1: Sequence[str],
    bands_s2: Sequence[str],
    prior: PriorKind,
    seed: int,
    device: torch.device | str,
) -> Example:
    """What training sees of a batch: `prepare` with the crop, flip and rotation that the run draws for each sample.

    Args:
        batch: From a train loader; on the host.
        view: Crop and augmentation.
        bands_s1: See `prepare`, as for the next two.
        bands_s2: Sentinel-2 bands.
        prior: Kind of label prior.
        seed: Of the run.
        device: Where the work is done and the result lives.

    Raises:
        ConfigError: the crop is larger than the patches.
    """
    draws = Draws(seed, batch.epochs.numpy(), batch.sample_ids.numpy())
    patch_px = batch.labels.shape[-1]
    geometry = train_geometry(draws, patch_px, view.crop_px, view.flip_p, view.rotate_p, view.rotate_max_deg)
    return prepare(batch, geometry, bands_s1, bands_s2, prior, device)


def prepare(
    batch: Batch,
    geometry: Geometry,
    bands_s1: Sequence[str],
    bands_s2: Sequence[str],
    prior: PriorKind,
    device: torch.device | str,
) -> Example:
    """Makes the model's input of a batch. A sample's result does not depend on the others in its batch.

    Args:
        batch: From a loader; on the host.
        geometry: Of the batch.
        bands_s1: Sentinel-1 bands by name, in the order wanted; none leaves the modality out.
        bands_s2: Sentinel-2 bands by name, in the order wanted.
        prior: Kind of label prior, or 'none'. It is that of the whole patch and moves with the image.
        device: Where the work is done and the result lives.

    Returns:
        Images float32 in [0, 1] (stored value / 255), labels int64, prior float32 with sum 1 over the classes.

    Reference: CromSS, section IV-A, and its data pipeline, which resizes uint8 bands with PIL's bicubic filter.
    Departs: labels are never interpolated; rotation pads by reflection instead of black.
    """
    rows, cols = geometry.rows.to(device, non_blocking=True), geometry.cols.to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True)
    seasons = batch.seasons.to(device, non_blocking=True)
    label = _gather(labels[torch.arange(len(labels), device=device), seasons][:, None], rows, cols)
    wanted = {modality: bands for modality, bands in zip(MODALITIES, (bands_s1, bands_s2), strict=True) if bands}
    layers = [_images(batch, modality, bands, rows, cols) for modality, bands in wanted.items()]
    values = [label.float()]
    if batch.reference is not None:
        values.append(_gather(batch.reference.to(device, non_blocking=True)[:, None], rows, cols).float())
    if prior != "none":
        layers.append(label_prior(labels, seasons, prior, NUM_CLASSES, rows=rows, cols=cols))
    rotated = geometry.angles_deg.nonzero().flatten()  # on the host, so that no device is waited for
    if len(rotated):
        angles = geometry.angles_deg[rotated]
        layers = [_rotate(layer, rotated.to(device), angles, "bilinear") for layer in layers]
        values = [_rotate(value, rotated.to(device), angles, "nearest") for value in values]
    return Example(
        images=dict(zip(wanted, layers, strict=False)),  # the prior is the last layer
        label=values[0][:, 0].long(),
        prior=layers[-1] if prior != "none" else None,
        reference=values[1][:, 0].long() if batch.reference is not None else None,
        weights=batch.weights.to(device, non_blocking=True),
    )


@lru_cache(maxsize=16)
def bicubic_matrix(size_in: int, size_out: int, device: torch.device | str = "cpu") -> Tensor:
    """K, float32 (size_out, size_in): K @ x is PIL's bicubic up-sampling of x. Cached: do not write to it.

    Reference: Keys, "Cubic convolution interpolation for digital image processing" (1981) with a = -0.5; at the border
    PIL leaves out what lies outside and normalises the rest, instead of repeating the edge pixel.
    """
    centre = (torch.arange(size_out, dtype=torch.float64)[:, None] + 0.5) * size_in / size_out
    t = (torch.arange(size_in, dtype=torch.float64) + 0.5 - centre).abs()
    near, far = (1.5 * t - 2.5) * t**2 + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    return (weights / weights.sum(1, keepdim=True)).to(device=device, dtype=torch.float32)


def _images(batch: Batch, modality: Modality, bands: Sequence[str], rows: Tensor, cols: Tensor) -> Tensor:
    """The bands of a modality in the order asked for: float32 (B, bands, h, w) in [0, 1]."""
    layers: dict[str, Tensor] = {}
    for spec in batch.specs:
        wanted = [band for band in spec.bands if band in bands] if spec.modality == modality else []
        if wanted:
            # Chosen on the device: a choice on the host is a copy there, in memory that a device has to wait for.
            stored = batch.images[spec.name].to(rows.device, non_blocking=True)
            if len(wanted) < len(spec.bands):
                stored = torch.stack([stored[:, spec.bands.index(band)] for band in wanted], dim=1)
            found = _gather(stored, rows, cols).float() if spec.scale == 1 else _upsample(stored, spec.scale, rows, cols)
            layers.update(zip(wanted, found.unbind(1), strict=True))
    return torch.stack([layers[band] for band in bands], dim=1) / 255


def _gather(values: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """(B, N, H, W) at the rows and columns of each sample: (B, N, h, w)."""
    b = torch.arange(values.shape[0], device=values.device)[:, None, None, None]
    n = torch.arange(values.shape[1], device=values.device)[:, None, None]
    return values[b, n, rows[:, None, :, None], cols[:, None, None, :]]


def _upsample(stored: Tensor, scale: int, rows: Tensor, cols: Tensor) -> Tensor:
    """uint8 (B, N, S, S) to float32 (B, N, h, w), whole counts: columns first and then rows, rounded after each, as PIL does."""
    matrix = bicubic_matrix(stored.shape[-1], stored.shape[-1] * scale, stored.device)
    across = (stored.float() @ matrix[cols].transpose(1, 2)[:, None] + _ROUND_UP).floor().clamp(0, 255)
    return (matrix[rows][:, None] @ across + _ROUND_UP).floor().clamp(0, 255)


def _rotate(values: Tensor, which: Tensor, angles_deg: Tensor, mode: str) -> Tensor:
    """Rotates the samples `which` of (B, N, h, w) counter-clockwise about the centre, in place."""
    h, w = values.shape[-2:]
    radians = angles_deg * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # Output to input, in coordinates of [-1, 1] on each axis, hence the ratio of the sides.
    theta = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], dim=1).view(-1, 2, 3).to(values.device, torch.float32)
    grid = affine_grid(theta, [len(which), values.shape[1], h, w], align_corners=False)
    values[which] = grid_sample(values[which], grid, mode=mode, padding_mode="reflection", align_corners=False)
    return values


def _check_crop(patch_px: int, crop_px: int) -> None:
    if crop_px > patch_px:
        raise ConfigError(f"data.crop_px={crop_px} is larger than the patches of {patch_px} px; give at most {patch_px}.")

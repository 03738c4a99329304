"""Single pixels: which ones a quick look learns from, and what encoders say of them.

Layer 4. A pixel's features are those of all stages of all encoders, each map brought to the image's resolution bilinearly.

B tiles, C classes, D features of a pixel, P pixels, H rows, W columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cromss_dist.data.loading.draws import IntArray, Stream, hash64, ranked_keys
from cromss_dist.data.loading.selection import Selection
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import ConfigError
from cromss_dist.models.downstream import EncoderSpec
from cromss_dist.models.encoder import build_encoder, load_strictly, stage_channels, stage_features
from cromss_dist.schema import LABEL_ARRAY, MODALITIES, Modality

PIXELS_PER_CLASS, MAX_TILES = 1000, 256


@dataclass(frozen=True, eq=False)
class Pixels:
    """Labelled pixels that are learnt from, in the order of tiles.

    Args:
        ids: int64 (P,): sample id of the tile.
        seasons: int64 (P,).
        rows: int64 (P,).
        cols: int64 (P,).
        classes: int64 (P,), in [0, C).
        frequency: int64 (C,): labelled pixels of each class in all tiles that they were drawn from.
    """

    ids: IntArray
    seasons: IntArray
    rows: IntArray
    cols: IntArray
    classes: IntArray
    frequency: IntArray

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """Pixels of the tiles that one of each class stands for, float64 (C,); 0 where the class has none."""
        drawn = np.bincount(self.classes, minlength=len(self.frequency))
        return self.frequency / np.maximum(drawn, 1)

    def selection(self, num_seasons: int) -> Selection:
        """The tiles and seasons that they are in."""
        ids, place = np.unique(self.ids, return_inverse=True)
        seasons = np.zeros((len(ids), num_seasons), bool)
        seasons[place, self.seasons] = True
        return Selection(ids, seasons)


def draw_pixels(dataset: Dataset, selection: Selection, seed: int) -> Pixels:
    """Of each class the `PIXELS_PER_CLASS` pixels with the smallest hash of (seed, tile, place); of a rare class all.

    They are drawn from the first `MAX_TILES` of the tiles, in the order of `ranked_keys`, and are the same for every encoder.

    Args:
        dataset: The training set.
        selection: Of its tiles, and their seasons.
        seed: Of the run.

    Raises:
        ConfigError: fewer than two classes are labelled.
        ShardError: a label cannot be read.
    """
    ranked = ranked_keys([dataset.locations[i] for i in selection.ids], seed, Stream.PIXELS)
    seen = selection.take(np.sort(ranked[:MAX_TILES]))
    num_classes = len(dataset.class_names)
    label = np.empty(dataset.shape(LABEL_ARRAY), np.uint8)
    frequency = np.zeros(num_classes, np.int64)
    drawn = np.empty((3, 0), np.int64)  # sample id, place in (season, row, column), class
    highest = np.full(num_classes, np.iinfo(np.uint64).max)  # hash that is still drawn: later tiles have few below it
    for sample_id, seasons in zip(seen.ids.tolist(), seen.seasons, strict=True):
        dataset.read_into(sample_id, 0, {LABEL_ARRAY: label})
        places = np.flatnonzero((label < num_classes) & seasons[:, None, None])
        classes = label.ravel()[places].astype(np.int64)
        frequency += np.bincount(classes, minlength=num_classes)
        near = hash64(seed, Stream.PIXELS, sample_id, places) <= highest[classes]
        found = np.stack([np.full(near.sum(), sample_id), places[near], classes[near]])
        drawn = _first_of_each_class(np.concatenate([drawn, found], axis=1), seed, highest)
    if np.count_nonzero(frequency) < 2:
        present = ", ".join(name for name, count in zip(dataset.class_names, frequency, strict=True) if count) or "no class"
        raise ConfigError(
            f"The {len(seen.ids)} training tiles have labels of {present}, and a classifier needs two classes; raise "
            "labels.fraction or labels.per_class, or look at the training set."
        )
    ids, places, classes = drawn[:, np.lexsort((drawn[1], drawn[0]))]
    at_season, rows, cols = (index.astype(np.int64) for index in np.unravel_index(places, label.shape))
    return Pixels(ids, at_season, rows, cols, classes, frequency)


def _first_of_each_class(pixels: IntArray, seed: int, highest: npt.NDArray[np.uint64]) -> IntArray:
    """Of int64 (3, P) the first of each class; lowers the `highest` hash of those that have enough."""
    ids, places, classes = pixels
    hashes = hash64(seed, Stream.PIXELS, ids, places)
    order = np.lexsort((hashes, classes))
    ordered = classes[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # among those of its class
    last = order[rank == PIXELS_PER_CLASS - 1]
    highest[classes[last]] = hashes[last]
    first: IntArray = pixels[:, order[rank < PIXELS_PER_CLASS]]
    return first


class FrozenEncoders(nn.Module):
    """Encoders that stay as they are: without gradients, batch norms in evaluation mode for ever.

    Args:
        specs: By modality. What has no weights is drawn from `seed`, as in a frozen run of that seed.
        seed: Of the run.

    Raises:
        ConfigError: an encoder is unknown.
        PackageError: weights do not fit.
    """

    def __init__(self, specs: Mapping[Modality, EncoderSpec], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoders = nn.ModuleDict()
        self.random = [modality for modality in MODALITIES if modality in specs and specs[modality].weights is None]
        """Modalities of the encoders that were drawn."""
        for modality in MODALITIES:
            if modality not in specs:
                continue
            spec = specs[modality]
            self.encoders[modality] = build_encoder(spec.name, spec.depth, spec.in_channels)
            if spec.weights is not None:
                load_strictly(self.encoders[modality], spec.weights)
        stages = [stage_channels(encoder) for encoder in self.encoders.values()]
        self.widths = tuple(channels for of_encoder, _ in stages for channels in of_encoder)
        """Channels of each map of `forward`; they add up to D."""
        self.input_multiple = max(strides[-1] for _, strides in stages)
        """H and W of images must be multiples of it, px."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenEncoders":
        """As torch's, and changes nothing."""
        return super().train(False)

    def settle(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Gives the batch norms of drawn encoders statistics: the mean over batches of images as `forward` takes them.

        Without any, features grow from block to block: the baseline would be worse than it has to be.
        """
        drawn = [encoder for modality, encoder in self.encoders.items() if modality in self.random]
        norms = [m for encoder in drawn for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.train()
        for images in batches:
            self(*images)
        self.train()

    def forward(self, *images: Tensor) -> list[Tensor]:
        """Feature maps.

        Args:
            images: Float (B, bands, H, W) in [0, 1] of each modality, S1 first.

        Returns:
            Of each encoder in turn a map of each stage, float (B, channels, H / stride, W / stride).
        """
        per_encoder = zip(self.encoders.values(), images, strict=True)
        return [stage for encoder, image in per_encoder for stage in stage_features(encoder, image)]


def features_at(stages: Sequence[Tensor], rows: Tensor, cols: Tensor, side: int) -> Tensor:
    """The features of the same pixels in each image: what `F.interpolate(..., mode="bilinear")` has there.

    Args:
        stages: Maps of `FrozenEncoders`.
        rows: int64 (P,) in the images.
        cols: int64 (P,).
        side: H = W of the images, px.

    Returns:
        Float (B, P, D).
    """
    x, y = ((2 * place.to(stages[0]) + 1) / side - 1 for place in (cols, rows))  # [-1, 1] from edge to edge
    points = torch.stack([x, y], dim=-1).expand(len(stages[0]), 1, -1, -1)
    found = [F.grid_sample(stage, points, mode="bilinear", padding_mode="border", align_corners=False) for stage in stages]
    return torch.cat(found, dim=1)[:, :, 0].transpose(1, 2)

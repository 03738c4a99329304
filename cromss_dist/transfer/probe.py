"""Quick looks at encoders as they are: single pixels classified by their features alone, linearly or by nearest neighbours.

Layer 4. No decoder and no steps: the encoders see the labelled training tiles once and the test tiles once. That tells a broken
encoder from a sound one and ranks encoders roughly. A decoder also sees what surrounds a pixel, so figures stand beside those of
the same mode only.

Both learn from the pixels of `draw_pixels`, equally many of each class; how frequent the classes are is put back afterwards.

B tiles, C classes, D features of a pixel, P pixels, H rows, W columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cromss_dist.data.loading.augment import padding_before
from cromss_dist.data.loading.loader import EvalLoader
from cromss_dist.schema import IGNORE, Batch, Example
from cromss_dist.transfer.evaluate import ScoredTiles, evaluate
from cromss_dist.transfer.panels import TilePanel
from cromss_dist.transfer.pixels import FrozenEncoders, Pixels, draw_pixels, features_at
from cromss_dist.transfer.results import Tiles
from cromss_dist.transfer.task import Transfer
from cromss_dist.world import World

PENALTY_C = 0.01
"""Inverse strength of the L2 penalty of 'linear', as scikit-learn has it: beside the sum of all pixels' losses."""
MAX_ITERATIONS = 1000

GRID = 16
"""Of each test tile 'knn' scores GRID x GRID pixels, evenly spaced: neighbours of all pixels would take hours."""
NEIGHBOURS, TEMPERATURE = 20, 0.07

Array = npt.NDArray[np.float64]


class LinearProbe(nn.Module):
    """A multinomial logistic regression on the standardised features of each pixel.

    Bilinear upsampling and a linear classifier can change places, so that each stage is classified at its own resolution and
    logits are upsampled and added up: every pixel gets what the regression says of its D features, without these being made.

    Args:
        encoders: Frozen.
        weight: Float (C, D), of features as they are.
        bias: Float (C,); -inf for a class that is never predicted.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, encoders: FrozenEncoders, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoders = encoders
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def fit(cls, encoders: FrozenEncoders, features: Tensor, pixels: Pixels) -> "LinearProbe":
        """Learns from the pixels' features, float (P, D).

        Pixels were drawn by their classes, which changes nothing of a logistic regression but its intercepts, each by the
        logarithm of how much more likely a pixel of that class was to be drawn.

        Reference: Prentice and Pyke, "Logistic disease incidence models and case-control studies" (1979).
        """
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]  # slow to import

        values = features.double().cpu().numpy()
        mean, spread = _moments(values)
        model = LogisticRegression(C=PENALTY_C, max_iter=MAX_ITERATIONS).fit((values - mean) / spread, pixels.classes)
        coefficients, intercepts = model.coef_, model.intercept_
        if len(coefficients) == 1:  # of two classes it has the difference
            coefficients, intercepts = (np.concatenate([0 * found, found]) for found in (coefficients, intercepts))
        num_classes = len(pixels.frequency)
        weight, bias = np.zeros((num_classes, len(mean))), np.full(num_classes, -np.inf)
        weight[model.classes_] = coefficients / spread
        bias[model.classes_] = intercepts - weight[model.classes_] @ mean + np.log(pixels.weight[model.classes_])
        return cls(encoders, torch.from_numpy(weight).float(), torch.from_numpy(bias).float())

    def forward(self, *images: Tensor) -> tuple[Tensor]:
        """Logits, float (B, C, H, W), of images as `FrozenEncoders` takes them."""
        stages = self.encoders(*images)
        logits_BCHW = self.bias[:, None, None].expand(len(images[0]), -1, *images[0].shape[-2:])
        for stage, weight in zip(stages, torch.split(self.weight, list(self.encoders.widths), dim=1), strict=True):
            of_stage = F.conv2d(stage, weight[:, :, None, None])
            logits_BCHW = logits_BCHW + F.interpolate(of_stage, images[0].shape[-2:], mode="bilinear", align_corners=False)
        return (logits_BCHW,)


class NearestNeighbours(nn.Module):
    """A vote of the most similar pixels that were learnt from, each weighted by its similarity.

    Features are standardised and each stage is given the same share of a vector's length, however many channels it has;
    similarity is the cosine. A vote counts for as many pixels as the one that votes stands for.

    Args:
        encoders: Frozen.
        features: Float (P, D), of `pixels`.
        pixels: Learnt from.
        rows: int64 (h,): rows of the images that are classified.
        cols: int64 (w,): columns.

    Reference: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), the vote and its
    temperature; Caron et al., "Emerging properties in self-supervised vision transformers" (2021), 20 neighbours.
    """

    mean: Tensor
    scale: Tensor
    votes: Tensor
    known: Tensor
    rows: Tensor
    cols: Tensor

    def __init__(self, encoders: FrozenEncoders, features: Tensor, pixels: Pixels, rows: Tensor, cols: Tensor) -> None:
        super().__init__()
        self.encoders = encoders
        mean, spread = _moments(features.double().cpu().numpy())
        widths = np.array(encoders.widths)
        self.register_buffer("mean", torch.from_numpy(mean).float())
        self.register_buffer("scale", torch.from_numpy(1 / (spread * np.sqrt(np.repeat(widths, widths)))).float())
        votes = np.eye(len(pixels.frequency))[pixels.classes] * pixels.weight
        self.register_buffer("votes", torch.from_numpy(votes).float())
        self.register_buffer("known", self._directions(features.cpu()))
        self.register_buffer("rows", rows)
        self.register_buffer("cols", cols)

    def forward(self, *images: Tensor) -> tuple[Tensor]:
        """Sums of votes, float (B, C, H, W), at `rows` x `cols`; 0 elsewhere."""
        height, width = images[0].shape[-2:]
        rows, cols = (index.flatten() for index in torch.meshgrid(self.rows, self.cols, indexing="ij"))
        features = features_at(self.encoders(*images), rows, cols, height)
        similarity, neighbour = (self._directions(features) @ self.known.T).topk(min(NEIGHBOURS, len(self.known)), dim=-1)
        votes_BPC = ((similarity / TEMPERATURE).exp()[..., None] * self.votes[neighbour]).sum(-2)
        votes_BCHW = votes_BPC.new_zeros(len(images[0]), votes_BPC.shape[-1], height, width)
        votes_BCHW[:, :, rows, cols] = votes_BPC.transpose(1, 2)
        return (votes_BCHW,)

    def _directions(self, features: Tensor) -> Tensor:
        return F.normalize((features - self.mean) * self.scale, dim=-1)


def _moments(features: Array) -> tuple[Array, Array]:
    """Mean and standard deviation, float64 (D,), the latter 1 where a feature never changes."""
    spread = features.std(axis=0)
    return features.mean(axis=0), np.where(spread > 0, spread, 1.0)


@dataclass(frozen=True)
class ScoredGrid(ScoredTiles):
    """Test tiles of which only the pixels of a grid are scored."""

    @cached_property
    def lines(self) -> Tensor:
        """int64 (at most GRID,): rows, and likewise columns, of the padded tiles."""
        side = self.dataset.patch_px
        places = (np.arange(min(GRID, side)) + 0.5) * side / min(GRID, side)
        return torch.from_numpy(places.astype(np.int64) + padding_before(side, self.multiple))

    def example(self, batch: Batch, device: torch.device) -> Example:
        """As that of whole tiles; all other pixels are ignored."""
        example = super().example(batch, device)
        lines = self.lines.to(device)
        label = torch.full_like(example.label, IGNORE)
        label[:, lines[:, None], lines] = example.label[:, lines[:, None], lines]
        return replace(example, label=label)


@dataclass(frozen=True)
class Look:
    """What a quick look found.

    Args:
        tiles: Of the test set; with 'knn' of the pixels of a grid.
        panels: Test tiles to look at; none with 'knn'.
        num_pixels: That were learnt from.
    """

    tiles: Tiles
    panels: tuple[TilePanel, ...]
    num_pixels: int


@torch.no_grad()
def look(task: Transfer, world: World, tell: Callable[[str], None]) -> Look:
    """Fits the classifier of a run in mode 'linear' or 'knn', and scores the test tiles.

    Args:
        task: The run.
        world: This process, alone.
        tell: Called with what is going on.

    Raises:
        ConfigError: fewer than two classes are labelled.
        ShardError: a tile is damaged.
    """
    config = task.config
    encoders = FrozenEncoders({modality: encoder.spec for modality, encoder in task.encoders.items()}, config.seed)
    encoders.to(world.device)
    pixels = draw_pixels(task.train, task.chosen, config.seed)
    drawn = pixels.selection(task.train.num_seasons)
    tell(f"learning from {len(pixels.ids):,} pixels of {len(drawn.ids)} training tiles, {sum(encoders.widths)} features each")
    learnt = replace(task.test, dataset=task.train, selection=drawn, multiple=encoders.input_multiple)
    if encoders.random:
        with _loader(learnt, task, world) as loader:
            encoders.settle(tuple(learnt.example(batch, world.device).images.values()) for batch in loader)
    features = _features(encoders, pixels, learnt, task, world)
    test = replace(task.test, multiple=encoders.input_multiple)
    network: LinearProbe | NearestNeighbours
    if config.mode == "linear":
        network = LinearProbe.fit(encoders, features, pixels)
    else:
        test = ScoredGrid(test.dataset, test.selection, test.bands, test.multiple)
        network = NearestNeighbours(encoders, features, pixels, test.lines, test.lines)
    num_panels = config.train.panel_samples if config.mode == "linear" else 0
    tiles, panels = evaluate(network.to(world.device), test, task.plan, world, task.reading, num_panels, lambda _: None)
    return Look(tiles, panels, len(pixels.ids))


def _features(encoders: FrozenEncoders, pixels: Pixels, tiles: ScoredTiles, task: Transfer, world: World) -> Tensor:
    """The features of the pixels, float32 (P, D) on the host."""
    features = torch.empty(len(pixels.ids), sum(encoders.widths))
    before = padding_before(tiles.dataset.patch_px, tiles.multiple)
    rows, cols = (torch.from_numpy(places + before) for places in (pixels.rows, pixels.cols))
    with _loader(tiles, task, world) as loader:
        for batch in loader:
            images = tuple(tiles.example(batch, world.device).images.values())
            stages: Sequence[Tensor] = encoders(*images)
            for i, (sample_id, season) in enumerate(zip(batch.sample_ids.tolist(), batch.seasons.tolist(), strict=True)):
                here = torch.from_numpy((pixels.ids == sample_id) & (pixels.seasons == season))
                at = (rows[here].to(world.device), cols[here].to(world.device))
                features[here] = features_at([stage[i : i + 1] for stage in stages], *at, images[0].shape[-1])[0].cpu()
    return features


def _loader(tiles: ScoredTiles, task: Transfer, world: World) -> EvalLoader:
    return tiles.loader(task.plan, world.rank, task.reading, pin_memory=world.device.type == "cuda")

"""Every pixel of every test tile, once, over all ranks; and the published evaluation, with its quirks.

Layer 4. What the published code does (zhu-xlab/CromSS, `train_SSL4EO_pl_ft_{DWOSM,DFC2020}.py`, `models/pl_finetune_mask.py`,
`utils/{evaluates,finetune}.py`), and what of it `protocol: paper` repeats:

- Its test loader drops the last partial batch, of 100 tiles (DW, OSM) or 300 (DFC2020): 300 of the 340 DW tiles are scored.
  Repeated. Which tiles come last was decided by the order of a folder and is not known for DW and OSM; here it is the order of
  their names, numbers in them by size, which for DFC2020 is the published one.
- Training drops the last partial batch of each epoch. Repeated.
- 'Frozen' takes the encoder's weights out of training; its batch norms stay in training mode, so that they normalise by the batch
  and their statistics move towards the downstream set. Repeated; by default a frozen encoder is left as it is.
- Tiles are scored whole at 510 or 512 px, without padding (the strides divide their sides); ignored pixels count in neither loss
  nor metric; one confusion matrix over all scored tiles. Here always so, with padding by reflection where a stride asks for it.
- A class that is in neither labels nor predictions counts as 1 in the means, one that is only predicted as 0 in mIoU and mF1 and
  as 1 in AA; here neither has a part in them. Not repeated: over whole test sets every class occurs.
- The rate falls once an epoch, here with each step; arithmetic is fp16 on a GPU, here as `engine.precision` says. Not repeated.
- DFC2020's networks have 8 classes; here 9, of which snow has no pixel: Dice is then 8/9 of the published.
- The test set is scored after every epoch; which epoch the tables show (the last, the best) cannot be seen. Here it is the last.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cromss_dist.config import BatchPlan, ReadingConfig
from cromss_dist.data.loading.augment import crop_to_patch, prepare, whole_geometry
from cromss_dist.data.loading.loader import EvalLoader
from cromss_dist.data.loading.plan import EvalPlan
from cromss_dist.data.loading.selection import Selection, select
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import ConfigError
from cromss_dist.schema import IGNORE, Batch, Example, Modality
from cromss_dist.train.figures.metrics import tile_confusions
from cromss_dist.transfer.panels import TilePanel
from cromss_dist.transfer.results import Tiles, TransferProtocol
from cromss_dist.world import World

PAPER_TEST_BATCH = {"dw": 100, "osm": 100, "dfc2020": 300}
"""Tiles of a test batch in the published scripts, by task."""


@dataclass(frozen=True)
class ScoredTiles:
    """What is scored. A tile is a location: seasons of one place are not independent and make one tile.

    Args:
        dataset: The tiles.
        selection: Those that count, and their seasons.
        bands: That the network takes, by modality, S1 first.
        multiple: Of what H and W of its input are multiples, px.
    """

    dataset: Dataset
    selection: Selection
    bands: Mapping[Modality, Sequence[str]]
    multiple: int

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the N tiles."""
        return tuple(self.dataset.locations[i] for i in self.selection.ids)

    def loader(self, plan: BatchPlan, rank: int, reading: ReadingConfig, pin_memory: bool) -> EvalLoader:
        """What reads a rank's share."""
        seasons = tuple(range(self.dataset.num_seasons))
        share = EvalPlan(
            dataset=self.dataset, selection=self.selection, seasons=seasons, micro_batch=plan.micro_batch, rank=rank,
            world_size=plan.world_size, bands=self.bands,
        )  # fmt: skip
        return EvalLoader.of(share, reading, pin_memory)

    def example(self, batch: Batch, device: torch.device) -> Example:
        """Whole tiles, padded by reflection; labels too, so that `crop` brings all back."""
        geometry = whole_geometry(len(batch.keys), self.dataset.patch_px, self.multiple)
        return prepare(batch, geometry, self.bands.get("s1", ()), self.bands.get("s2", ()), "none", device)

    def crop(self, values: Tensor) -> Tensor:
        """(..., padded, padded) to (..., patch_px, patch_px)."""
        return crop_to_patch(values, self.dataset.patch_px)


def select_tiles(dataset: Dataset, seasons: Sequence[int] | None, protocol: TransferProtocol, task: str) -> Selection:
    """The test tiles that are scored.

    Args:
        dataset: The test set.
        seasons: That are used; None: all.
        protocol: 'paper' drops the last partial batch, see above.
        task: Whose batch it is.

    Raises:
        ConfigError: a season is not there; or nothing is left of a batch, or the task has no published protocol.
    """
    available = select(dataset, seasons=seasons)
    if protocol == "default":
        return available
    if task not in PAPER_TEST_BATCH:
        raise ConfigError(
            f"protocol='paper' is how {', '.join(PAPER_TEST_BATCH)} were scored, and task is {task!r}; set protocol to default."
        )
    batch = PAPER_TEST_BATCH[task]
    keys = [dataset.locations[i] for i in available.ids]
    natural = sorted(range(len(keys)), key=lambda place: _natural(keys[place]))
    kept = natural[: len(keys) // batch * batch]
    if not kept:
        raise ConfigError(
            f"protocol='paper' drops the last partial batch of {batch} test tiles, which is all of {len(keys)}; set protocol to "
            "default."
        )
    return available.take(np.sort(np.array(kept, np.int64)))


class Scored(Protocol):
    """What is asked of a network; `Engine` and torch's modules have it."""

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """One tuple of logits, float (B, C, H, W), of images of each modality in turn."""

    def train(self, mode: bool = True) -> object:
        """Training or evaluation mode."""


@torch.no_grad()
def evaluate(
    network: Scored,
    test: ScoredTiles,
    plan: BatchPlan,
    world: World,
    reading: ReadingConfig,
    num_panels: int,
    beat: Callable[[str], None],
) -> tuple[Tiles, tuple[TilePanel, ...]]:
    """Scores every pixel of every tile once; a collective call. The network is in training mode again afterwards.

    Args:
        network: What is scored.
        test: On what.
        plan: Batch arithmetic; a rank scores micro batches of whole tiles.
        world: This process among the others.
        reading: How tiles are read.
        num_panels: Tiles that are shown.
        beat: Called before each batch, with the place.

    Returns:
        The tiles, the same on every rank; and of the first ones of this rank what there is to see.
    """
    num_classes = len(test.dataset.class_names)
    counts = torch.zeros(len(test.selection.ids), num_classes, num_classes, dtype=torch.int64, device=world.device)
    panels: dict[str, TilePanel] = {}
    network.train(False)
    try:
        with test.loader(plan, world.rank, reading, pin_memory=world.device.type == "cuda") as loader:
            for number, batch in enumerate(loader):
                beat(f"batch {number} of the test")
                example = test.example(batch, world.device)
                (logits,) = network.forward(*example.images.values())
                prediction, label = test.crop(logits).argmax(1), test.crop(example.label)
                counted = torch.where((example.weights > 0)[:, None, None], label, IGNORE)
                places = np.searchsorted(test.selection.ids, batch.sample_ids.numpy())
                index = torch.from_numpy(places).to(world.device)
                counts.index_add_(0, index, tile_confusions(counted, prediction, num_classes))
                for i, key in enumerate(batch.keys):  # the first season of each tile
                    if batch.weights[i] > 0 and len(panels) < num_panels and key not in panels:
                        panels[key] = _panel(key, i, example, label, prediction, test)
    finally:
        network.train(True)
    matrices = world.reduce_sum(counts).cpu().numpy()
    return Tiles.of(dict(zip(test.keys, matrices, strict=True))), tuple(panels.values())


def _panel(key: str, i: int, example: Example, label: Tensor, prediction: Tensor, test: ScoredTiles) -> TilePanel:
    """Sample `i` of a batch."""

    def array(values: Tensor) -> npt.NDArray[Any]:
        return values[i].cpu().numpy()

    return TilePanel(
        key=key,
        images={modality: array(test.crop(image)) for modality, image in example.images.items()},
        label=array(label).astype(np.uint8),
        prediction=array(prediction).astype(np.uint8),
    )


def _natural(key: str) -> list[tuple[int, str]]:
    """What sorts names as people do: numbers in them by size."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", key)]

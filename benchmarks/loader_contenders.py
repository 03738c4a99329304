"""Reads records one way, in this environment, and prints what it took, as JSON. benchmarks/loader.py calls it.

    python benchmarks/loader_contenders.py WAY FOLDER --records RECORDS

Ways:
  bare            the limit: one `preadv` an array, straight into the rows of new batch arrays; no order, no checks
  bare-reused     the same into the same arrays again and again, which no loader may hand out
  ours            this project's TrainLoader on shards, every byte checked against its CRC-32C, a thread a core
  ours-workers    the same by worker processes, as many as cores
  ours-8-threads  the same by eight threads, as suits a disk
  ours-cube       the same on the cube, a thread a core
  webdataset      `webdataset` on tars of records, arrays decoded by it
  published       a torch Dataset over the LMDBs of the published code: all four seasons read, prior and augmentation on the CPU
"""

import math
import os
import pickle  # only to read what the published code writes, and what loader_inputs.py wrote
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
import webdataset
from scipy.ndimage import gaussian_filter
from stopwatch import Batch, Settings, measure, parse
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, Dataset

from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.data.loading.plan import Source, TrainPlan
from cromss_dist.data.sample import Uint8Array
from cromss_dist.data.store.index import open_shards
from cromss_dist.data.store.open import Reader, open_dataset
from cromss_dist.schema import LABEL_ARRAY, NUM_CLASSES

CROP_PX, FLIP_P, ROTATE_P, ROTATE_DEG = 256, 0.5, 0.2, 90.0
SHUFFLE_BUFFER = 256  # records, of webdataset: more would mostly measure memory


def read_bare(settings: Settings, reuse: bool = False) -> Iterator[Batch]:
    """Batches of records in random order; on two cores two threads fill a batch."""
    index = open_shards(settings.folder)
    assert index.tables.tars is not None
    offsets, shard_of = index.tables.tars.offsets.tolist(), index.shard_of.tolist()
    descriptors = [index.files.open(shard) for shard in range(len(index.shard_sizes))]
    shapes = {name: index.shape(name) for name in index.arrays}
    strides = [0 if name == LABEL_ARRAY else math.prod(shape) for name, shape in shapes.items()]
    generator, pool = np.random.default_rng(0), ThreadPoolExecutor(settings.cores)
    arrays: list[Uint8Array] = []

    def fill(records: list[int], places: range) -> None:
        for place in places:
            location, season = divmod(records[place], index.num_seasons)
            for array, offset, stride in zip(arrays, offsets[location], strides, strict=True):
                os.preadv(descriptors[shard_of[location]], [array[place]], offset + season * stride)

    while True:
        order = generator.permutation(len(index) * index.num_seasons).tolist()
        for first in range(0, len(order) - settings.batch + 1, settings.batch):
            records = order[first : first + settings.batch]
            if not (arrays and reuse):
                arrays = [np.empty((settings.batch, *shape), np.uint8) for shape in shapes.values()]
            if settings.cores == 1:
                fill(records, range(settings.batch))
            else:
                parts = [range(core, settings.batch, settings.cores) for core in range(settings.cores)]
                list(pool.map(fill, [records] * settings.cores, parts))
            yield {"record": records, **{name: torch.from_numpy(array) for name, array in zip(shapes, arrays, strict=True)}}


def read_ours(settings: Settings, reader: Reader = "shards", threads: int = 0, workers: int = 0) -> Iterator[Batch]:
    """Our loader as a training run uses it: a thread a core unless said otherwise, or worker processes of one each."""
    dataset = open_dataset(settings.folder, reader=reader)
    plan = TrainPlan(sources=[Source(dataset)], seed=0, global_batch=settings.batch, micro_batch=settings.batch)
    loader = TrainLoader(plan=plan, threads=threads or settings.cores, workers=workers)
    for batch in loader:
        records = batch.sample_ids * dataset.num_seasons + batch.seasons
        yield {"record": records, **batch.images, LABEL_ARRAY: batch.labels}


def read_webdataset(settings: Settings) -> Iterator[Batch]:
    """`WebDataset` with its own decoder, shuffle and batches; on two cores two worker processes."""
    tars = sorted(map(str, settings.folder.glob("*.tar")))
    records = webdataset.WebDataset(tars, shardshuffle=len(tars), nodesplitter=None).shuffle(SHUFFLE_BUFFER).decode()
    loader = webdataset.WebLoader(
        records.batched(settings.batch, partial=False), batch_size=None, num_workers=0 if settings.cores == 1 else settings.cores
    )
    while True:
        for batch in loader:
            arrays = {name.removesuffix(".npy"): array for name, array in batch.items() if name.endswith(".npy")}
            yield {"record": [int(key) for key in batch["__key__"]], **arrays}


class Published(Dataset[dict[str, torch.Tensor]]):
    """A torch Dataset like the published code's: one location an item, one of its seasons drawn, all four read.

    Reference: CromSS, section IV-A, and ../shared/design/method.md.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environments: dict[str, Any] = {}
        with lmdb.open(str(folder / "labels.lmdb"), readonly=True, lock=False) as environment:
            self.length = environment.stat()["entries"]

    def __len__(self) -> int:
        return int(self.length)

    def _read(self, name: str, number: int) -> Uint8Array:
        if name not in self.environments:  # opened by the worker that reads
            path = str(self.folder / f"{name}.lmdb")
            self.environments[name] = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
        with self.environments[name].begin() as transaction:
            data, shape, _ = pickle.loads(transaction.get(str(number).encode()))
        return np.frombuffer(data, np.uint8).reshape(shape)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        season = int(torch.randint(4, ()))
        labels = self._read("labels", number)
        images = np.concatenate([self._read("s1", number)[season], self._read("s2c", number)[season]]).astype(np.float32) / 255
        onehot = np.stack([labels == value for value in range(NUM_CLASSES)], axis=1).astype(np.float32)
        priors = []
        for mass in (onehot.mean(0), onehot[season]):
            smooth = np.stack([gaussian_filter(of_class, sigma=3) for of_class in mass])
            priors.append(smooth / smooth.sum(0, keepdims=True))
        layers = np.concatenate([images, (priors[0] + priors[1]) / 2, labels[season][None].astype(np.float32)])
        row, col = (int(torch.randint(labels.shape[-1] - CROP_PX + 1, ())) for _ in range(2))
        layers = layers[:, row : row + CROP_PX, col : col + CROP_PX]
        if float(torch.rand(())) < FLIP_P:
            axes = ((1,), (2,), (1, 2))[int(torch.randint(3, ()))]
            layers = np.flip(layers, axes)
        values = torch.from_numpy(np.ascontiguousarray(layers))
        if float(torch.rand(())) < ROTATE_P:
            values = _rotate(values, (2 * float(torch.rand(())) - 1) * ROTATE_DEG)
        image, prior, label = torch.split(values, [len(images), NUM_CLASSES, 1])
        return {"record": torch.tensor(4 * number + season), "image": image, "prior": prior, LABEL_ARRAY: label[0].long()}


def _rotate(values: torch.Tensor, degrees: float) -> torch.Tensor:
    radians = math.radians(degrees)
    turn = [[math.cos(radians), -math.sin(radians), 0.0], [math.sin(radians), math.cos(radians), 0.0]]
    grid = affine_grid(torch.tensor([turn]), [1, *values.shape], align_corners=False)
    image = grid_sample(values[None, :-1], grid, mode="bilinear", align_corners=False)
    label = grid_sample(values[None, -1:], grid, mode="nearest", align_corners=False)
    return torch.cat([image, label], dim=1)[0]


def read_published(settings: Settings) -> Iterator[Batch]:
    """That Dataset in a shuffling DataLoader; on two cores two worker processes."""
    workers = 0 if settings.cores == 1 else settings.cores
    loader = DataLoader(Published(settings.folder), settings.batch, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        yield from loader


def main() -> None:
    """Parses, reads, prints."""
    ways: dict[str, Callable[[Settings], Iterator[Batch]]] = {
        "bare": read_bare,
        "bare-reused": partial(read_bare, reuse=True),
        "ours": read_ours,
        "ours-workers": lambda settings: read_ours(settings, threads=1, workers=settings.cores),
        "ours-8-threads": partial(read_ours, threads=8),
        "ours-cube": partial(read_ours, reader="cube"),
        "webdataset": read_webdataset,
        "published": read_published,
    }
    way, settings = parse(tuple(ways), __doc__)
    torch.set_num_threads(1)
    measure(ways[way], settings)


if __name__ == "__main__":
    main()

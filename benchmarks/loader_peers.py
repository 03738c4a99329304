"""Reads what benchmarks/peers.py wrote, with litdata or MosaicML streaming, and prints what it took, as JSON.

    PEERS_PYTHON benchmarks/loader_peers.py litdata|litdata-tuned|mds FOLDER --records RECORDS

Runs under another interpreter than the rest, see peers.txt, and so imports nothing of it. benchmarks/loader.py calls it.
Both shuffle, check no bytes, and give stacked tensors, in this process on one core and from two workers on two. litdata's
default decodes 256 items at a time and keeps them only until the next chunk is asked for, which costs more than it saves
with samples of this size; `litdata-tuned` has it decode one by one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from stopwatch import Batch, Settings, measure, parse

NAMES = ("s1", "s2_10m", "s2_20m", "s2_60m", "label")


def read_litdata(settings: Settings, **options: Any) -> Iterator[Batch]:
    """litdata's `StreamingDataset` and `StreamingDataLoader`, epoch after epoch."""
    import litdata  # type: ignore[import-not-found]  # is in the other environment

    dataset = litdata.StreamingDataset(str(settings.folder), shuffle=True, drop_last=True, **options)
    return _endless(litdata.StreamingDataLoader(dataset, batch_size=settings.batch, num_workers=_workers(settings)))


def read_mds(settings: Settings) -> Iterator[Batch]:
    """MosaicML's `StreamingDataset` and `StreamingDataLoader`, epoch after epoch."""
    import streaming  # type: ignore[import-not-found]  # is in the other environment

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(settings.folder), shuffle=True, batch_size=settings.batch)
    loader = streaming.StreamingDataLoader(dataset, batch_size=settings.batch, num_workers=_workers(settings), drop_last=True)
    return _endless(loader)


def _endless(loader: Any) -> Iterator[Batch]:
    while True:
        for batch in loader:
            yield {"record": [int(key) for key in batch["key"]], **{name: batch[name] for name in NAMES}}


def _workers(settings: Settings) -> int:
    return 0 if settings.cores == 1 else settings.cores


def main() -> None:
    """Parses, reads, prints."""
    ways: dict[str, Callable[[Settings], Iterator[Batch]]] = {
        "litdata": read_litdata,
        "litdata-tuned": partial(read_litdata, batch_decode=0),
        "mds": read_mds,
    }
    way, settings = parse(tuple(ways), __doc__)
    torch.set_num_threads(1)
    measure(ways[way], settings)


if __name__ == "__main__":
    main()

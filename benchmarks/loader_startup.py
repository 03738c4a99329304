"""Takes start-up time and memory in a fresh process, and prints them as JSON. benchmarks/loader.py calls it.

    python benchmarks/loader_startup.py order SAMPLES SAMPLES_A_SHARD      the order alone, of simulated shards
    python benchmarks/loader_startup.py open FOLDER                        opening a dataset, and its first batch

Imports are done before the clock starts. `mib` is by how much the peak of resident memory rose.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from stopwatch import peak_mib

from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.order import TrainingOrder

GLOBAL_BATCH = 256
WARM_UP = np.ones(4, np.int64)


def first_batch(sizes: np.ndarray[tuple[int], np.dtype[np.int64]], start: int) -> None:
    """Ids, seasons and geometry of one global batch, from nothing."""
    stretch = TrainingOrder([sizes], [1.0], seed=0).stretch(start, GLOBAL_BATCH)
    Draws(0, stretch.epoch, stretch.place)


def measure_order(samples: int, per_shard: int) -> dict[str, float]:
    """Time and memory to the first batch in the middle of the third epoch, and time of the batches after it."""
    first_batch(WARM_UP, 0)
    before, started = peak_mib(), time.perf_counter()
    sizes = np.full(samples // per_shard, per_shard, np.int64)
    sizes[::2] += per_shard // 4  # not all alike
    sizes[1::2] -= per_shard // 4
    first_batch(sizes, 0)
    from_nothing = time.perf_counter() - started
    order = TrainingOrder([sizes], [1.0], seed=0)
    start = (5 * samples // 2) // GLOBAL_BATCH * GLOBAL_BATCH
    started = time.perf_counter()
    order.stretch(start, GLOBAL_BATCH)
    resumed = time.perf_counter() - started
    steps = 100
    started = time.perf_counter()
    for step in range(1, steps + 1):
        order.stretch(start + step * GLOBAL_BATCH, GLOBAL_BATCH)
    batch_ms = (time.perf_counter() - started) / steps * 1000
    return {"first_s": from_nothing, "resumed_s": resumed, "batch_ms": batch_ms, "mib": peak_mib() - before}


def measure_open(folder: Path) -> dict[str, float]:
    """Time and memory of opening a dataset."""
    from cromss_dist.data.store.open import open_dataset

    before, started = peak_mib(), time.perf_counter()
    dataset = open_dataset(folder)
    opened = time.perf_counter() - started
    first_batch(dataset.shard_sizes, 0)
    return {"samples": len(dataset.locations), "opened_s": opened, "mib": peak_mib() - before}


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("order", "open"))
    parser.add_argument("of", nargs="+")
    options = parser.parse_args()
    told = measure_open(Path(options.of[0])) if options.what == "open" else measure_order(*map(int, options.of))
    print(json.dumps(told))


if __name__ == "__main__":
    main()

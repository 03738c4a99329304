"""The training line as its description says it, one sample at a time: the oracle of the fast one."""

from collections.abc import Sequence
from itertools import pairwise

from cromss_dist.data.loading.draws import hash64

SHARDS, WINDOW = 10, 11  # what hashes are drawn for, see docs/loading.md
MAX_LANES = 64


def reference_epoch(sizes: Sequence[int], seed: int, source: int, epoch: int, window: int) -> list[int]:
    """The samples of one epoch in the order of the line."""
    num_samples = sum(sizes)
    starts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    row = [starts[shard] + i for shard in _by_hash(len(sizes), seed, SHARDS, source, epoch) for i in range(sizes[shard])]
    num_lanes = 1
    while num_lanes < MAX_LANES and num_samples // (2 * num_lanes) >= window:
        num_lanes *= 2
    lanes = []
    for lane in range(num_lanes):
        length = num_samples // num_lanes + (lane < num_samples % num_lanes)
        cut, row = row[:length], row[length:]
        num_windows = max(1, length // window)
        borders = [number * length // num_windows for number in range(num_windows + 1)]
        shuffled = []
        for number, (begin, end) in enumerate(pairwise(borders)):
            shuffled += [cut[begin + i] for i in _by_hash(end - begin, seed, WINDOW, source, epoch, lane, number)]
        lanes.append(shuffled)
    return [lane[step] for step in range(len(lanes[0])) for lane in lanes if step < len(lane)]


def _by_hash(count: int, *key: int) -> list[int]:
    """0 .. count - 1, each ranked by a hash of its own."""
    return sorted(range(count), key=lambda i: int(hash64(*key, i)[0]))

"""Which sample comes when: a pure function of the shards' sizes, seed and position.

Nothing here holds state or knows the number of ranks, threads or restarts; what is permuted is ranked by `draws.hash64`.

The training line is endless: epoch follows epoch, and what a run has consumed is one integer. Each epoch the shards are
permuted and put one behind another; this row of samples is cut into lanes, each lane into windows, and samples are permuted
inside their window. The line takes one sample of each lane in turn: a batch mixes all lanes, and yet a lane is in few
shards at a time. Starting anywhere costs what a permutation of the shards costs, however many samples there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.data.loading.draws import IntArray, Stream, hash64
from cromss_dist.errors import ConfigError

Tail: TypeAlias = Literal["carry", "drop", "pad"]

ORDER_VERSION = 2  # another number, another order: a run of one cannot go on with the other
MAX_LANES = 64
_BLOCK = 2**16  # hashes made at a time
MIXTURE_PERIOD = 4096  # slots; weights are honoured to a slot


@dataclass(frozen=True)
class Stretch:
    """G samples of the training line, all ranks' or one's.

    Args:
        source: int64 (G,): which dataset of the mixture.
        place: int64 (G,): index into that dataset's selected samples.
        epoch: int64 (G,): of that dataset; a sample comes once in each.
        weight: float32 (G,): 1, or 0 for a sample that only fills up the last batch of an epoch.
    """

    source: IntArray
    place: IntArray
    epoch: IntArray
    weight: npt.NDArray[np.float32]


class TrainingOrder:
    """The endless training line over one dataset or a mixture of several.

    Args:
        sizes: For each dataset, how many samples of each of its shards are trained on.
        weights: Share of each dataset in the line, any positive numbers; one dataset has the share 1.
        seed: Of the run.
        window: Samples that are permuted among themselves, at least; more is shuffled better and reads more shards at a time.
        tail: What becomes of the samples behind an epoch's last full batch: 'carry' goes on into the next epoch inside a
            batch, so that none is lost; 'drop' leaves them out, others each epoch; 'pad' fills the batch up with weight 0.
        global_batch: Samples of a step, needed unless `tail` is 'carry'.

    Raises:
        ConfigError: there is nothing to train on, a number is out of range, or 'drop' and 'pad' are asked for where they
            mean nothing: of a mixture, whose datasets have epochs of their own.
    """

    def __init__(
        self,
        sizes: Sequence[IntArray],
        weights: Sequence[float],
        seed: int,
        window: int = 2048,
        tail: Tail = "carry",
        global_batch: int | None = None,
    ) -> None:
        self.seed, self.window, self.tail = seed, window, tail
        self._global_batch = None if tail == "carry" else global_batch
        if window < 1:
            raise ConfigError(f"window={window} is not allowed; give at least 1 sample.")
        self._lines = [_Line(of_shards, seed, source, window) for source, of_shards in enumerate(sizes)]
        self._mixture = _Mixture(weights)
        if len(self._mixture.shares) != len(self._lines) or not all(line.num_samples for line in self._lines):
            counts = [line.num_samples for line in self._lines]
            raise ConfigError(f"{counts} samples of datasets with weights {list(weights)}; give samples and a weight for each.")
        self.num_samples = sum(line.num_samples for line in self._lines)
        self.epoch_samples = self._epoch_samples()
        """Length of an epoch of the line, samples; of a mixture, as many as its datasets have together."""

    @property
    def lanes(self) -> tuple[int, ...]:
        """Lanes of each dataset."""
        return tuple(line.lanes for line in self._lines)

    @property
    def guard(self) -> dict[str, Any]:
        """All that the order depends on beside the samples; JSON types. A run that goes on must have the same."""
        guard: dict[str, Any] = {"order_version": ORDER_VERSION, "seed": self.seed, "window": self.window, "tail": self.tail}
        guard["shares"] = list(self._mixture.shares)
        return guard if self._global_batch is None else guard | {"global_batch": self._global_batch}

    def stretch(self, start: int, size: int, part: slice = slice(None)) -> Stretch:
        """The samples start .. start + size - 1 of the line, arranged by dataset and lane.

        A contiguous part of it stays on its lanes from step to step, and so in few shards.

        Args:
            start: Samples of the line before, 0 or more.
            size: Samples of a global batch.
            part: Which of them, once arranged.
        """
        source, own = self._mixture.at(start + np.arange(size))
        lengths = np.array([line.num_samples for line in self._lines])
        epoch, place_in_epoch = np.divmod(own, self.epoch_samples if len(self._lines) == 1 else lengths[source])
        weight = (place_in_epoch < lengths[source]).astype(np.float32)
        place_in_epoch %= lengths[source]
        lane = place_in_epoch % np.array(self.lanes)[source]
        arranged = np.lexsort((own, lane, source))[part]
        source, epoch, place_in_epoch = source[arranged], epoch[arranged], place_in_epoch[arranged]
        place = np.empty_like(place_in_epoch)
        for number in np.unique(source).tolist():
            here = source == number
            place[here] = self._lines[number].at(epoch[here], place_in_epoch[here])
        return Stretch(source, place, epoch, weight[arranged])

    def _epoch_samples(self) -> int:
        if self.tail == "carry":
            return self.num_samples
        batch = self._global_batch
        if len(self._lines) > 1 or batch is None or batch < 1:
            raise ConfigError(f"tail={self.tail!r} needs one dataset and a global batch, not {len(self._lines)} and {batch}.")
        if self.tail == "drop" and self.num_samples < batch:
            raise ConfigError(
                f"tail='drop' of {self.num_samples} samples in batches of {batch} leaves none; lower the batch or set 'carry'."
            )
        batches = self.num_samples // batch if self.tail == "drop" else -(-self.num_samples // batch)
        return batches * batch


class _Mixture:
    """Deals the slots of a line to its datasets, evenly spread, in a period that repeats."""

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(f"weights {list(weights)} are not allowed; give at least one, positive numbers all.")
        exact = np.array(weights, np.float64) / sum(weights) * MIXTURE_PERIOD
        if exact.min() < 1:
            raise ConfigError(f"weights {list(weights)} are too unequal; none may be below 1/{MIXTURE_PERIOD} of all.")
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: MIXTURE_PERIOD - int(shares.sum())]] += 1
        self.shares = tuple(int(share) for share in shares)
        due = np.concatenate([(np.arange(share) + 0.5) / share for share in self.shares])
        owner = np.repeat(np.arange(len(shares)), shares)
        dealt = np.argsort(due, kind="stable")
        self._source = owner[dealt]
        self._rank = (np.arange(MIXTURE_PERIOD) - np.repeat(np.cumsum(shares) - shares, shares))[dealt]

    def at(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Dataset of each position of the line, and position in that dataset's own line."""
        period, slot = np.divmod(positions, MIXTURE_PERIOD)
        source = self._source[slot]
        return source, period * np.array(self.shares)[source] + self._rank[slot]


class _Line:
    """The line of one dataset: lanes, windows, and which sample is where in them."""

    def __init__(self, sizes: IntArray, seed: int, source: int, window: int) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.starts = np.cumsum(self.sizes)
        self.starts -= self.sizes  # in place, as the row of an epoch is summed: there may be millions of shards
        self.num_samples = int(self.sizes.sum())
        self.seed, self.source, self.window = seed, source, window
        self.lanes = 1
        while self.lanes < MAX_LANES and self.num_samples // (2 * self.lanes) >= window:
            self.lanes *= 2
        self._rows: dict[int, tuple[npt.NDArray[np.uint32], IntArray]] = {}
        self._windows: dict[int, tuple[tuple[int, int], npt.NDArray[np.uint32]]] = {}

    def at(self, epochs: IntArray, places: IntArray) -> IntArray:
        """Sample at each place 0 .. num_samples - 1 of an epoch."""
        lane_step, lane = np.divmod(places, self.lanes)
        shorter, longer = divmod(self.num_samples, self.lanes)
        length = shorter + (lane < longer)
        num_windows = np.maximum(1, length // self.window)  # of equal lengths but for 1: a short last one would shuffle little
        window = ((lane_step + 1) * num_windows - 1) // length
        begin, end = window * length // num_windows, (window + 1) * length // num_windows
        of_samples = zip(*(array.tolist() for array in (epochs, lane, window, end - begin, lane_step - begin)), strict=True)
        inside = np.array([self._shuffled(*of_window)[step] for *of_window, step in of_samples], np.int64)
        in_row = lane * shorter + np.minimum(lane, longer) + begin + inside
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards, ends = self._row(epoch)
            nth = np.searchsorted(ends, in_row[here], side="right")
            samples[here] = self.starts[shards[nth]] + in_row[here] - (ends[nth] - self.sizes[shards[nth]])
        return samples

    def _row(self, epoch: int) -> tuple[npt.NDArray[np.uint32], IntArray]:
        """The shards in the order of an epoch, and where each ends in the row of samples."""
        row = self._rows.get(epoch)
        if row is None:
            shards = _by_hash(len(self.sizes), self.seed, Stream.SHARDS, self.source, epoch)
            ends = self.sizes[shards]
            row = shards, np.cumsum(ends, out=ends)
            # Two at most: a batch reaches from one epoch into the next. A new dict, since other threads read the old one.
            self._rows = {**{known: other for known, other in self._rows.items() if known == epoch - 1}, epoch: row}
        return row

    def _shuffled(self, epoch: int, lane: int, window: int, size: int) -> npt.NDArray[np.uint32]:
        """The order inside a window. Each lane keeps the last: memory is lanes x window, however many datasets there are."""
        of, shuffled = self._windows.get(lane, (None, None))
        if shuffled is None or of != (epoch, window):
            shuffled = _by_hash(size, self.seed, Stream.WINDOW, self.source, epoch, lane, window)
            self._windows[lane] = (epoch, window), shuffled
        return shuffled


def _by_hash(count: int, *key: int) -> npt.NDArray[np.uint32]:
    """0 .. count - 1, each ranked by a hash of its own, less the lowest bits, and where hashes are equal by itself.

    Hash and number share a 64-bit word, which is sorted where it lies: millions of shards in little more than their size.
    """
    number_bits = np.uint64(2 ** max(1, (count - 1).bit_length()) - 1)
    words = np.empty(count, np.uint64)
    for begin in range(0, count, _BLOCK):
        numbers = np.arange(begin, min(begin + _BLOCK, count), dtype=np.uint64)
        words[begin : begin + _BLOCK] = (hash64(*key, numbers) & ~number_bits) | numbers
    words.sort()
    words &= number_bits
    return words.astype(np.uint32)

"""How sure a score is: intervals by bootstrap over test tiles, spread over repeated runs.

Layer 4, NumPy only. Two questions that must not be mixed: an interval says how the figure of *these* trained networks would vary
with other test tiles; a spread says how it varies with seeds and labels on these tiles. Shapes: N tiles, R replicates, C classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cromss_dist.config.check import require
from cromss_dist.errors import ResultError
from cromss_dist.tracking.package.evidence import PROTOCOLS, Evidence
from cromss_dist.train.figures.scores import METRICS, Metric, Values, class_scores, metric_values
from cromss_dist.transfer.results import Tiles, TransferResult

_BLOCK = 1 << 20  # numbers of drawn test sets held at once, 8 MiB; a statistic makes some ten times as many of them


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Args:
        level: Coverage that an interval aims at, in (0, 1).
        replicates: Test sets drawn, at least 100.
        seed: Of the draws.

    Raises:
        ConfigError: a value is out of range.
    """

    level: float = 0.95
    replicates: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.level < 1, "level", self.level, "give a coverage in (0, 1), such as 0.95")
        require(self.replicates >= 100, "replicates", self.replicates, "give at least 100: its ends are quantiles of them")
        require(self.seed >= 0, "seed", self.seed, "give 0 or more")


@dataclass(frozen=True)
class Interval:
    """A figure and the percentile interval of its bootstrap over test tiles; NaN where there is no figure."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over runs; the latter is NaN for one run. Runs without a figure do not count."""

    mean: float
    std: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of the figures of runs."""
        finite = [value for value in values if math.isfinite(value)]
        mean = float(np.mean(finite)) if finite else math.nan
        return cls(mean, float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan, len(finite))


def resampled_sums(values: npt.NDArray[Any], resampling: Resampling) -> Iterator[Values]:
    """Sums over test sets drawn from the tiles with replacement, each of as many tiles as there are.

    Args:
        values: Whole numbers (N, ...), a tile each, such as confusion matrices; their sums must stay below 2**53.
        resampling: Number of draws, and their seed: the same N and seed give the same draws, whatever the values.

    Yields:
        float64 (r, ...), a part of the R draws that takes little memory, one after the other.

    Raises:
        ResultError: there are fewer than two tiles.
    """
    tiles = len(values)
    if tiles < 2:
        raise ResultError(f"an interval over {tiles} test tile says nothing; score at least two, better a hundred.")
    generator, flat = np.random.default_rng(resampling.seed), values.reshape(tiles, -1).astype(np.float64)
    block = max(1, _BLOCK // max(flat.shape))
    for first in range(0, resampling.replicates, block):
        rows = min(block, resampling.replicates - first)
        # How often each tile is drawn; the sum is then one matrix product, and exact, since all are whole numbers.
        drawn = generator.integers(tiles, size=(rows, tiles)) + np.arange(rows)[:, None] * tiles
        counts = np.bincount(drawn.ravel(), minlength=rows * tiles).reshape(rows, tiles)
        yield (counts.astype(np.float64) @ flat).reshape(rows, *values.shape[1:])


def bootstrap(
    values: npt.NDArray[Any], statistic: Callable[[npt.NDArray[Any]], Values], resampling: Resampling
) -> tuple[Values, Values]:
    """Percentile interval of a statistic of the sum over tiles.

    Args:
        values: As `resampled_sums` takes them, (N, ...).
        statistic: From sums (r, ...) to values (r, K), each row on its own.
        resampling: See there.

    Returns:
        Both ends, float64 (K,): quantiles of the statistic over the draws in which it exists; NaN where it does in none.

    Raises:
        ResultError: there are fewer than two tiles.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. The interval is not corrected for
    bias: with few tiles, and for classes that few tiles have, it is too narrow (of 2,000 simulated accuracies, intervals of
    level 0.9 covered 0.87 with 20 tiles, 0.88 with 50, 0.90 with 200). A class that a draw lacks leaves its means.
    """
    found = np.concatenate([statistic(sums) for sums in resampled_sums(values, resampling)])
    exists, tail = ~np.isnan(found).all(0), (1 - resampling.level) / 2
    ends = np.full((2, found.shape[1]), np.nan)
    if exists.any():
        ends[:, exists] = np.nanquantile(found[:, exists], (tail, 1 - tail), axis=0)
    return ends[0], ends[1]


@dataclass(frozen=True)
class Estimates:
    """Figures with their intervals, as shares: the four means, and the IoU of each class by its index.

    Of one tile there are no intervals: their ends are NaN.
    """

    metrics: dict[Metric, Interval]
    iou: tuple[Interval, ...]


def estimate(runs: Sequence[Tiles], resampling: Resampling, among: Sequence[int] | None = None) -> Estimates:
    """The mean figures of runs that were scored on the same tiles.

    Args:
        runs: At least one.
        resampling: How intervals are made.
        among: Indices of the classes that count; see `metric_values`.

    Raises:
        ResultError: the runs are of different tiles.
    """
    return _estimates(_stacked([[run] for run in runs]), np.ones(1), resampling, among)


def estimate_difference(
    pairs: Sequence[tuple[Tiles, Tiles]], resampling: Resampling, among: Sequence[int] | None = None
) -> Estimates:
    """The mean of first minus second over pairs, on the same tiles.

    Both sides of all pairs are scored on the same drawn test sets, so what makes a test set hard or easy for all cancels: such an
    interval is narrower than the two apart suggest.

    Args:
        pairs: At least one; all of the same tiles.
        resampling: How intervals are made.
        among: Indices of the classes that count; see `metric_values`.

    Raises:
        ResultError: the runs are of different tiles.
    """
    return _estimates(_stacked(pairs), np.array([1.0, -1.0]), resampling, among)


def _stacked(groups: Sequence[Sequence[Tiles]]) -> npt.NDArray[np.int32]:
    """All matrices, int32 (N, runs, sides, C, C)."""
    everyone = [tiles for group in groups for tiles in group]
    for other in everyone[1:]:
        if other.keys != everyone[0].keys or other.confusion.shape != everyone[0].confusion.shape:
            alone = len(set(other.keys) ^ set(everyone[0].keys))
            raise ResultError(
                f"runs were scored on different tiles ({len(everyone[0].keys)} and {len(other.keys)}, {alone} of them in one "
                "only) or classes; only runs on the same test set can be taken together."
            )
    return np.stack([np.stack([tiles.confusion for tiles in group], 1) for group in groups], 1)


def _estimates(confusion: npt.NDArray[np.int32], signs: Values, resampling: Resampling, among: Sequence[int] | None) -> Estimates:
    """Of the signed sum over sides, averaged over runs; confusion is (N, runs, sides, C, C)."""

    def statistic(sums: npt.NDArray[Any]) -> Values:
        means = metric_values(sums, among)
        figures = np.concatenate([np.stack([means[name] for name in METRICS], -1), class_scores(sums).iou], -1)
        combined: Values = np.einsum("rpsk,s->rpk", figures, signs).mean(1)
        return combined

    values = statistic(confusion.sum(0, dtype=np.int64)[None])[0]
    low, high = bootstrap(confusion, statistic, resampling) if len(confusion) > 1 else (np.full_like(values, np.nan),) * 2
    intervals = [Interval(*map(float, ends)) for ends in zip(values, low, high, strict=True)]
    return Estimates(dict(zip(METRICS, intervals, strict=False)), tuple(intervals[len(METRICS) :]))


def evidence_of(
    runs: Sequence[TransferResult],
    tiles: Sequence[Tiles],
    source: str,
    metric: Metric = "miou",
    resampling: Resampling | None = None,
) -> Evidence:
    """What an encoder's card or registered version says of a transfer: the mean over repeated runs, and its interval over tiles.

    Its data set is named after the task; with '-paper' for that protocol and, for few labels, '-10pct' or '-5shot'.

    Args:
        runs: Repetitions of one transfer of one pretrained encoder.
        tiles: Theirs, in the same order.
        source: What the figure is from, as a run id.
        metric: The figure.
        resampling: How the interval is made; None = the default.

    Raises:
        ResultError: the runs are not repetitions of each other, of two encoders together, of a random one, by k-NN, or on a
            single test tile.
        PackageError: the task's name is not allowed in evidence.
    """
    first, how = runs[0], resampling or Resampling()
    what = {(r.task, r.mode, r.protocol, r.decoder, r.labels.amount, r.test_digest, r.encoder_refs) for r in runs}
    if len(what) > 1:
        raise ResultError(
            f"evidence is of repetitions of one transfer; {len(runs)} runs of {len(what)} different ones were given."
        )
    if [used.init for used in first.encoders.values()] != ["pretrained"]:
        raise ResultError(
            f"evidence is of one pretrained encoder; {first.name} is {'random' if len(first.encoders) == 1 else 'two together'}."
        )
    protocol = next((known for known in PROTOCOLS if known == first.mode), None)
    if protocol is None:
        raise ResultError(f"mode {first.mode!r} gives no evidence; choose from {', '.join(PROTOCOLS)}.")
    found = estimate(tiles, how).metrics[metric]
    if first.tiles < 2:
        raise ResultError(f"evidence has an interval over test tiles, and there is {first.tiles}; score at least two.")
    return Evidence(
        dataset=first.task + ("-paper" if first.protocol == "paper" else "") + _labels_suffix(first),
        metric=metric,
        protocol=protocol,
        value=found.value,
        low=min(found.low, found.value),  # of a percentile interval the value may lie outside
        high=max(found.high, found.value),
        source=source,
        level=how.level,
        runs=len(runs),
        samples=first.tiles,
        manifest_digest=first.test_digest,
    )


def _labels_suffix(result: TransferResult) -> str:
    labels = result.labels
    if labels.per_class:
        return f"-{labels.per_class}shot"
    return "" if labels.fraction == 1 else f"-{100 * labels.fraction:g}pct".replace(".", "_")

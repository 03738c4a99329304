"""Transfer runs beside each other: a line for each setting and encoder, and paired differences of two encoders.

Layer 4, without torch. Two separate means with their spreads are no comparison: which labelled tiles were drawn moves all
encoders alike. So differences are taken within pairs of runs that share everything but the encoder.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

from cromss_dist.errors import ResultError
from cromss_dist.train.figures.scores import METRICS, Metric, Scores, class_indices
from cromss_dist.transfer.results import Mode, TransferProtocol, TransferResult, read_tiles
from cromss_dist.transfer.statistics import Estimates, Interval, Resampling, Spread, estimate, estimate_difference


@dataclass(frozen=True, order=True)
class Setting:
    """What the figures of one line are of; runs of different settings are never taken together."""

    task: str
    modality: str
    mode: Mode
    protocol: TransferProtocol
    decoder: str
    labels: str

    @classmethod
    def of(cls, result: TransferResult) -> "Setting":
        """That of a run."""
        return cls(result.task, result.modality, result.mode, result.protocol, result.decoder, result.labels.amount)

    def __str__(self) -> str:
        parts = (self.task, self.modality, self.mode, f"{self.protocol} protocol", self.decoder, f"labels: {self.labels}")
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Line:
    """The runs of one encoder in one setting.

    Args:
        setting: What they have in common.
        name: The encoder's, in tables.
        runs: The runs, at least one.
        spread: Of the figures over the runs.
        iou: Of each class's IoU over the runs, by name.
        interval: Of the figures' mean, over test tiles; NaN with one tile.
        notes: Why mean, spread or interval are not what they seem; sentences.
    """

    setting: Setting
    name: str
    runs: tuple[TransferResult, ...]
    spread: dict[Metric, Spread]
    iou: dict[str, Spread]
    interval: dict[Metric, Interval]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """First minus second.

    Args:
        pairs: The difference in each pair.
        spread: Mean and standard deviation over the pairs.
        positive: Pairs in which the first is better.
        negative: Pairs in which it is worse.
        interval: Of the mean, over test tiles: how these very networks would differ on other tiles.
    """

    pairs: tuple[float, ...]
    spread: Spread
    positive: int
    negative: int
    interval: Interval

    @classmethod
    def of(cls, values: Sequence[float], interval: Interval) -> "Difference":
        """Of the pairs' differences."""
        return cls(tuple(values), Spread.of(values), sum(v > 0 for v in values), sum(v < 0 for v in values), interval)


@dataclass(frozen=True)
class Comparison:
    """Two encoders in one setting, run by run.

    Args:
        setting: What all runs have in common.
        first: Name of the encoder that is judged.
        second: Name of the one that it is held against.
        seeds: Of each pair: seed of the labels, seed of the training, replicate of the pretraining.
        metrics: Differences of the four figures.
        iou: Differences of the classes' IoU, by name.
        alone: Runs of either side without a partner; they are left out.
    """

    setting: Setting
    first: str
    second: str
    seeds: tuple[tuple[int, int, int], ...]
    metrics: dict[Metric, Difference]
    iou: dict[str, Difference]
    alone: int


def summarise(
    results: Iterable[TransferResult], resampling: Resampling | None = None, among: Sequence[str] | None = None
) -> list[Line]:
    """A line for each setting and encoder, in the order of settings and names.

    Args:
        results: With their folders: intervals need the tiles.
        resampling: How intervals are made; None = the default.
        among: Names of the classes that count, "common classes"; None = all.

    Raises:
        ResultError: runs of one line have different test sets or classes, tiles are missing or damaged, or `among` names an
            unknown class.
    """
    return [_line(setting, name, runs, resampling or Resampling(), among) for (setting, name), runs in _grouped(results).items()]


def compare(
    first: Iterable[TransferResult],
    second: Iterable[TransferResult],
    resampling: Resampling | None = None,
    among: Sequence[str] | None = None,
) -> list[Comparison]:
    """Every encoder of the first side against every one of the second, in each setting that both have.

    Runs make a pair if their setting, seeds and replicate are equal.

    Args:
        first: Results of the encoders that are judged, with their folders.
        second: Results of those that they are held against, likewise.
        resampling: How intervals are made; None = the default.
        among: Names of the classes that count, "common classes"; None = all.

    Raises:
        ResultError: no runs make a pair; several make the same; or runs of a pair differ in training tiles, data, classes or
            steps.
    """
    sides = _grouped(first), _grouped(second)
    comparisons = []
    for (setting, name), (other_setting, other) in product(*sides):
        if setting != other_setting or name == other:
            continue
        mine, theirs = _by_seeds(sides[0][setting, name]), _by_seeds(sides[1][setting, other])
        shared = sorted(mine.keys() & theirs.keys())
        if shared:
            alone = len(mine.keys() ^ theirs.keys())
            pairs = [(mine[seeds], theirs[seeds]) for seeds in shared]
            comparisons.append(_comparison(setting, pairs, alone, resampling or Resampling(), among))
    if not comparisons:
        raise ResultError(_why_no_pair(*sides))
    return comparisons


_Groups = dict[tuple[Setting, str], list[TransferResult]]


def _grouped(results: Iterable[TransferResult]) -> _Groups:
    def key(result: TransferResult) -> tuple[Setting, str]:
        return Setting.of(result), result.name

    return {found: list(runs) for found, runs in groupby(sorted(results, key=key), key)}


def _seeds(result: TransferResult) -> tuple[int, int, int]:
    return result.labels.seed, result.seed, result.replicate


def _by_seeds(runs: Sequence[TransferResult]) -> dict[tuple[int, int, int], TransferResult]:
    twice = [seeds for seeds, times in Counter(map(_seeds, runs)).items() if times > 1]
    if twice:
        same = [str(run.run_dir) for run in runs if _seeds(run) == twice[0]]
        raise ResultError(
            f"{runs[0].name} has {len(same)} runs with label seed, seed and replicate {twice[0]}: {', '.join(same)}. Which of "
            "them belongs to a pair cannot be told; leave all but one away, or give each its own seed or replicate."
        )
    return {_seeds(run): run for run in runs}


def _why_no_pair(first: _Groups, second: _Groups) -> str:
    settings = {setting for setting, _ in first} & {setting for setting, _ in second}
    if not settings:
        one, other = (sorted({str(setting) for setting, _ in side}) for side in (first, second))
        return (
            f"no setting is on both sides: {'; '.join(one)} against {'; '.join(other)}. Runs make a pair only if task, input, "
            "mode, protocol, decoder and labels are equal; run what is missing."
        )
    names = sorted({name for side in (first, second) for _, name in side})
    if len(names) == 1:
        return f"both sides are of {names[0]}; name the runs of another encoder after --against."
    return (
        "no run of one side has the label seed, seed and replicate of one on the other: "
        + " against ".join(str(sorted({_seeds(run) for runs in side.values() for run in runs})) for side in (first, second))
        + ". Run both encoders with the same seeds."
    )


def _line(
    setting: Setting, name: str, runs: Sequence[TransferResult], resampling: Resampling, among: Sequence[str] | None
) -> Line:
    for run in runs[1:]:
        _check_same(runs[0], run, "test_digest", "class_names")
    scores = [Scores.of(run.matrix, run.class_names, among) for run in runs]
    found = estimate([read_tiles(run) for run in runs], resampling, _indices(runs[0], among))
    return Line(
        setting,
        name,
        tuple(runs),
        spread={metric: Spread.of([s.metric(metric) for s in scores]) for metric in METRICS},
        iou={label: Spread.of([s.iou[label] for s in scores]) for label in scores[0].iou},
        interval=found.metrics,
        notes=tuple(_notes(runs)),
    )


def _notes(runs: Sequence[TransferResult]) -> Iterator[str]:
    if runs[0].tiles == 1:
        yield "there is one test tile, so that nothing can be said of others."
    if len(lengths := sorted({run.steps for run in runs})) > 1:
        yield f"runs of {', '.join(map(str, lengths))} steps are taken together; name those of one length alone."
    for seeds, times in Counter(map(_seeds, runs)).items():
        if times > 1:
            told = f"{times} runs have label seed, seed and replicate {seeds}, so that the spread is not one of repetitions"
            yield f"{told}; leave all but one away."


def _comparison(
    setting: Setting,
    pairs: Sequence[tuple[TransferResult, TransferResult]],
    alone: int,
    resampling: Resampling,
    among: Sequence[str] | None,
) -> Comparison:
    for one, other in pairs:
        _check_same(one, other, "train_digest", "test_digest", "class_names", "labels", "steps", "samples")
    names, index = pairs[0][0].class_names, _indices(pairs[0][0], among)
    scored = [[Scores.of(run.matrix, run.class_names, among) for run in pair] for pair in pairs]
    found: Estimates = estimate_difference([(read_tiles(one), read_tiles(other)) for one, other in pairs], resampling, index)
    chosen = range(len(names)) if index is None else index
    return Comparison(
        setting,
        pairs[0][0].name,
        pairs[0][1].name,
        tuple(_seeds(one) for one, _ in pairs),
        metrics={m: Difference.of([a.metric(m) - b.metric(m) for a, b in scored], found.metrics[m]) for m in METRICS},
        iou={names[i]: Difference.of([a.iou[names[i]] - b.iou[names[i]] for a, b in scored], found.iou[i]) for i in chosen},
        alone=alone,
    )


def _indices(result: TransferResult, among: Sequence[str] | None) -> tuple[int, ...] | None:
    return None if among is None else class_indices(among, result.class_names)


def _check_same(one: TransferResult, other: TransferResult, *facts: str) -> None:
    for fact in facts:
        mine, theirs = getattr(one, fact), getattr(other, fact)
        if mine != theirs:
            raise ResultError(
                f"{one.run_dir} and {other.run_dir} cannot be taken together: {fact} is {mine} in one and {theirs} in the other. "
                "Run both on the same data, labelled tiles, classes and number of steps."
            )

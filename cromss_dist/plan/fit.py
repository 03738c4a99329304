"""Rates out of measurements, by least squares with no negative number.

Layer 4.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from cromss_dist.plan.machine import Line, Link, Rate
from cromss_dist.plan.work import Timed

Floats = npt.NDArray[np.float64]


def fit_rates(calls: Iterable[Timed]) -> dict[str, Rate]:
    """Rates by kind, of operators that were timed.

    Calls weigh by the inverse root of their seconds, between absolute errors, which large operators alone would decide, and
    relative ones, which the smallest would. Then each kind's rate is scaled, so that all of its calls take together what they
    took.
    """
    of_kind: defaultdict[str, list[Timed]] = defaultdict(list)
    for call in calls:
        of_kind[call.kind].append(call)
    return {kind: _fit_rate(group) for kind, group in of_kind.items()}


def _fit_rate(calls: Sequence[Timed]) -> Rate:
    columns = np.array([[call.amount.operators, call.amount.flops, call.amount.bytes] for call in calls])
    seconds = np.array([call.seconds for call in calls])
    solution = np.array(_solve(columns, seconds))
    total = float((columns @ solution).sum())
    return Rate(*(float(part) for part in solution * (seconds.sum() / total if total > 0 else 1.0)))


def fit_line(units: Sequence[float], seconds: Sequence[float]) -> Line:
    """Fixed and growing seconds."""
    return Line(*_solve(np.stack([np.ones(len(units)), np.array(units)], 1), np.array(seconds)))


def fit_link(bytes_sent: Sequence[float], seconds: Sequence[float], ranks: int) -> Link:
    """A link out of all-reduces of several sizes over a ring: seconds = 2 (n - 1) hop + 2 (n - 1) / n bytes / rate."""
    hops, share = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    line = fit_line([share * size for size in bytes_sent], seconds)
    return Link(line.fixed_s / hops, 1 / max(line.each_s, 1e-15))


def _solve(columns: Floats, seconds: Floats) -> list[float]:
    weight = 1 / np.sqrt(np.maximum(seconds, 1e-9))
    scale = np.maximum(np.abs(columns).max(0), 1e-30)  # flops and operators differ by twelve orders
    solution, _ = nnls(columns / scale * weight[:, None], seconds * weight)
    return [float(value) for value in solution / scale]

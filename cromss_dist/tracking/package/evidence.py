"""What an encoder was measured to be worth downstream: a figure, its interval, and what it was measured on."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, get_args

from cromss_dist.errors import PackageError
from cromss_dist.tracking.package.strict_json import build, canonical

Protocol: TypeAlias = Literal["frozen", "finetuned", "linear"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_UNKNOWN_ALLOWED = ("level", "runs", "samples", "manifest_digest")


@dataclass(frozen=True)
class Evidence:
    """One downstream figure of an encoder. A figure without an interval is none: it cannot be compared.

    Args:
        dataset: Short name of the test set: 'dw', 'osm', 'dfc2020'; lower-case letters, digits, '_', '-'.
        metric: Name of the figure, likewise: 'miou', 'oa'. Larger is better.
        protocol: 'frozen' keeps the encoder under a trained decoder, 'finetuned' trains both, 'linear' fits one linear layer.
        value: The figure, as a share: at most 1, not in percent.
        low: Lower end of its interval, at most `value`.
        high: Upper end, at least `value`.
        source: Run id or publication that it is from.
        level: Coverage of the interval, in (0, 1).
        runs: Trainings that value and interval are over; 0 = not known.
        samples: Test samples; 0 = not known.
        manifest_digest: Digest of the test set's manifest; '' = not known, as of publications.

    Raises:
        PackageError: a name is not allowed, a number not finite or out of range, or `value` outside its interval.
    """

    dataset: str
    metric: str
    protocol: Protocol
    value: float
    low: float
    high: float
    source: str
    level: float = 0.95
    runs: int = 0
    samples: int = 0
    manifest_digest: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise PackageError(f"Evidence: {problem}.")

    def _problem(self) -> str | None:
        for name in ("dataset", "metric"):
            if not _NAME.fullmatch(getattr(self, name)):
                return f"{name}={getattr(self, name)!r} is not allowed; use lower-case letters, digits, '_' and '-'"
        if self.protocol not in PROTOCOLS:
            return f"protocol={self.protocol!r} is not allowed; choose from {', '.join(PROTOCOLS)}"
        # NaN compares false, infinity is above all that is finite.
        if not -float("inf") < self.low <= self.value <= self.high < float("inf"):
            return f"value={self.value!r} must be finite and inside its interval, low={self.low!r} to high={self.high!r}"
        if self.value > 1:  # a percentage would win against every share
            return f"value={self.value!r} is no share; give at most 1, such as 0.61 for 61 %"
        if not 0 < self.level < 1:
            return f"level={self.level!r} is not allowed; give a coverage in (0, 1), such as 0.95"
        if min(self.runs, self.samples) < 0:
            return f"runs={self.runs!r} and samples={self.samples!r} are counts; give 0 where they are not known"
        if not self.source:
            return "source is empty; name the run or the publication that the figure is from"
        return None

    @property
    def key(self) -> str:
        """What it is looked up by: 'dw.frozen.miou'."""
        return f"{self.dataset}.{self.protocol}.{self.metric}"

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return canonical(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str = "evidence") -> "Evidence":
        """Reads what `to_json` wrote, or what a person did: the keys with a default may be missing.

        Args:
            text: JSON.
            where: Where it is from, for messages.

        Raises:
            PackageError: not JSON, a key missing or unknown, a value of another type or out of range.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PackageError(f"{where} is not JSON: {error}.") from None
        return build(cls, content, where, optional=_UNKNOWN_ALLOWED)


def find_evidence(evidence: Iterable[Evidence], key: str) -> Evidence | None:
    """The evidence that a key means.

    Args:
        evidence: To look in.
        key: 'dw.frozen.miou', or 'dw.miou' for the largest value of any protocol.

    Returns:
        None where there is none.
    """
    matching = (item for item in evidence if key in (item.key, f"{item.dataset}.{item.metric}"))
    return max(matching, key=lambda item: item.value, default=None)

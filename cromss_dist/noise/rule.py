"""The rule by which the observatory cleans labels."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cromss_dist.config.check import require
from cromss_dist.data.sample import MEASURE_ONE, Uint8Array
from cromss_dist.schema import IGNORE


@dataclass(frozen=True)
class Verdict:
    """What the rule makes of some labels.

    Args:
        suspicious: bool: the label is doubted.
        replaced: bool: it is, and the suggestion takes its place.
        cleaned: uint8: the cleaned labels, 255 = ignore.
    """

    suspicious: npt.NDArray[np.bool_]
    replaced: npt.NDArray[np.bool_]
    cleaned: Uint8Array


@dataclass(frozen=True)
class Rule:
    """A label that the model doubts gives way to a suggestion that it is sure of; otherwise it stays, or is ignored.

    A label is suspicious if its confidence is below `doubt_below`. It is replaced if, besides, the suggested class is another
    one and its probability is above `replace_above`. Ignored pixels stay ignored.

    Args:
        doubt_below: In [0, 1]; 0 doubts no label.
        replace_above: In [0, 1]; 1 replaces no label.
        drop: Whether suspicious labels that are not replaced are ignored (255) from now on; otherwise they stay.
    """

    doubt_below: float = 0.1
    replace_above: float = 0.6
    drop: bool = False

    def __post_init__(self) -> None:
        for name in ("doubt_below", "replace_above"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "give a probability in [0, 1]")

    def judge(
        self, label: Uint8Array, suggested: Uint8Array, label_confidence: Uint8Array, suggested_confidence: Uint8Array
    ) -> Verdict:
        """Applies the rule.

        Args:
            label: uint8, noisy labels of any shape, 255 = ignore.
            suggested: uint8, suggested classes.
            label_confidence: uint8, as the cube stores it: 0-254 is 0 to 1, 255 none.
            suggested_confidence: uint8, the same.
        """
        # Stored values are compared, so that nothing depends on how they are unpacked.
        suspicious = (label != IGNORE) & (label_confidence < self.doubt_below * MEASURE_ONE)
        replaced = suspicious & (suggested != label) & (suggested_confidence > self.replace_above * MEASURE_ONE)
        cleaned = np.where(replaced, suggested, label)
        if self.drop:
            cleaned[suspicious & ~replaced] = IGNORE
        return Verdict(suspicious, replaced, cleaned)

    def to_json(self) -> dict[str, Any]:
        """For manifests and summaries."""
        return asdict(self)

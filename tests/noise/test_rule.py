"""The rule, pixel by pixel."""

import numpy as np
import pytest

from cromss_dist.errors import ConfigError
from cromss_dist.noise.rule import Rule, Verdict
from cromss_dist.schema import IGNORE

#                  sure, doubted, doubted and unsure, doubted and same, ignored
LABEL = np.array([1, 1, 1, 1, IGNORE], np.uint8)
SUGGESTED = np.array([2, 2, 2, 1, 2], np.uint8)
LABEL_CONFIDENCE = np.array([127, 20, 20, 20, IGNORE], np.uint8)
SUGGESTED_CONFIDENCE = np.array([254, 200, 100, 200, 254], np.uint8)


def judge(rule: Rule) -> Verdict:
    return rule.judge(LABEL, SUGGESTED, LABEL_CONFIDENCE, SUGGESTED_CONFIDENCE)


def test_a_doubted_label_gives_way_to_a_sure_suggestion_and_others_stay() -> None:
    verdict = judge(Rule(doubt_below=0.1, replace_above=0.6))
    assert verdict.suspicious.tolist() == [False, True, True, True, False]
    assert verdict.replaced.tolist() == [False, True, False, False, False]
    assert verdict.cleaned.tolist() == [1, 2, 1, 1, IGNORE]


def test_with_drop_doubted_labels_that_stay_are_ignored() -> None:
    assert judge(Rule(0.1, 0.6, drop=True)).cleaned.tolist() == [1, 2, IGNORE, IGNORE, IGNORE]
    assert judge(Rule(0.1, 1.0, drop=True)).cleaned.tolist() == [1, IGNORE, IGNORE, IGNORE, IGNORE]


def test_the_ends_of_the_thresholds_change_nothing() -> None:
    for rule in (Rule(0, 0), Rule(0, 0, drop=True), Rule(1, 1)):
        assert judge(rule).cleaned.tolist() == LABEL.tolist()
    assert LABEL.tolist() == [1, 1, 1, 1, IGNORE]


@pytest.mark.parametrize("rule", [{"doubt_below": 1.5}, {"replace_above": -0.1}, {"doubt_below": float("nan")}])
def test_thresholds_outside_0_to_1_are_refused(rule: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="give a probability"):
        Rule(**rule)  # type: ignore[arg-type]

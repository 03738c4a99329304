import json
from dataclasses import replace
from typing import Any

import pytest

from cromss_dist.errors import PackageError
from cromss_dist.tracking.package.evidence import Evidence, find_evidence

FROZEN = Evidence("dw", "miou", "frozen", 0.6, 0.58, 0.61, "run", 0.95, 5, 340, "a" * 64)
FINETUNED = replace(FROZEN, protocol="finetuned", value=0.65, high=0.7)
OSM = replace(FROZEN, dataset="osm")


def test_evidence_comes_back_from_json_as_it_was() -> None:
    assert Evidence.from_json(FROZEN.to_json()) == FROZEN
    assert json.loads(FROZEN.to_json())["low"] == 0.58


def test_what_is_often_not_known_may_be_left_out() -> None:
    text = '{"dataset": "dw", "metric": "oa", "protocol": "linear", "value": 0.5, "low": 0.5, "high": 0.5, "source": "paper"}'
    evidence = Evidence.from_json(text)
    assert (evidence.key, evidence.level, evidence.runs, evidence.samples) == ("dw.linear.oa", 0.95, 0, 0)


def test_a_key_means_one_protocol_and_the_short_form_the_best_of_them() -> None:
    every = (FROZEN, FINETUNED, OSM)
    assert find_evidence(every, "dw.frozen.miou") == FROZEN
    assert find_evidence(every, "dw.miou") == FINETUNED
    assert find_evidence(every, "osm.miou") == OSM
    assert [find_evidence(every, key) for key in ("dw.linear.miou", "dw.oa", "dw", "miou", "")] == [None] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "DW"}, "lower-case"),
        ({"dataset": "dw.x"}, "lower-case"),
        ({"metric": ""}, "lower-case"),
        ({"protocol": "zeroshot"}, "choose from frozen, finetuned, linear"),
        ({"value": 0.5}, "inside its interval"),
        ({"value": 0.7}, "inside its interval"),
        ({"value": float("nan")}, "finite"),
        ({"low": float("-inf")}, "finite"),
        ({"high": float("inf")}, "finite"),
        ({"value": 61.2, "low": 60.0, "high": 62.0}, "is no share; give at most 1"),
        ({"level": 1.0}, "coverage"),
        ({"level": float("nan")}, "coverage"),
        ({"runs": -1}, "counts"),
        ({"source": ""}, "source is empty"),
    ],
)
def test_evidence_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        replace(FROZEN, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "0.6"}, "value='0.6' is not allowed; expected float"),
        ({"value": 1}, "value=1 is not allowed"),
        ({"runs": True}, "runs=True"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"value": float("nan")}, "value=nan"),
    ],
)
def test_evidence_of_another_form_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        Evidence.from_json(json.dumps(json.loads(FROZEN.to_json()) | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nan", "[" * 100_000])
def test_what_is_no_evidence_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(PackageError, match=r"figures\.json"):
        Evidence.from_json(text, "figures.json")

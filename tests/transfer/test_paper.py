"""The published figures are those that the project's notes on the paper quote."""

import re
from pathlib import Path

import pytest

from cromss_dist.transfer.paper import PUBLISHED, published

NOTES = Path(__file__).resolve().parents[2].parent / "shared" / "design" / "method.md"


def test_every_published_figure_is_quoted_in_the_notes_and_none_is_left_out() -> None:
    if not NOTES.exists():
        pytest.skip("the notes on the paper are not beside this checkout")
    quoted = NOTES.read_text().split("S2 inputs 9 B, @DW")[1]
    figures = {float(text) for text in re.findall(r"\d+\.\d\d", quoted)}
    assert figures == {one.value for one in PUBLISHED} | {one.std for one in PUBLISHED if one.std is not None}


def test_a_setting_has_its_own_figures() -> None:
    frozen = {(one.method, one.bands): one.value for one in published("dw", "s2", "frozen")}
    assert frozen[("CromSS, late fusion", 9)] - frozen[("random", 9)] == pytest.approx(12.71)
    assert {one.modality for one in published("dw", "s1", "finetuned")} == {"s1"}
    assert published("dw", "s2", "linear") == published("osm", "s2", "frozen") == ()


def test_figures_are_percentages_that_say_where_they_are_from() -> None:
    for one in PUBLISHED:
        assert 1 < one.value < 100
        assert "arXiv:2405.01217" in one.source
    keys = [(one.task, one.modality, one.bands, one.mode, one.method, one.metric) for one in PUBLISHED]
    assert len(keys) == len(set(keys))

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from cromss_dist.errors import BandError, ConfigError, RegistryError
from cromss_dist.tracking.registry.entry import RegisteredEncoder
from cromss_dist.tracking.registry.query import Query, find, fits, narrowed, reaches
from cromss_dist.tracking.registry.registry import Registry
from tests.tracking.registry.conftest import NAME, MakePackage, measured

RGBN = ("B2", "B3", "B4", "B8")


def entry(bands: str = "B2,B3,B4,B8", metrics: Any = None, **tags: str) -> RegisteredEncoder:
    facts = {"modality": "s2", "licence": "Apache-2.0", "fusion": "late", "metrics": metrics or {}, "bands": bands.split(",")}
    if not bands:
        del facts["bands"]
    tags = {"verified": "true", "card": json.dumps(facts)} | tags
    return RegisteredEncoder("m", 1, ("candidate",), "r", "s", datetime.now(UTC), tags)


def evidence(*items: Any) -> dict[str, str]:
    return {f"evidence/{item.key}": item.to_json() for item in items}


@pytest.mark.parametrize(
    ("takes", "asked", "fit"),
    [
        ("B2,B3,B4,B8", {}, True),
        ("B8,B4,B3,B2", {}, True),  # load_encoder reorders
        ("B4,B3", {}, True),
        ("B4,B3", {"exactly": True}, False),
        ("B8,B4,B3,B2", {"exactly": True}, True),
        ("B2,B3,B4,B8,B11", {}, False),
        ("B2,B3,B4,B8,B11", {"missing": 1}, True),
        ("B2,B3,B4,B8,B11", {"missing": 1, "exactly": True}, True),
        ("B2,B11,B12", {"missing": 1}, False),
        ("B2,B11,B12", {"missing": 2}, True),
        ("", {}, False),  # a version of others, whose bands nobody knows
    ],
)
def test_an_encoder_fits_the_bands_you_have(takes: str, asked: dict[str, Any], fit: bool) -> None:
    assert fits(entry(takes), Query(bands=RGBN, **asked)) is fit


@pytest.mark.parametrize(
    ("query", "fit"),
    [
        ({"at_least": {"dw.miou": 0.6}}, True),
        ({"at_least": {"dw.miou": 0.71}}, False),
        ({"at_least": {"dw.frozen.miou": 0.61}}, False),
        ({"at_least": {"dw.finetuned.miou": 0.7}}, True),
        ({"at_most": {"dw.miou": 0.6}}, True),  # the frozen one
        ({"at_least": {"val/miou_s2": 0.5}, "at_most": {"val/miou_s2": 0.5}}, True),
        ({"at_least": {"val/miou_s1": 0.0}}, False),  # unknown is not enough
        ({"fusion": "late", "licence": "Apache-2.0", "alias": "candidate", "name": "m*"}, True),
        ({"fusion": "middle"}, False),
        ({"licence": "apache-2.0"}, False),
        ({"name": "M*"}, False),
        ({"alias": "production"}, False),
    ],
)
def test_numbers_are_compared_as_numbers_and_text_to_the_letter(query: dict[str, Any], fit: bool) -> None:
    known = evidence(measured(0.6), measured(0.7, protocol="finetuned"))
    one, asked = entry(metrics={"val/miou_s2": 0.5}, **known), Query(**query)
    assert (fits(one, asked) and reaches(one, asked)) is fit


def test_retired_and_half_registered_ones_are_hidden_unless_asked_for() -> None:
    retired, half = entry(retired="bad labels"), entry(verified="")
    assert not fits(retired, Query())
    assert fits(retired, Query(retired=True))
    assert not fits(half, Query())
    assert fits(half, Query(unverified=True))


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"metrics": 1, "bands": "B2"}', '{"bands": [1]}', "[" * 10**5, "9" * 5000])
def test_a_tag_that_is_no_facts_says_nothing(text: str) -> None:
    one = entry(card=text)
    assert (one.bands, one.metrics) == ((), {})
    wrong_key = {"evidence/dw.frozen.oa": measured(0.6).to_json(), "evidence/x": text}
    assert entry(**wrong_key).evidence == {}


def test_an_answer_that_is_no_version_is_refused() -> None:
    for name, version in (("", ""), ("m", ""), ("m", "x"), ("m", "1.5"), ("", "1"), (None, None)):
        answer: Any = SimpleNamespace(name=name, version=version)
        with pytest.raises(RegistryError, match=r"which is none\. Is it a server of MLflow"):
            RegisteredEncoder.of(answer)


def test_what_is_no_finite_number_is_no_figure() -> None:
    odd = '{"metrics": {"a": "1", "b": true, "c": NaN, "d": 1e999, "e": 1%s, "f": null, "g": 2}}' % ("0" * 400)
    assert entry(card=odd).metrics == {"g": 2.0}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"bands": ("B2", "VV")}, BandError),
        ({"bands": ("B2",), "modality": "s1"}, BandError),
        ({"bands": ("B99",)}, BandError),
        ({"bands": ("B2", "B2")}, BandError),
        ({"exactly": True}, ConfigError),
        ({"missing": 1}, ConfigError),
        ({"bands": ("B2",), "missing": -1}, ConfigError),
        ({"limit": -1}, ConfigError),
        ({"at_least": {"dw.miou": float("nan")}}, ConfigError),
    ],
)
def test_a_question_that_has_no_answer_is_refused(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Query(**wrong)


@pytest.mark.parametrize("value", ["a'b", 'a"b', "a' OR '1'='1", "a\\", "`a`", "a%", "a\nb"])
def test_values_that_would_need_quoting_are_not_sent(value: str) -> None:
    assert narrowed(Query(licence=value)) == narrowed(Query())
    assert "licence" in narrowed(Query(licence="GPL-3.0+ or later"))


def test_what_the_store_is_asked_finds_what_this_side_decides(registry: Registry, run_id: str, make_package: MakePackage) -> None:
    """Names with quotes, through the real filter of MLflow; the oracle is `fits` over everything."""
    odd = registry.register(make_package("odd", licence='it\'s "odd" `x`'), "other.model", run_id)
    good = registry.register(make_package("good", evidence=(measured(0.7),), metrics={"val/miou_s2": 0.4}), NAME, run_id)
    retired = registry.register(make_package("bad", evidence=(measured(0.9),), fusion="late"), NAME, run_id)
    registry.client.set_model_version_tag(NAME, str(retired.version), "retired", "x")
    registry.add_evidence(f"{NAME}/1", measured(0.6))
    everything = registry.list()
    for query in (
        Query(),
        Query(licence='it\'s "odd" `x`'),
        Query(name="other.model"),
        Query(name="other*", modality="s2"),
        Query(name="?ther.mod*l"),
        Query(name="[o]ther.model"),
        Query(name="cromss_resnet18_s2"),  # '_' is any character in SQL
        Query(encoder="resnet_8"),
        Query(licence="APACHE-2.0"),
        Query(fusion="late", retired=True),
        Query(licence="Apache-2.0", encoder="resnet18", method="cromss", dataset="nol", fusion="middle"),
        Query(at_least={"dw.miou": 0.65}),
        Query(name="nobody"),
    ):
        wanted = [e.ref for e in everything if fits(e, query) and reaches(e, query)]
        assert [found.entry.ref for found in find(registry, query)] == wanted, query
    for mistyped in (Query(sort="dw.mious"), Query(at_most={"DW.miou": 1.0}), Query(licence="Apache-2.0", sort="val/x")):
        with pytest.raises(RegistryError, match=r"is no figure of any .* they have dw.frozen.miou, val/miou_s2"):
            find(registry, mistyped)
    assert find(registry, Query(name="nobody", sort="dw.mious")) == ()
    best = find(registry, Query(sort="dw.miou"))
    assert [(found.entry.ref, found.figures) for found in best] == [
        (good.ref, {"dw.miou": 0.7}),
        (f"{NAME}/1", {"dw.miou": 0.6}),
        (odd.ref, {}),
    ]
    worst = find(registry, Query(sort="val/miou_s2", ascending=True, limit=1))
    assert [found.entry.ref for found in worst] == [good.ref]
    newest = find(registry, Query(sort="created", limit=1, retired=True))
    assert newest[0].entry.ref == retired.ref


def test_a_date_sorts_by_time() -> None:
    class Store:
        def list(self, narrowed: str) -> tuple[RegisteredEncoder, ...]:
            start = datetime(2026, 1, 1, tzinfo=UTC)
            return tuple(replace(entry(), version=v, created=start + timedelta(days=d)) for v, d in ((1, 5), (2, 9), (3, 1)))

    store: Any = Store()
    assert [found.entry.version for found in find(store, Query(sort="created"))] == [2, 1, 3]
    assert [found.entry.version for found in find(store, Query(sort="created", ascending=True))] == [3, 1, 2]

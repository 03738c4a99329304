"""Profiles and fits."""

import json
from pathlib import Path

import pytest

from cromss_dist.errors import ConfigError
from cromss_dist.plan.fit import fit_line, fit_link, fit_rates
from cromss_dist.plan.machine import Machine, Rate
from cromss_dist.plan.sheets import SHEETS, named_machine
from cromss_dist.plan.work import Amount, Timed, add_up
from tests.plan.machines import MACHINE, machine


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    MACHINE.write(tmp_path / "profile.json")
    assert Machine.read(tmp_path / "profile.json") == MACHINE


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"rates": {}},
        {"step_factor": 0},
        {"residual": "a"},
        {"crowding": {"1": -1}},
        {"surplus": 1},
        {"loss": None},
    ],
    ids=str,
)
def test_what_is_no_profile_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(json.loads(MACHINE.to_json()) | changes))
    with pytest.raises(ConfigError, match="is no profile of a machine"):
        Machine.read(path)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("[")
    for name in ("missing", "text"):
        with pytest.raises(ConfigError, match="cromss probe"):
            Machine.read(tmp_path / name)


def test_rates_are_found_again() -> None:
    rates = {"convolution": Rate(1e-4, 2e-11, 3e-10), "norm": Rate(2e-5, 0.0, 1e-10)}
    amounts = [Amount(1, flops, moved) for flops in (1e6, 1e8, 3e9) for moved in (1e4, 1e6, 5e7)]
    calls = [Timed(kind, amount, rate.seconds(amount)) for kind, rate in rates.items() for amount in amounts]
    fitted = fit_rates(calls)
    for kind, amount in add_up(calls).items():
        assert fitted[kind].seconds(amount) == pytest.approx(rates[kind].seconds(amount), rel=1e-6)
        assert fitted[kind].byte_s == pytest.approx(rates[kind].byte_s, rel=1e-3)


def test_a_fit_has_no_negative_rate_and_keeps_the_sum() -> None:
    seconds = [5.0, 4.0, 3.0]  # quicker the more there is
    calls = [Timed("norm", Amount(1, 0, moved), s) for moved, s in zip((1e6, 2e6, 3e6), seconds, strict=True)]
    rate = fit_rates(calls)["norm"]
    assert min(rate.operator_s, rate.flop_s, rate.byte_s) >= 0
    assert sum(rate.seconds(call.amount) for call in calls) == pytest.approx(sum(seconds))


def test_a_line_and_a_link_are_found_again() -> None:
    line = fit_line([10, 100, 1000], [1.1, 2.0, 11.0])
    assert [line.fixed_s, line.each_s] == pytest.approx([1.0, 0.01])
    sizes = (2e3, 3e5, 3e7)
    link = fit_link(sizes, [2 * 1e-4 + size / 1e9 for size in sizes], ranks=2)
    assert [link.hop_s, link.bytes_per_s] == pytest.approx([1e-4, 1e9])


def test_crowding_holds_from_the_ranks_that_it_was_measured_with() -> None:
    crowded = machine(crowding={1: 1.0, 2: 1.5})
    assert [crowded.crowding_of(ranks) for ranks in (1, 2, 8)] == [1.0, 1.5, 1.5]


@pytest.mark.parametrize("name", SHEETS)
def test_a_named_machine_says_that_nobody_measured_it(name: str) -> None:
    found = named_machine(name.upper())
    assert found is not None
    assert found.source.startswith("not measured: NVIDIA")
    assert Machine.from_dict(json.loads(found.to_json())) == found
    assert named_machine("abacus") is None

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cromss_dist.errors import PackageError
from cromss_dist.schema import S2_RGB
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence

MakeCard = Callable[..., EncoderCard]
DW = Evidence("dw", "miou", "frozen", 0.6, 0.58, 0.61, "run")
ORIGIN = {"file": "weights.ckpt", "sha256": "a" * 64, "url": "", "layout": "cromss"}
UNKNOWN: dict[str, Any] = {"dataset": "", "config_digest": "", "manifest_digest": "", "run_id": "", "patch_px": 0, "licence": ""}


def test_a_card_with_all_that_it_can_hold_comes_back_as_it_was(make_card: MakeCard) -> None:
    finetuned = Evidence("dw", "miou", "finetuned", 0.7, 0.7, 0.7, "paper", 0.9, 5, 340, "b" * 64)
    card = replace(
        make_card(), evidence=(DW, finetuned), archive={"0.inputs": "12"}, fusion="none", classes=(), method="moco", origin=ORIGIN
    )
    assert EncoderCard.from_json(card.to_json()) == card


def test_wavelengths_are_by_band_in_the_order_of_the_encoder(make_card: MakeCard) -> None:
    card = make_card()
    rgb = replace(card, bands=S2_RGB, normalisation=card.normalisation.select(S2_RGB), in_channels=3)
    assert rgb.wavelengths_nm == {"B4": 664.6, "B3": 559.8, "B2": 492.7}
    # 5.405 GHz: c / f = 5.5466 cm.
    assert make_card(modality="s1").wavelengths_nm == {band: pytest.approx(5.54657e7, rel=1e-5) for band in ("VV", "VH")}


def test_sides_of_the_input_are_multiples_of_the_last_stride(make_card: MakeCard) -> None:
    assert [make_card(depth=depth).input_multiple for depth in (3, 5)] == [8, 32]


def test_only_an_import_may_lack_what_a_run_knows(make_card: MakeCard) -> None:
    imported = replace(make_card(), origin=ORIGIN, **UNKNOWN)
    assert EncoderCard.from_json(imported.to_json()) == imported
    for name in UNKNOWN.keys() - {"licence"}:
        with pytest.raises(PackageError, match=f"{name} must be known, since it is no import"):
            replace(make_card(), **{name: UNKNOWN[name]})
    with pytest.raises(PackageError, match="method must be known"):
        replace(imported, method="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": {"file": "x"}}, "origin has keys"),
        ({"evidence": (DW, replace(DW, value=0.59))}, r"evidence for dw.frozen.miou is given twice"),
        ({"strides": (2, 4)}, "differ in length"),
        ({"strides": (), "out_channels": ()}, "differ in length"),
        ({"strides": (2, 4, 0)}, "strides"),
        ({"out_channels": (-1, 64, 128)}, "out_channels"),
        ({"in_channels": 12}, "do not fit the 13 bands"),
        ({"patch_px": -1}, "patch_px=-1"),
        ({"bands": ("B1", "B1")}, "some given twice"),
        ({"modality": "s1"}, "unknown"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(make_card: MakeCard, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        replace(make_card(), **change)


def test_a_contract_that_divides_by_zero_is_refused(make_card: MakeCard) -> None:
    card = make_card()
    with pytest.raises(PackageError, match="all must be above 0"):
        replace(card, normalisation=replace(card.normalisation, std=(0.0, *card.normalisation.std[1:])))

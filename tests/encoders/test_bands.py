from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cromss_dist.encoders.bands import for_bands, input_weights
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.errors import BandError
from cromss_dist.models.encoder import build_encoder, stage_channels, stage_features
from cromss_dist.schema import S2_9, S2_BANDS, S2_NORMALISATION, S2_RGB
from cromss_dist.tracking.package.card import PUBLISHED_PACKAGE, EncoderCard
from cromss_dist.tracking.package.evidence import Evidence

MakeCard = Callable[..., EncoderCard]
IMAGES = torch.rand(2, 13, 64, 64, generator=torch.Generator().manual_seed(0))
AT = {band: index for index, band in enumerate(S2_BANDS)}


@pytest.fixture(scope="module")
def whole(encoder_package: Path) -> PretrainedEncoder:
    """All 13 bands."""
    return load_encoder(encoder_package).eval()


@pytest.fixture(scope="module")
def nine(whole: PretrainedEncoder) -> PretrainedEncoder:
    """An encoder that was trained with 9 bands: it knows nothing of the others."""
    card = whole.card
    evidence = (Evidence("dw", "miou", "frozen", 0.6, 0.5, 0.7, "run"),)
    card = replace(card, bands=S2_9, normalisation=card.normalisation.select(S2_9), in_channels=9, evidence=evidence)
    return PretrainedEncoder(card, build_encoder("resnet18", 3, 9)).eval()


def pick(bands: tuple[str, ...]) -> torch.Tensor:
    return IMAGES[:, [AT[band] for band in bands]]


@pytest.mark.parametrize("bands", [S2_RGB, S2_BANDS[::-1], ("B10",)])
def test_selected_bands_give_the_features_of_the_whole_encoder_with_the_others_at_zero(
    whole: PretrainedEncoder, bands: tuple[str, ...]
) -> None:
    selected = for_bands(whole, bands).eval()
    zeroed = torch.zeros_like(IMAGES)
    for band in bands:
        zeroed[:, AT[band]] = IMAGES[:, AT[band]]
    with torch.no_grad():
        single = list(zip(selected(pick(bands)), whole(zeroed), strict=True))
        # In float64 the rounding of sums in another order is gone.
        exact = list(
            zip(
                stage_features(for_bands(whole, bands).eval().double().encoder, pick(bands).double()),
                stage_features(build_double(whole), zeroed.double()),
                strict=True,
            )
        )
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max())) for a, b in single)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12 * float(b.abs().max())) for a, b in exact)
    for key, tensor in selected.encoder.state_dict().items():
        expected = whole.encoder.state_dict()[key]
        assert torch.equal(tensor, expected[:, [AT[band] for band in bands]] if key == "conv1.weight" else expected), key


def build_double(encoder: PretrainedEncoder) -> torch.nn.Module:
    copy = build_encoder("resnet18", 3, 13)
    copy.load_state_dict(encoder.encoder.state_dict())
    return copy.double().eval()


def test_the_encoders_own_bands_change_nothing(whole: PretrainedEncoder, encoder_package: Path) -> None:
    assert for_bands(whole, S2_BANDS) is whole
    for bands in (None, list(S2_BANDS)):
        loaded = load_encoder(encoder_package, bands=bands)
        assert loaded.adapted is None
        assert loaded.card == whole.card


def test_a_wrong_order_is_never_silent(whole: PretrainedEncoder) -> None:
    bands = ("B3", "B2", "B4")
    encoder = for_bands(whole, bands).eval()
    assert encoder.bands == encoder.card.bands == encoder.card.normalisation.bands == bands
    assert encoder.adapted is not None
    assert (encoder.adapted.trained, encoder.adapted.missing, encoder.adapted.rule) == (S2_BANDS, (), None)
    with torch.no_grad():
        assert not torch.allclose(encoder(pick(bands))[0], encoder(pick(("B2", "B3", "B4")))[0], atol=1e-3)
    values = np.random.default_rng(0).uniform(0, 10_000, (3, 8, 8)).astype(np.float32)
    assert torch.equal(encoder.normalise(values), torch.from_numpy(S2_NORMALISATION.to_uint8(values, bands)).float() / 255)
    with pytest.raises(BandError, match="with s2 bands B3, B2, B4, in this order"):
        encoder(IMAGES)


def test_missing_bands_with_weights_of_zero_have_no_influence(nine: PretrainedEncoder) -> None:
    encoder = for_bands(nine, S2_BANDS, "zeros").eval()
    others = IMAGES.clone()
    for band in ("B1", "B8A", "B9", "B10"):
        others[:, AT[band]] = 1 - others[:, AT[band]]
    with torch.no_grad():
        features, expected = encoder(IMAGES), nine(pick(S2_9))
        assert all(torch.equal(a, b) for a, b in zip(features, encoder(others), strict=True))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max())) for a, b in zip(features, expected, strict=True))
    assert encoder.adapted is not None
    assert (encoder.adapted.missing, encoder.adapted.rule) == (("B1", "B8A", "B9", "B10"), "zeros")


def test_missing_bands_get_the_mean_of_all_bands_it_was_trained_with(nine: PretrainedEncoder) -> None:
    weight = for_bands(nine, ("B1", "B4"), "mean").encoder.state_dict()["conv1.weight"].numpy()
    trained = nine.encoder.state_dict()["conv1.weight"].numpy()
    np.testing.assert_allclose(weight[:, 0], trained.astype(np.float64).sum(1) / 9, atol=1e-7)
    assert np.array_equal(weight[:, 1], trained[:, S2_9.index("B4")])


def test_an_adapted_encoder_is_told_from_a_trained_one(nine: PretrainedEncoder) -> None:
    card = for_bands(nine, ("B1", "B2"), "mean").card
    assert (card.in_channels, card.metrics, card.evidence, card.files, card.tensors_sha256) == (2, {}, (), {}, "")
    assert card.recipe["adapted.trained_bands"] == ",".join(S2_9)
    assert card.recipe["adapted.missing"] == "mean"
    assert card.wavelengths_nm == {"B1": 442.7, "B2": 492.7}


def test_a_missing_band_is_an_error_unless_it_is_said_what_to_do(nine: PretrainedEncoder) -> None:
    with pytest.raises(BandError, match=rf"takes 9 s2 bands, {', '.join(S2_9)}.* not trained with B1, B9. .*'zeros'.*'mean'"):
        for_bands(nine, ("B1", "B2", "B9"))


@pytest.mark.parametrize(
    ("bands", "message"), [((), "none given"), (("VV", "VH"), "unknown"), (("B2", "B2"), "twice"), (("b2",), "unknown")]
)
def test_bands_that_cannot_be_are_refused_with_those_it_takes(
    encoder_package: Path, bands: tuple[str, ...], message: str
) -> None:
    with pytest.raises(BandError, match=rf"{message}.*takes 13 s2 bands, {', '.join(S2_BANDS)}"):
        load_encoder(encoder_package, bands=bands, missing="zeros")


def test_bands_whose_scaling_is_not_known_are_refused(nine: PretrainedEncoder) -> None:
    odd = PretrainedEncoder(replace(nine.card, normalisation=replace(nine.card.normalisation, units="sr-1")), nine.encoder)
    assert for_bands(odd, ("B4", "B3")).card.normalisation.bands == ("B4", "B3")
    with pytest.raises(BandError, match="How B1 would be scaled is not known"):
        for_bands(odd, ("B1", "B4"), "mean")


@pytest.mark.parametrize("bands", ["B4", "B4,B3", {"B4", "B3"}])
def test_bands_without_an_order_or_a_list_are_refused(whole: PretrainedEncoder, bands: Any) -> None:
    with pytest.raises(BandError, match="give a list of names, in the order you feed them"):
        for_bands(whole, bands)


@pytest.mark.parametrize("bands", [("B4",), ("B4", "B1")])
def test_a_misspelt_rule_for_missing_bands_is_refused_not_taken_for_zeros(
    nine: PretrainedEncoder, bands: tuple[str, ...]
) -> None:
    with pytest.raises(BandError, match="missing='Mean' is not allowed; choose 'error', 'zeros' or 'mean'"):
        for_bands(nine, bands, "Mean")  # type: ignore[arg-type]


def test_an_adapted_encoder_is_not_adapted_again_since_its_other_bands_are_gone(whole: PretrainedEncoder) -> None:
    adapted = for_bands(whole, S2_RGB)
    assert for_bands(adapted, S2_RGB) is adapted
    with pytest.raises(BandError, match=r"adapted before, from B1, .* to B4, B3, B2; load it again"):
        for_bands(adapted, S2_BANDS, "zeros")


@pytest.mark.parametrize("name", ["efficientnet-b0", "tu-repvgg_a0"])
def test_other_families_take_other_bands(make_card: MakeCard, name: str) -> None:
    encoder = build_encoder(name, 3, 13)
    channels, strides = stage_channels(encoder)
    card = replace(make_card(), encoder=name, out_channels=channels, strides=strides)
    whole, zeroed = PretrainedEncoder(card, encoder).eval(), torch.zeros_like(IMAGES)
    zeroed[:, [AT["B4"], AT["B8"]]] = pick(("B4", "B8"))
    with torch.no_grad():
        for a, b in zip(for_bands(whole, ("B8", "B4")).eval()(pick(("B8", "B4"))), whole(zeroed), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_an_encoder_without_a_channel_a_band_is_refused(whole: PretrainedEncoder) -> None:
    state = {"mixer.weight": torch.zeros(13, 13), "conv.weight": torch.zeros(8, 3, 3, 3)}
    for other in (state, {"mixer.weight": torch.zeros(14, 14), "conv.weight": torch.zeros(8, 3, 3, 3)}):
        with pytest.raises(BandError, match=r"no first convolution with a channel a band.* takes 13 s2 bands"):
            input_weights(whole.card, state, other)


def test_other_forms_take_the_adapted_bands(whole: PretrainedEncoder) -> None:
    encoder = for_bands(whole, S2_RGB).eval()
    with torch.no_grad():
        expected = encoder(pick(S2_RGB))
        smp = encoder.to_smp("Unet", 4, decoder_channels=(8, 8, 8)).eval().get_submodule("encoder")
        for maps in (encoder.to_timm().eval()(pick(S2_RGB)), stage_features(smp, pick(S2_RGB))):
            assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_a_published_folder_is_loaded_by_the_package_in_it(encoder_package: Path, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "README.md").touch()
    (tmp_path / "published" / PUBLISHED_PACKAGE).symlink_to(encoder_package)
    assert load_encoder(tmp_path / "published", bands=S2_RGB).bands == S2_RGB

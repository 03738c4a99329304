"""What is imported is what was published, to the bit, and nothing is guessed."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cromss_dist.encoders.importing.import_encoder import Facts, import_encoder, read_encoder
from cromss_dist.encoders.importing.layouts import normalisation
from cromss_dist.encoders.load import load_encoder
from cromss_dist.errors import BandError, ConfigError, CromssError, PackageError
from cromss_dist.schema import CLASS_NAMES, NORMALISATION, S1_BANDS, S2_9, S2_BANDS, S2_RGB, Modality
from tests.encoders.importing import look_alikes
from tests.encoders.importing.conftest import Save
from tests.encoders.importing.look_alikes import State, prefixed, resnet_state

Make = Callable[[State, State], Any]
# name of the file, checkpoint of (s1, s2), modality -> layout, method, fusion, licence
PUBLISHED: dict[str, tuple[str, Make, Modality, tuple[str, str, str, str]]] = {
    "middle s1": ("a.ckpt", lambda a, b: look_alikes.cromss("middle", a, b), "s1", ("cromss-middle", "cromss", "middle", "MIT")),
    "middle s2": ("a.ckpt", lambda a, b: look_alikes.cromss("middle", a, b), "s2", ("cromss-middle", "cromss", "middle", "MIT")),
    "late s1": ("a.ckpt", lambda a, b: look_alikes.cromss("late", a, b), "s1", ("cromss-late", "cromss", "late", "MIT")),
    "late s2": ("a.ckpt", lambda a, b: look_alikes.cromss("late", a, b), "s2", ("cromss-late", "cromss", "late", "MIT")),
    "moco": ("a.pth", lambda a, b: look_alikes.moco(b), "s2", ("moco", "moco", "none", "CC-BY-4.0")),
    "moco s1": ("a.pth", lambda a, b: look_alikes.moco(a), "s1", ("moco", "moco", "none", "CC-BY-4.0")),
    "dino": ("a.pth", lambda a, b: look_alikes.dino(b), "s2", ("dino", "dino", "none", "CC-BY-4.0")),
    "decur s1": ("a.pth", look_alikes.decur, "s1", ("decur", "decur", "none", "Apache-2.0")),
    "decur s2": ("a.pth", lambda a, b: {"model": look_alikes.decur(a, b)}, "s2", ("decur", "decur", "none", "Apache-2.0")),
    "moco backbone": ("B13_rn50_moco_ep99.pth", lambda a, b: {"state_dict": b}, "s2", ("plain", "moco", "none", "CC-BY-4.0")),
    "decur backbone": ("rn50_sar_decur_ep100.pth", lambda a, b: a, "s1", ("plain", "decur", "none", "Apache-2.0")),
}


# Of two alike, one is fast.
_SLOW = ("middle s1", "late s2", "moco s1", "decur s1", "decur backbone")


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=name, marks=[pytest.mark.slow] * (name in _SLOW)) for name, c in PUBLISHED.items()]
)
def test_each_published_layout_gives_the_weights_that_are_in_it(
    case: tuple[str, Make, Modality, tuple[str, str, str, str]], save: Save, s1_state: State, s2_state: State
) -> None:
    name, make, modality, facts = case
    encoder, card = read_encoder(save(make(s1_state, s2_state), name), modality)
    _check_equal(encoder.state_dict(), s1_state if modality == "s1" else s2_state)
    assert (card.origin["layout"].split()[0], card.method, card.fusion, card.licence) == facts
    assert (card.encoder, card.bands) == ("resnet18", S1_BANDS if modality == "s1" else S2_BANDS)
    assert card.classes == (CLASS_NAMES if card.method == "cromss" else ())
    assert (card.patch_px, card.dataset) == ((256, "NoLDO-S12") if card.method == "cromss" else (224, "SSL4EO-S12"))
    # Their publishers: statistics for Sentinel-1, and for Sentinel-2 with CromSS and DeCUR; else Sentinel-2 / 10,000.
    by_statistics = modality == "s1" or card.method in ("cromss", "decur")
    assert card.normalisation == (NORMALISATION[modality] if by_statistics else normalisation("s2", S2_BANDS, "reflectance"))


def test_reflectance_is_digital_numbers_over_10000_as_uint8() -> None:
    values = np.arange(0, 20_000, 7).astype(np.float32).reshape(1, -1, 1).repeat(13, 0)
    expected = np.clip(values / 10_000 * 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(normalisation("s2", S2_BANDS, "reflectance").to_uint8(values, S2_BANDS), expected)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_an_imported_package_computes_what_its_network_did(
    name: str, save: Save, s1_state: State, s2_state: State, tmp_path: Path
) -> None:
    s2 = _of_channels(s2_state, 9) if name == "resnet18" else resnet_state(9, seed=3, encoder=name)
    path = save(look_alikes.cromss("middle", s1_state, s2), "weights-cromss-9B-midFusion-epoch=199.ckpt")
    card = import_encoder(path, tmp_path / "package", "s2", Facts(url="https://example.org/a.ckpt"), run_id="r" * 32)
    encoder = load_encoder(tmp_path / "package").eval()
    assert (encoder.card, card.encoder, card.bands, card.run_id) == (card, name, S2_9, "r" * 32)
    x = torch.rand(1, 9, 64, 64)
    # The first convolution, written out, as oracle that bands and weights are in their places.
    first = torch.nn.functional.conv2d(x, s2["conv1.weight"], stride=2, padding=3)
    scale = s2["bn1.weight"] / (s2["bn1.running_var"] + 1e-5).sqrt()
    expected = (first - s2["bn1.running_mean"][:, None, None]) * scale[:, None, None] + s2["bn1.bias"][:, None, None]
    torch.testing.assert_close(encoder(x)[0], expected.relu(), rtol=1e-5, atol=1e-5)
    assert card.origin == {
        "file": "weights-cromss-9B-midFusion-epoch=199.ckpt",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "url": "https://example.org/a.ckpt",
        "layout": "cromss-middle (state_dict, keys net.encoder.*)",
    }


def _of_channels(state: State, channels: int) -> State:
    return state | {"conv1.weight": state["conv1.weight"][:, :channels].clone()}


def test_bands_are_known_by_the_number_of_channels_or_told(save: Save, s2_state: State) -> None:
    assert read_encoder(save(look_alikes.moco(_of_channels(s2_state, 3))), "s2")[1].bands == S2_RGB
    path = save(look_alikes.moco(_of_channels(s2_state, 4)))
    with pytest.raises(BandError, match=r"takes 4 channels; moco checkpoints for s2 have 13, 3.*--bands"):
        read_encoder(path, "s2")
    told = Facts(bands=("B2", "B3", "B4", "B8"), scaling="statistics", dataset="other")
    card = read_encoder(path, "s2", told)[1]
    assert (card.dataset, card.normalisation) == ("other", NORMALISATION["s2"].select(("B2", "B3", "B4", "B8")))
    for bands in (("B2",), ("B2", "B2", "B3", "B4"), ("B02", "B3", "B4", "B8")):
        with pytest.raises(BandError):
            read_encoder(path, "s2", Facts(bands=bands))


def test_weights_of_any_memory_order_and_of_fewer_bits_are_taken_exactly(save: Save, s2_state: State) -> None:
    flat = torch.cat([torch.zeros(3), *(value.flatten().float() for value in s2_state.values())])
    odd, at = {}, 3  # as views of one flat buffer, channels last, and parameters
    for key, value in s2_state.items():
        view = flat[at : at + value.numel()].view(value.shape)
        at += value.numel()
        odd[key] = torch.nn.Parameter(view) if key == "bn1.weight" else view if value.is_floating_point() else value
    odd["conv1.weight"] = s2_state["conv1.weight"].to(memory_format=torch.channels_last)
    _check_equal(read_encoder(save({"state_dict": odd}, "moco.pth"), "s2")[0].state_dict(), s2_state)
    half = {key: value.half() if value.is_floating_point() else value for key, value in s2_state.items()}
    widened = {key: value.float() if value.is_floating_point() else value for key, value in half.items()}
    _check_equal(read_encoder(save(look_alikes.moco(half)), "s2")[0].state_dict(), widened)


def _check_equal(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key], value), key


def _without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


WRONG: dict[str, tuple[Callable[[State], Any], str]] = {
    "no encoder": (
        lambda s: {"state_dict": prefixed(s, "net.trunk."), "epoch": 1},
        r"no encoder for s2 of any known layout; its keys, by prefix: state_dict: net.trunk.\* \(120\).*cromss-middle.*random",
    ),
    "no tensors": (lambda s: {"epoch": 1, "note": "x"}, "no tensors by name, but 'epoch', 'note'"),
    "no dict": (lambda s: [s["conv1.weight"]], "holds a list"),
    "a vision transformer": (lambda s: look_alikes.mae(), "vision transformer, as MAE's"),
    "deformable attention": (
        lambda s: {"model": look_alikes.decur(s, s) | {"module.da1_l3.proj_q.weight": torch.rand(2)}},
        "deformable attention.*without '-rda'",
    ),
    "a missing key": (lambda s: look_alikes.moco(_without(s, "layer3.1.bn2.bias")), r"1 missing \['layer3.1.bn2.bias'\]"),
    "a key too many": (
        lambda s: look_alikes.moco(s | {"layer1.0.se.weight": torch.rand(2)}),
        r"1 too many \['layer1.0.se.weight'\]",
    ),
    "a block missing": (
        lambda s: look_alikes.moco({k: v for k, v in s.items() if not k.startswith("layer3.1")}),
        r"\[2, 2, 1, 2\] blocks in its stages; known are those of resnet18",
    ),
    "another shape": (
        lambda s: look_alikes.moco(s | {"layer2.0.conv1.weight": torch.rand(128, 64, 1, 1)}),
        "layer2.0.conv1.weight has shape",
    ),
    "a flat stem": (lambda s: look_alikes.moco(s | {"conv1.weight": torch.rand(64, 637)}), "four numbers are due"),
    "no number": (
        lambda s: look_alikes.moco(s | {"bn1.bias": torch.full((64,), torch.nan)}),
        "bn1.bias holds numbers that are not finite",
    ),
    "more bits": (lambda s: look_alikes.moco(s | {"bn1.bias": torch.rand(64).double()}), "bn1.bias is torch.float64"),
    "two encoders": (
        lambda s: look_alikes.moco(s) | {"teacher": prefixed(s, "backbone.")},
        "2 encoders for s2 .moco: state_dict, keys module.encoder_q.*dino: teacher, keys backbone.*--layout",
    ),
}


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG)
def test_a_checkpoint_that_is_not_exactly_an_encoder_is_refused_and_leaves_nothing(
    make: Callable[[State], Any], words: str, save: Save, s2_state: State, tmp_path: Path
) -> None:
    path = save(make(s2_state))
    with pytest.raises(PackageError, match=words) as caught:
        import_encoder(path, tmp_path / "package", "s2")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "package").exists()


def test_what_is_not_known_must_be_told(save: Save, s1_state: State, s2_state: State) -> None:
    with pytest.raises(ConfigError, match="--method"):
        read_encoder(save(s2_state, "mine.pth"), "s2")
    with pytest.raises(ConfigError, match=r"scaled is not known.*--scaling"):
        read_encoder(save(s2_state, "mine.pth"), "s2", Facts(method="softcon"))
    with pytest.raises(ConfigError, match="scaling='reflectance' is Sentinel-2's"):
        read_encoder(save(s1_state, "moco.pth"), "s1", Facts(scaling="reflectance"))
    with pytest.raises(ConfigError, match=r"layout='mocco' is not known; choose auto, cromss-middle"):
        read_encoder(save(s2_state, "mine.pth"), "s2", Facts(layout="mocco"))
    told = Facts(method="softcon", scaling="statistics")
    card = read_encoder(save(s2_state, "mine.pth"), "s2", told)[1]
    assert (card.method, card.dataset, card.licence, card.patch_px) == ("softcon", "", "", 0)


def test_a_layout_that_was_named_is_the_only_one_tried(save: Save, s2_state: State, tmp_path: Path) -> None:
    both = look_alikes.moco(s2_state) | {"teacher": prefixed(s2_state, "backbone.")}
    assert read_encoder(save(both), "s2", Facts(layout="dino"))[1].method == "dino"
    with pytest.raises(PackageError, match="no encoder for s2 of decur"):
        read_encoder(save(both), "s2", Facts(layout="decur"))


def test_the_other_modality_is_no_encoder_of_this_one(save: Save, s1_state: State, s2_state: State, tmp_path: Path) -> None:
    with pytest.raises(BandError, match="takes 13 channels; moco checkpoints for s1 have 2"):
        read_encoder(save(look_alikes.moco(s2_state)), "s1")
    swapped = save(look_alikes.cromss("middle", s2_state, s1_state))
    with pytest.raises(BandError, match="takes 2 channels"):
        read_encoder(swapped, "s2")


def test_a_file_named_by_its_hash_has_it(save: Save, s2_state: State, tmp_path: Path) -> None:
    path = save(s2_state, "moco.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = path.rename(tmp_path / f"resnet50_sentinel2_all_moco-{digest[:8]}.pth")
    assert read_encoder(named, "s2")[1].origin["sha256"] == digest
    other = named.rename(tmp_path / "resnet50_sentinel2_all_moco-df8b932e.pth")
    with pytest.raises(PackageError, match="begins with df8b932e"):
        read_encoder(other, "s2")


@pytest.mark.parametrize("path", ["missing.pth", "."])
def test_what_is_no_file_is_told(path: str, tmp_path: Path) -> None:
    with pytest.raises(CromssError, match="is no file"):
        read_encoder(tmp_path / path, "s2")

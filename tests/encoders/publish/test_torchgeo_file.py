"""The weights file: its name, what `torch.load`, `torch.hub` and TorchGeo make of it, and the JSON beside it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cromss_dist.encoders.publish.torchgeo_file import model_slug, timm_key, write_weights_file
from cromss_dist.models.encoder import build_encoder
from tests.conftest import MakeCard


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return build_encoder("resnet18", 3, 13).state_dict()


def test_the_name_says_architecture_sensor_bands_and_method_and_ends_with_the_hash_of_the_file(
    make_card: MakeCard, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_weights_file(tmp_path, make_card(), state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"resnet18_sentinel2_13b_cromss-{digest[:8]}.pth"


def test_torch_hub_takes_the_file_for_what_its_name_says_and_refuses_it_after_one_byte_has_changed(
    make_card: MakeCard, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_weights_file(tmp_path, make_card(), state)
    options: dict[str, Any] = {"check_hash": True, "weights_only": True, "progress": False, "map_location": "cpu"}
    loaded = torch.hub.load_state_dict_from_url(path.as_uri(), model_dir=str(tmp_path / "a"), **options)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="invalid hash value"):
        torch.hub.load_state_dict_from_url(path.as_uri(), model_dir=str(tmp_path / "b"), **options)


def test_equal_weights_give_equal_bytes_in_whatever_order_and_memory_they_come(
    make_card: MakeCard, state: dict[str, Tensor], tmp_path: Path
) -> None:
    flat = torch.cat([tensor.float().flatten() for tensor in state.values()])
    shared, start = {}, 0
    for key, tensor in state.items():
        part = flat[start : start + tensor.numel()].view(tensor.shape)
        shared[key] = part if tensor.is_floating_point() else tensor
        start += tensor.numel()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_weights_file(tmp_path / "a", make_card(), state)
    second = write_weights_file(tmp_path / "b", make_card(), dict(reversed(shared.items())))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_the_json_beside_it_says_what_goes_in(make_card: MakeCard, state: dict[str, Tensor], tmp_path: Path) -> None:
    card = make_card()
    path = write_weights_file(tmp_path, card, state)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["file"] == path.name
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tuple(about["bands"]) == card.bands
    assert about["in_chans"] == 13
    assert tuple(about["normalisation"]["mean"]) == card.normalisation.mean
    assert about["normalisation"]["rule"] == card.normalisation.rule


@pytest.mark.parametrize(
    ("encoder", "method", "slug"),
    [
        ("resnet50", "cromss", "resnet50_sentinel1_2b_cromss"),
        ("tu-convnext_tiny.fb_in1k", "MoCo v2", "convnext_tiny_fb_in1k_sentinel1_2b_moco_v2"),
        ("mit_b0", "../../x-abc.", "mit_b0_sentinel1_2b_x_abc"),  # no path, and no second hyphen for torch.hub to find
    ],
)
def test_a_name_has_nothing_but_letters_digits_and_underscores(make_card: MakeCard, encoder: str, method: str, slug: str) -> None:
    assert model_slug(replace(make_card(modality="s1"), encoder=encoder, method=method)) == slug


def test_weights_have_timm_s_names() -> None:
    assert timm_key("tu-resnet34", "model.conv1.weight") == "conv1.weight"
    assert timm_key("resnet34", "conv1.weight") == "conv1.weight"

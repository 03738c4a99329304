import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from cromss_dist.encoders.bridges.plain import NAMES, Names, describe, write_state_dict
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.errors import ConfigError, OutputExistsError
from cromss_dist.models.encoder import build_encoder
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import check_package
from tests.encoders.bridges.clean import SAVE, TORCHVISION, Reference, run_clean

# What a user without this package writes: the weights file of a package, and the library.
OF_LIBRARY = {
    "torchvision": """
        import torchvision
        from torchvision.models.feature_extraction import create_feature_extractor
        model = torchvision.models.resnet18()
        model.conv1 = torch.nn.Conv2d(13, 64, 7, 2, 3, bias=False)
        missing, unknown = model.load_state_dict(load_file(sys.argv[1]), strict=False)
        assert (missing, unknown) == (["fc.weight", "fc.bias"], []), (missing, unknown)
        nodes = {"relu": "0", "layer1": "1", "layer2": "2", "layer3": "3", "layer4": "4"}
        save(create_feature_extractor(model.eval(), nodes)(image()).values())
    """,
    "timm": """
        import timm
        model = timm.create_model("resnet18", features_only=True, in_chans=13)
        model.load_state_dict(load_file(sys.argv[1]), strict=True)
        save(model.eval()(image()))
    """,
    "segmentation_models_pytorch": """
        from segmentation_models_pytorch.encoders import get_encoder
        model = get_encoder("resnet18", in_channels=13, depth=5, weights=None)
        model.load_state_dict(load_file(sys.argv[1]), strict=True)
        save(model.eval()(image())[1:])
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("library", OF_LIBRARY)
def test_the_weights_of_a_package_load_in_a_library_alone(
    library: str, package: Path, reference: Reference, tmp_path: Path
) -> None:
    imports = TORCHVISION + SAVE + "from safetensors.torch import load_file\n"
    alone = "\nassert not [m for m in sys.modules if m.startswith(('cromss_dist.encoders', 'cromss_dist.tracking'))]\n"
    run_clean(
        imports + dedent(OF_LIBRARY[library]) + alone,
        package / "encoder.safetensors",
        reference.image_file,
        tmp_path / "maps.npz",
    )
    assert reference.equals(tmp_path / "maps.npz")


@pytest.mark.parametrize("names", NAMES)
def test_a_written_file_has_the_tensors_and_says_what_they_take(names: Names, encoder: PretrainedEncoder, tmp_path: Path) -> None:
    path = write_state_dict(encoder, tmp_path / "new" / "encoder.safetensors", names)
    tensors = load_file(path)
    own = encoder.encoder.state_dict()  # a ResNet: the same names in all three
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensor, own[key]) for key, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata == describe(encoder)
    assert metadata["bands"].split(",") == list(encoder.bands)
    assert json.loads(metadata["normalisation"])["mean"] == list(encoder.card.normalisation.mean)
    assert "H and W multiples of 32" in metadata["input"]
    assert json.loads(metadata["card"])["encoder"] == "resnet18"


def test_names_of_timm_are_timms_where_they_differ(make_card: Callable[..., EncoderCard], tmp_path: Path) -> None:
    package_encoder(tmp_path / "s1", build_encoder("tu-resnet18", 3, 2), make_card("tu-resnet18", 3, "s1"))
    encoder = load_encoder(tmp_path / "s1")
    tensors = load_file(write_state_dict(encoder, tmp_path / "timm.safetensors", "timm"))
    assert "conv1.weight" in tensors
    assert "model.conv1.weight" in encoder.encoder.state_dict()


def test_a_file_that_is_there_is_kept(encoder: PretrainedEncoder, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        write_state_dict(encoder, path)
    assert path.read_text() == "mine"


def test_a_file_in_a_package_is_refused_and_the_package_stays_whole(encoder: PretrainedEncoder, package: Path) -> None:
    for path in (package / "encoder.onnx", package / "new" / "encoder.onnx"):
        with pytest.raises(ConfigError, match=r"lies in the encoder package .* choose another place"):
            write_state_dict(encoder, path)
    check_package(package)


def test_names_that_an_encoder_has_not_are_refused_and_leave_nothing(encoder_package: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'resnet18' of depth 3 has no twin in torchvision"):
        write_state_dict(load_encoder(encoder_package), tmp_path / "a", "torchvision")
    assert not list(tmp_path.iterdir())

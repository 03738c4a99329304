import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cromss_dist
from cromss_dist.config import ModelConfig
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.encoders.load import load_encoder
from cromss_dist.errors import BandError, ConfigError, PackageError, RegistryError
from cromss_dist.models.encoder import stage_features
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.schema import S2_BANDS, S2_NORMALISATION
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import read_package, write_package
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import connect

NAME = "cromss-resnet18-s2"
MakeCard = Callable[..., EncoderCard]
IMAGES = torch.rand(2, 13, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def registered(store_uri: str, encoder_package: Path) -> str:
    """The URI of a store with one registered encoder."""
    Registry(store_uri).register(encoder_package, NAME, connect(store_uri).create_run("0").info.run_id)
    return store_uri


def test_features_are_bit_equal_from_the_trained_model_to_every_form(store_uri: str, tmp_path: Path, make_card: MakeCard) -> None:
    model = TwoBranchUNet(ModelConfig("middle", "resnet18", 3, (16, 8, 8)), 2, 13)
    model(torch.rand(2, 2, 64, 64), IMAGES)  # in training mode: moves the statistics of BatchNorm, which must travel, too
    model.eval()
    package_encoder(tmp_path / "s2", model.encoders["s2"], make_card())
    Registry(store_uri).register(tmp_path / "s2", NAME, connect(store_uri).create_run("0").info.run_id)
    from_folder = load_encoder(tmp_path / "s2").eval()
    from_registry = load_encoder(f"models:/{NAME}@candidate", tracking_uri=store_uri).eval()
    with torch.no_grad():
        expected = stage_features(model.encoders["s2"], IMAGES)
        forms = {
            "folder": from_folder(IMAGES),
            "registry": from_registry(IMAGES),
            "timm": from_registry.to_timm().eval()(IMAGES),
            "smp": stage_features(
                from_registry.to_smp("Unet", 4, decoder_channels=(8, 8, 8)).eval().get_submodule("encoder"), IMAGES
            ),
        }
    for form, maps in forms.items():
        assert len(maps) == len(expected) == 3, form
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True)), form


def test_the_package_exposes_load_encoder_and_a_version(encoder_package: Path) -> None:
    assert cromss_dist.load_encoder is load_encoder
    assert cromss_dist.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cromss_dist.nothing  # noqa: B018
    assert cromss_dist.load_encoder(str(encoder_package), bands=list(S2_BANDS)).bands == S2_BANDS


def test_a_fetched_encoder_is_kept_in_the_cache(registered: str, tmp_path: Path) -> None:
    first = load_encoder(f"{NAME}@candidate", tracking_uri=registered, cache=tmp_path / "kept")
    (folder,) = (tmp_path / "kept" / NAME).iterdir()
    assert folder.name.startswith("1-")
    second = load_encoder(f"{NAME}/1", tracking_uri=registered, cache=tmp_path / "kept")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert list((tmp_path / "kept" / NAME).iterdir()) == [folder]


@pytest.mark.parametrize("shape", [(2, 9, 64, 64), (13, 64, 64)])
def test_an_input_of_another_shape_is_refused_with_the_bands(encoder_package: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(BandError, match=r"give \(batch, 13, H, W\) with s2 bands B1, B2"):
        load_encoder(encoder_package)(torch.zeros(shape))


def test_normalising_is_what_made_the_training_images(encoder_package: Path) -> None:
    encoder = load_encoder(encoder_package)
    values = np.random.default_rng(0).uniform(0, 10_000, (2, 13, 8, 8)).astype(np.float32)
    values[0, 0, 0, 0] = np.nan
    expected = torch.from_numpy(S2_NORMALISATION.to_uint8(values, S2_BANDS)).to(torch.float32) / 255
    got = encoder.normalise(values)
    assert torch.equal(encoder.normalise(torch.from_numpy(values)), got)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    # By hand, B1 (mean 1605.575, std 786.787): the mean lies half-way, at 127.5, which truncates to 127.
    assert encoder.normalise(np.full((13, 1, 1), 1605.57504906, np.float32))[0, 0, 0] == torch.tensor(127.0) / 255
    with pytest.raises(BandError, match=r"give .* 13, H, W"):
        encoder.normalise(values[:, :9])


def test_weights_that_do_not_fit_their_card_are_refused(tmp_path: Path, encoder_package: Path, make_card: MakeCard) -> None:
    package = read_package(encoder_package)
    write_package(tmp_path / "deeper", replace(package, card=make_card(depth=4)))
    with pytest.raises(PackageError, match=r"missing \['layer3"):
        load_encoder(tmp_path / "deeper")


def test_an_encoder_trains(encoder_package: Path) -> None:
    encoder = load_encoder(encoder_package)
    sum(feature.sum() for feature in encoder(IMAGES)).backward()
    assert encoder.training
    assert all(p.grad is not None for p in encoder.parameters())


def test_what_cannot_be_found_is_said_plainly(registered: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=f"No model 'nobody'.*{NAME}"):
        load_encoder("nobody@candidate", tracking_uri=registered)
    with pytest.raises(RegistryError, match="No MLflow store at"):
        load_encoder(f"{NAME}@candidate", tracking_uri=f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(PackageError, match="is not a folder"):
        load_encoder(tmp_path / "none")
    with pytest.raises(RegistryError, match="neither a package folder nor a reference"):
        load_encoder("runs/a/encoders/s2", tracking_uri=f"sqlite:///{tmp_path / 'none.db'}")


def test_an_encoder_name_that_smp_lacks_is_refused(tmp_path: Path, encoder_package: Path) -> None:
    package = read_package(encoder_package)
    write_package(tmp_path / "odd", replace(package, card=replace(package.card, encoder="resnet17")))
    with pytest.raises(ConfigError, match="resnet18"):
        load_encoder(tmp_path / "odd")


def test_a_package_can_be_moved(encoder_package: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder_package, tmp_path / "moved")
    assert load_encoder(tmp_path / "moved").card == load_encoder(encoder_package).card

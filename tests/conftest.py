"""Fixtures that several parts share: a ready MLflow store and small encoder packages."""

import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.synthetic import SyntheticConfig, write_archive
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.models.encoder import build_encoder, stage_channels
from cromss_dist.schema import BANDS, NORMALISATION, Modality
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.store import initialise_store


def pytest_configure() -> None:
    """Ctrl-C as at a terminal: what a shell starts in its background ignores it, and so would what tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_store_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps every test away from stores and caches outside its own folder."""
    for name in ("CROMSS_TRACKING_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CROMSS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def template_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database; creating one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    initialise_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def store_uri(template_store: Path, tmp_path: Path) -> str:
    """The URI of a fresh, empty MLflow store."""
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copyfile(template_store, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


MakeCard = Callable[..., EncoderCard]


@cache
def _stages(encoder: str, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return stage_channels(build_encoder(encoder, depth, 3))


@pytest.fixture(scope="session")
def make_card() -> MakeCard:
    """Makes a card for an encoder of all bands of a modality."""

    def make(encoder: str = "resnet18", depth: int = 3, modality: Modality = "s2", run_id: str = "0" * 32) -> EncoderCard:
        bands = BANDS[modality]
        channels, strides = _stages(encoder, depth)
        return EncoderCard(
            modality=modality,
            bands=bands,
            normalisation=NORMALISATION[modality],
            encoder=encoder,
            depth=depth,
            in_channels=len(bands),
            out_channels=channels,
            strides=strides,
            method="cromss",
            fusion="middle",
            dataset="nol",
            patch_px=256,
            config_digest="c" * 64,
            manifest_digest="d" * 64,
            run_id=run_id,
            git_revision="e" * 40,
            versions={"torch": torch.__version__},
            metrics={"val/miou_s2": 0.5},
            licence="Apache-2.0",
            recipe={"loss.consistency": "ce"},
        )

    return make


@pytest.fixture(scope="session")
def encoder_package(tmp_path_factory: pytest.TempPathFactory, make_card: MakeCard) -> Path:
    """The package of a random resnet18 of depth 3 on all Sentinel-2 bands. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("packages") / "s2"
    package_encoder(folder, build_encoder("resnet18", 3, 13), make_card())
    return folder


@pytest.fixture(scope="session")
def synthetic_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic locations of 96 px, two of each kind of place. Read only."""
    out = tmp_path_factory.mktemp("synthetic") / "archive"
    write_archive(out, SyntheticConfig(num_locations=12, seed=1, size_px=96))
    return out


@pytest.fixture(scope="session")
def synthetic_shards(synthetic_archive: Path) -> Path:
    """The shards of `synthetic_archive`. Read only."""
    return convert(open_archive(synthetic_archive), synthetic_archive.with_name("shards")).folder

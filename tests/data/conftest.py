"""Archives and shards for the tests of the data folder."""

import shutil
from pathlib import Path

import pytest

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from tests.data.tiny_archive import KEYS, write_archive


@pytest.fixture(scope="session")
def archive_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("template") / "archive")


@pytest.fixture(scope="session")
def shards_template(archive_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three locations in two shards."""
    out = tmp_path_factory.mktemp("template") / "shards"
    return convert(open_archive(archive_template), out, shard_size_mib=0.3).folder


@pytest.fixture
def archive_root(archive_template: Path, tmp_path: Path) -> Path:
    """Three locations of 48 px with reference labels and noise kinds, to be damaged at will."""
    return Path(shutil.copytree(archive_template, tmp_path / "archive"))


@pytest.fixture
def shards(shards_template: Path, tmp_path: Path) -> Path:
    """The three locations in two shards, to be damaged at will."""
    return Path(shutil.copytree(shards_template, tmp_path / "shards"))


@pytest.fixture
def uint8_archive(tmp_path: Path) -> Path:
    """One location that holds uint8 already."""
    return write_archive(tmp_path / "uint8", KEYS[:1], as_uint8=True)


@pytest.fixture(scope="session")
def mini_archive() -> Path:
    """Six real locations of 264 px."""
    root = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "noldo_real_mini"
    if not root.is_dir():
        pytest.skip("shared/data/noldo_real_mini is not beside the repository")
    return root

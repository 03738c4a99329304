"""The published folder: what is in it, that it is the same each time, whole or absent, and that its own code runs."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cromss_dist.encoders.golden import package_encoder
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.publish.folder import publish
from cromss_dist.errors import ConfigError, OutputExistsError, PackageError
from cromss_dist.models.encoder import build_encoder
from cromss_dist.tracking.package.evidence import Evidence
from tests.conftest import MakeCard

_HERE = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def published(encoder_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder_package`, published. Read only."""
    return publish(encoder_package, tmp_path_factory.mktemp("published") / "encoder", hub_id="my-group/my-encoder")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_folder_holds_the_package_as_it_is_a_model_card_a_stac_item_and_a_weights_file(
    published: Path, encoder_package: Path
) -> None:
    files = contents(published)
    package = {name.removeprefix("package/"): content for name, content in files.items() if name.startswith("package/")}
    assert package == contents(encoder_package)
    others = sorted(name for name in files if not name.startswith("package/"))
    assert others[:1] == ["README.md"]
    assert others[-1:] == ["stac_item.json"]
    assert [Path(name).suffix for name in others[1:-1]] == [".json", ".pth"]


def test_load_encoder_takes_a_published_folder(published: Path, encoder_package: Path) -> None:
    own, original = load_encoder(published).eval(), load_encoder(encoder_package).eval()
    x = torch.rand(1, 13, 64, 64, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(own(x), original(x), strict=True))


def test_publishing_twice_gives_the_same_bytes(published: Path, encoder_package: Path, tmp_path: Path) -> None:
    assert contents(publish(encoder_package, tmp_path / "again", hub_id="my-group/my-encoder")) == contents(published)


def test_model_card_and_stac_item_name_every_file_with_its_hash(published: Path) -> None:
    files = contents(published)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    listed = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", (published / "README.md").read_text().replace("\\_", "_"), re.M))
    assert listed == {name: digest for name, digest in digests.items() if name not in ("README.md", "stac_item.json")}
    assets = json.loads(files["stac_item.json"])["assets"].values()
    stated = {asset["href"].removeprefix("./"): (asset["file:size"], asset["file:checksum"]) for asset in assets}
    # sha2-256 as a multihash: its code and its length in front
    assert stated == {n: (len(files[n]), f"1220{d}") for n, d in digests.items() if n != "stac_item.json"}


def test_the_weights_file_holds_the_package_s_weights(published: Path, encoder_package: Path) -> None:
    (path,) = published.glob("*.pth")
    state, own = torch.load(path, weights_only=True), load_encoder(encoder_package).encoder.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key]) for key in own)


def test_the_code_of_the_model_card_runs_in_the_folder_and_scales_as_the_package_does(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    ours, plain, file = (run(code) for code in BLOCK.findall(Path("README.md").read_text()))
    values = np.random.default_rng(1).normal(1500, 1500, plain["values"].shape).astype(np.float32)
    x = ours["encoder"].normalise(values)
    mean, std = plain["mean"], plain["std"]
    assert torch.equal(x[0, :, 0, 0], torch.from_numpy(scaled_by(plain, values)[0, :, 0, 0]))
    assert mean.shape == std.shape == (13, 1, 1)
    for own, other in zip(ours["encoder"](x), plain["features"](x), strict=True):
        assert torch.equal(own, other)
    assert file["state"].keys() == ours["encoder"].encoder.state_dict().keys()


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def scaled_by(names: dict[str, Any], values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The block's own line of scaling, on other values."""
    (line,) = [line for line in BLOCK.findall(Path("README.md").read_text())[1].splitlines() if line.startswith("u8 = ")]
    scaled: dict[str, Any] = {}
    exec(line, names | {"values": values}, scaled)
    u8: npt.NDArray[np.uint8] = scaled["u8"]
    return u8.astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("hub_id", ["encoder", "a/b/c", "../x", "a b/c", "a/b.", "a--b/c", "a/b\n", "a/" + "b" * 95])
def test_a_name_that_no_hub_takes_is_refused_before_anything_is_written(
    encoder_package: Path, tmp_path: Path, hub_id: str
) -> None:
    with pytest.raises(ConfigError, match="give organisation/name"):
        publish(encoder_package, tmp_path / "out", hub_id=hub_id)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(encoder_package: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="never overwritten"):
        publish(encoder_package, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="lies in the encoder package"):
        publish(encoder_package, encoder_package / "published")


def _cut(package: Path) -> None:
    (package / "golden.safetensors").unlink()


def _turn(package: Path) -> None:
    content = bytearray((package / "encoder.safetensors").read_bytes())
    content[-1] ^= 1
    (package / "encoder.safetensors").write_bytes(content)


def _add(package: Path) -> None:
    (package / "load.py").write_text("import os")


@pytest.mark.parametrize("spoil", [_cut, _turn, _add])
def test_nothing_appears_of_a_package_that_is_not_whole(
    encoder_package: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    package = tmp_path / "package"
    shutil.copytree(encoder_package, package)
    spoil(package)
    with pytest.raises(PackageError):
        publish(package, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_nothing_appears_where_the_weights_compute_something_else(
    encoder_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(*_: object) -> None:
        raise PackageError("golden")

    monkeypatch.setattr("cromss_dist.encoders.pretrained.check_golden", another)
    with pytest.raises(PackageError, match="golden"):
        publish(encoder_package, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_newer_evidence_replaces_that_of_the_card_key_by_key(make_card: MakeCard, tmp_path: Path) -> None:
    older = Evidence("dw", "miou", "frozen", 0.5, 0.4, 0.6, source="run-1")
    newer = Evidence("dw", "miou", "frozen", 0.7, 0.6, 0.8, source="run-2")
    kept = Evidence("osm", "oa", "linear", 0.3, 0.2, 0.4, source="run-3")
    package_encoder(tmp_path / "package", build_encoder("resnet18", 3, 13), replace(make_card(), evidence=(older, kept)))
    text = (publish(tmp_path / "package", tmp_path / "out", evidence=[newer]) / "README.md").read_text()
    assert "| dw | frozen | miou | 0.7000 | 0.6000 to 0.8000 (95%) | not known | not known | run-2 |" in text
    assert "| osm | linear | oa | 0.3000" in text
    assert "run-1" not in text


@pytest.mark.slow
def test_the_weights_file_of_a_whole_resnet_goes_into_torchgeo_s_model_by_the_code_of_the_model_card(
    make_card: MakeCard, tmp_path: Path
) -> None:
    package_encoder(tmp_path / "package", build_encoder("resnet18", 5, 13), make_card(depth=5))
    folder = publish(tmp_path / "package", tmp_path / "out")
    blocks = BLOCK.findall((folder / "README.md").read_text())
    assert "from torchgeo.models import resnet18" in blocks[2]
    # timm's `forward_features` ends with the last map.
    code = f"""{blocks[0]}{blocks[2]}
x = torch.rand(1, 13, 64, 64, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    assert torch.equal(model.eval().forward_features(x), encoder(x)[-1])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=_HERE, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr

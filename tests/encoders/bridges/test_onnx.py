import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from cromss_dist.encoders.bridges import onnx as bridge
from cromss_dist.encoders.bridges.onnx import export_onnx
from cromss_dist.encoders.bridges.plain import describe
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.errors import ConfigError, OutputExistsError, PackageError
from cromss_dist.models.encoder import build_encoder
from cromss_dist.tracking.package.card import EncoderCard
from tests.encoders.bridges.clean import run_clean

OF_A_USER = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
assert about["bands"].split(",")[:2] == ["B1", "B2"], about
maps = session.run(None, {"image": numpy.load(sys.argv[2])})
numpy.savez(sys.argv[3], **{output.name: map_ for output, map_ in zip(session.get_outputs(), maps)})
assert "torch" not in sys.modules and "cromss_dist" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(encoder_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file of a resnet18 of depth 3, exported from an encoder in training mode."""
    return export_onnx(load_encoder(encoder_package), tmp_path_factory.mktemp("onnx") / "new" / "encoder.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 13, 16, 40), (3, 13, 64, 8)])
def test_another_process_gets_the_features_without_torch_at_any_size(
    shape: tuple[int, ...], exported: Path, encoder_package: Path, tmp_path: Path
) -> None:
    image = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "image.npy", image.numpy())
    run_clean(OF_A_USER, exported, tmp_path / "image.npy", tmp_path / "maps.npz")
    with torch.no_grad():
        wanted = load_encoder(encoder_package).eval()(image)
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as maps:
        assert list(maps) == ["stride_2", "stride_4", "stride_8"]
        for ours, theirs in zip(wanted, maps.values(), strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.slow
def test_the_file_is_valid_and_says_what_it_takes(exported: Path, encoder_package: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert not [t for t in model.graph.initializer if t.external_data]
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["image"] == ["batch", 13, "height", "width"]
    assert shapes["stride_8"] == ["batch", 128, "height/8", "width/8"]
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about == describe(load_encoder(encoder_package))
    assert json.loads(about["normalisation"])["bands"] == about["bands"].split(",")


def test_exporting_does_not_change_the_encoder(encoder_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = load_encoder(encoder_package)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    monkeypatch.setattr(bridge, "_exported", lambda maps, encoder: (maps.encoder.requires_grad_(False), b"")[1])
    monkeypatch.setattr(bridge, "_check", lambda *_: None)
    export_onnx(encoder, tmp_path / "a.onnx")
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


class Doubled(nn.Module):
    """An encoder whose features are not those of the file."""

    def __init__(self, encoder: PretrainedEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(1.001 * map_ for map_ in self.encoder(image))


@pytest.mark.slow
def test_a_file_whose_features_differ_is_not_written(
    exported: Path, encoder_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bridge, "_exported", lambda *_: exported.read_bytes())
    export_onnx(load_encoder(encoder_package), tmp_path / "same.onnx")
    monkeypatch.setattr(bridge, "_Maps", Doubled)
    with pytest.raises(PackageError, match=r"other features than the encoder at stride 2.*nothing was written"):
        export_onnx(load_encoder(encoder_package), tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_what_prevents_an_export_is_said(encoder_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = load_encoder(encoder_package)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        export_onnx(encoder, tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"^onnxscript not found.*pip install 'cromss-dist\[onnx\]'"):
        export_onnx(encoder, tmp_path / "a.onnx")


def test_an_encoder_that_onnx_cannot_hold_is_refused_with_the_reason(
    encoder_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("a page\nfor developers") from NotImplementedError("aten::odd has no twin.")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ConfigError, match=r"'resnet18' cannot be written as ONNX: aten::odd has no twin\. Use another route"):
        export_onnx(load_encoder(encoder_package), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tu-convnext_atto", "efficientnet-b0", "resnet50"])
def test_other_families_can_be_exported(name: str, make_card: Callable[..., EncoderCard], tmp_path: Path) -> None:
    package_encoder(tmp_path / "s1", build_encoder(name, 4, 2), make_card(name, 4, "s1"))
    export_onnx(load_encoder(tmp_path / "s1"), tmp_path / "encoder.onnx")  # which compares before it writes

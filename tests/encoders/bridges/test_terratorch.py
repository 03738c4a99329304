import sys
from pathlib import Path

import pytest
import torch

from cromss_dist.encoders.bridges.terratorch import TERRATORCH_BANDS, cromss_encoder, register
from cromss_dist.errors import BandError, ConfigError
from cromss_dist.schema import S2_BANDS
from tests.encoders.bridges.clean import SAVE, TORCHVISION, Reference, run_clean

CUSTOM_MODULES = TORCHVISION + "from cromss_dist.encoders.bridges.terratorch import register\nregister()\n"
OF_A_USER = (
    TORCHVISION
    + SAVE
    + """
from terratorch.datasets import OpticalBands
from terratorch.registry import BACKBONE_REGISTRY
from terratorch.tasks import SemanticSegmentationTask

from cromss_dist.encoders.bridges.terratorch import TERRATORCH_BANDS
known = {band.value for band in OpticalBands}
assert known - {"THERMAL_INFRARED_1", "THERMAL_INFRARED_2"} == TERRATORCH_BANDS.keys()

backbone = BACKBONE_REGISTRY.build("cromss_encoder", ref=sys.argv[1], bands=[OpticalBands(name) for name in TERRATORCH_BANDS])
assert backbone.out_channels == [64, 64, 128, 256, 512], backbone.out_channels
save(backbone.eval()(image()))

torch.manual_seed(0)
task = SemanticSegmentationTask(
    model_factory="EncoderDecoderFactory",
    model_args={
        "backbone": "cromss_encoder", "backbone_ref": sys.argv[1], "backbone_pretrained": True,
        "backbone_out_indices": [1, 2, 3, -1], "decoder": "UNetDecoder", "decoder_channels": [32, 16, 8, 8], "num_classes": 4,
    },
    loss="ce", ignore_index=255, lr=1e-3, optimizer="Adam",
)
optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-3)
images, labels = image(), torch.randint(0, 4, (2, 64, 64))
before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
losses = []
for _ in range(3):
    loss = torch.nn.functional.cross_entropy(task.model(images).output, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert all(not torch.equal(p, before[name]) for name, p in task.model.named_parameters() if name.startswith("encoder."))
"""
)


@pytest.mark.slow
def test_a_backbone_of_terratorchs_registry_has_the_features_and_trains(
    package: Path, reference: Reference, tmp_path: Path
) -> None:
    (tmp_path / "custom_modules").mkdir()
    (tmp_path / "custom_modules" / "__init__.py").write_text(CUSTOM_MODULES)
    run_clean(OF_A_USER, package, reference.image_file, tmp_path / "maps.npz", cwd=tmp_path)
    assert reference.equals(tmp_path / "maps.npz")


def test_stages_are_chosen_by_index(encoder_package: Path) -> None:
    image = torch.rand(1, 13, 64, 64)
    whole = cromss_encoder(str(encoder_package)).eval()
    part = cromss_encoder(str(encoder_package), out_indices=[1, -1]).eval()
    assert (whole.out_channels, part.out_channels) == ([64, 64, 128], [64, 128])
    with torch.no_grad():
        maps = whole(image)
        assert all(torch.equal(a, b) for a, b in zip(part(image, image_size=(64, 64)), (maps[1], maps[2]), strict=True))
    with pytest.raises(ConfigError, match=r"out_indices=\[3\]: the encoder has 3 stages; give 0 to 2"):
        cromss_encoder(str(encoder_package), out_indices=[3])


def test_bands_are_taken_by_either_name(encoder_package: Path) -> None:
    assert tuple(TERRATORCH_BANDS.values()) == S2_BANDS
    assert cromss_encoder(str(encoder_package), bands=list(TERRATORCH_BANDS)).encoder.bands == S2_BANDS
    assert cromss_encoder(str(encoder_package), bands=["RED", "B3"]).encoder.bands == ("B4", "B3")
    with pytest.raises(BandError, match="THERMAL"):
        cromss_encoder(str(encoder_package), bands=["RED", "THERMAL_INFRARED_1"])


def test_an_untrained_one_and_a_missing_library_are_refused(encoder_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="backbone_pretrained=false"):
        cromss_encoder(str(encoder_package), pretrained=False)
    monkeypatch.setitem(sys.modules, "terratorch", None)
    with pytest.raises(ConfigError, match=r"terratorch not found.*pip install 'cromss-dist\[terratorch\]'"):
        register()

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cromss_dist.encoders.golden import TOLERANCE, check_golden, golden_features, golden_patch, package_encoder
from cromss_dist.encoders.load import load_encoder
from cromss_dist.encoders.pretrained import PretrainedEncoder, verify_package
from cromss_dist.errors import PackageError
from cromss_dist.models.encoder import build_encoder, stage_features
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import Package, read_package, write_package

MakeCard = Callable[..., EncoderCard]


@pytest.fixture(scope="module")
def package(encoder_package: Path) -> Package:
    """Read once; its tensors are never changed in place."""
    return read_package(encoder_package)


def test_the_golden_patch_is_what_its_formula_says() -> None:
    patch = golden_patch(3)
    assert (patch.dtype, patch.shape) == (torch.uint8, (1, 3, 64, 64))
    # (c + 1) (31 y + 17 x) + x y, by hand.
    assert [int(patch[0, c, y, x]) for c, y, x in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 1), (1, 2, 3), (0, 63, 63))] == [
        0,
        31,
        17,
        51,
        2 * (62 + 51) + 6,
        (48 * 63 + 63 * 63) % 256,
    ]
    bands = golden_patch(13)[0].flatten(1)
    assert len({tuple(band.tolist()) for band in bands}) == 13, "no two bands are alike, so that a swap shows"


def test_a_package_holds_what_its_encoder_computes_in_evaluation_mode(package: Package) -> None:
    encoder = build_encoder("resnet18", 3, 13)
    encoder.load_state_dict(package.weights)
    with torch.no_grad():
        expected = stage_features(encoder.eval(), golden_patch(13).float() / 255)
    assert list(package.golden) == ["input", "stage_1", "stage_2", "stage_3"]
    assert all(torch.equal(package.golden[f"stage_{k}"], feature) for k, feature in enumerate(expected, 1))


def test_computing_golden_features_leaves_the_encoder_as_it_was_and_is_not_changed_by_mixed_precision() -> None:
    encoder = build_encoder("resnet18", 3, 13).train()
    encoder.get_submodule("bn1").eval()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    golden = golden_features(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        again = golden_features(encoder)
    assert all(torch.equal(golden[name], again[name]) for name in golden)
    assert encoder.training
    assert not encoder.get_submodule("bn1").training
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of flags() itself
def test_threads_and_kernels_change_features_by_a_tenth_of_what_is_allowed_at_most(package: Package) -> None:
    encoder = PretrainedEncoder.of(package).encoder
    threads = torch.get_num_threads()
    seen: list[dict[str, Tensor]] = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            seen.append(golden_features(encoder))
    finally:
        torch.set_num_threads(threads)
    with torch.backends.mkldnn.flags(enabled=False):
        seen.append(golden_features(encoder))
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen.append(golden_features(encoder))
    for features in seen:
        for name, stated in package.golden.items():
            difference = (features[name].float() - stated.float()).abs().max()
            assert difference <= 0.1 * TOLERANCE * stated.float().abs().max(), name


def test_a_change_of_any_tensor_of_the_weights_is_found(package: Package) -> None:
    encoder = PretrainedEncoder.of(package).encoder
    for key, tensor in encoder.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue  # counts batches, computes nothing
        tensor.mul_(1.1).add_(0.01)  # shares the encoder's memory
        with pytest.raises(PackageError, match="does not compute what it did"):
            check_golden(encoder, package.golden)
        tensor.copy_(package.weights[key])
    check_golden(encoder, package.golden)


def test_bands_in_another_order_are_found(package: Package) -> None:
    weight = package.weights["conv1.weight"][:, [1, 0, *range(2, 13)]]
    with pytest.raises(PackageError, match=r"stage_[123] differs by"):
        PretrainedEncoder.of(replace(package, weights=package.weights | {"conv1.weight": weight}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda golden: golden.pop("stage_3"), "golden features are"),
        (lambda golden: golden.update(stage_4=golden["stage_3"]), "golden features are"),
        (lambda golden: golden.update(stage_3=golden["stage_3"].double()), "stage_3 float64"),
        (lambda golden: golden.update(stage_3=golden["stage_3"][:, 1:]), "golden features are"),
        (lambda golden: golden.update(input=golden["input"].flip(1)), "golden patch is not the one"),
        (lambda golden: golden.update(stage_3=golden["stage_3"] * float("nan")), "not finite: stage_3"),
        (lambda golden: golden.update(stage_3=golden["stage_3"] + float("inf")), "not finite: stage_3"),
        (lambda golden: golden.update(stage_3=golden["stage_3"] * 0), "stage_3 differs by"),
        (lambda golden: golden.update(stage_1=golden["stage_1"] * 1.001), "stage_1 differs by"),
    ],
)
def test_a_forged_golden_patch_is_refused(
    package: Package, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    golden = dict(package.golden)
    change(golden)
    write_package(tmp_path / "forged", replace(package, golden=golden))  # with hashes that hold
    for load in (load_encoder, verify_package):
        with pytest.raises(PackageError, match=message):
            load(tmp_path / "forged")


@pytest.mark.slow
def test_an_encoder_with_a_map_before_its_first_stride_is_packaged_and_loaded(tmp_path: Path, make_card: MakeCard) -> None:
    encoder = build_encoder("tu-vgg11", 3, 13)
    assert encoder.out_channels[0] == 64  # type: ignore[index]  # a map at full resolution takes the input's place
    package_encoder(tmp_path / "vgg", encoder, make_card("tu-vgg11", 3))
    assert load_encoder(tmp_path / "vgg").card.out_channels == (128, 256, 512)


def test_an_encoder_that_is_not_its_cards_is_not_packaged(tmp_path: Path, make_card: MakeCard) -> None:
    encoder = build_encoder("resnet18", 3, 13)
    for card in (make_card(depth=4), make_card(modality="s1")):
        with pytest.raises(
            PackageError, match=r"card states bands, channels and strides .* the encoder has \(13, \(64, 64, 128\)"
        ):
            package_encoder(tmp_path / "package", encoder, card)
    assert not list(tmp_path.iterdir())


def test_an_encoder_whose_features_are_not_finite_is_not_packaged(tmp_path: Path, make_card: MakeCard) -> None:
    encoder = build_encoder("resnet18", 3, 13)
    torch.nn.init.constant_(encoder.get_parameter("layer2.0.conv1.weight"), float("nan"))
    with pytest.raises(PackageError, match="not finite: stage_3"):
        package_encoder(tmp_path / "package", encoder, make_card())
    assert not list(tmp_path.iterdir())


def test_a_whole_package_verifies_and_gives_its_card(encoder_package: Path, package: Package) -> None:
    assert verify_package(encoder_package) == package.card

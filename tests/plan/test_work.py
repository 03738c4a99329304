"""What is counted of networks, against hand counts, torch's own counter, and what a real pass keeps."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cromss_dist.config import DataConfig, EngineConfig, ModelConfig, RunConfig
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.plan.work import Networks, Operators, add_up
from cromss_dist.train.step.memory import saved_bytes

CONFIG = RunConfig(data=DataConfig(crop_px=64), model=ModelConfig(encoder="resnet18"))


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks.of(CONFIG, "fp32", many=False)


def test_a_convolution_is_counted_by_hand() -> None:
    layer, image = nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.rand(2, 3, 4, 4)
    with Operators() as operators:
        layer(image).sum().backward()
    work = add_up(operators.calls)
    multiplications = 2 * 8 * 16 * 3 * 9
    assert work["convolution"].flops == 2 * multiplications
    assert work["convolution"].bytes == 4 * (image.numel() + layer.weight.numel() + 2 * 8 * 16)
    assert work["convolution/backward"].flops == 2 * multiplications  # no gradient of the image is asked for


@pytest.mark.parametrize(("layer", "kind"), [(nn.Conv2d(4, 4, 1), "pointwise"), (nn.Conv2d(4, 4, 3, groups=4), "grouped")])
def test_convolutions_are_told_apart(layer: nn.Module, kind: str) -> None:
    image = torch.rand(1, 4, 8, 8)
    with Operators() as operators:
        layer(image)
    assert set(add_up(operators.calls)) == {kind}


def test_flops_are_those_of_torchs_counter_and_go_with_the_samples(networks: Networks) -> None:
    model = TwoBranchUNet(CONFIG.model, 2, 13)
    with FlopCounterMode(display=False) as counter:
        s1, s2 = model(torch.rand(2, 2, 64, 64), torch.rand(2, 13, 64, 64))
        (s1.sum() + s2.sum()).backward()
    assert networks.flops(2) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert networks.flops(20) == pytest.approx(10 * networks.flops(2))


@pytest.mark.parametrize("samples", [2, 5])
def test_activations_are_those_that_a_real_pass_keeps(networks: Networks, samples: int) -> None:
    model = TwoBranchUNet(CONFIG.model, 2, 13)
    real = saved_bytes(model, torch.rand(samples, 2, 64, 64), torch.rand(samples, 13, 64, 64))
    assert networks.activation_bytes(samples, recomputing=False) == real
    assert networks.activation_bytes(samples, recomputing=True) < real / 2


def test_weights_and_norms_are_those_of_the_model(networks: Networks) -> None:
    model = TwoBranchUNet(CONFIG.model, 2, 13)
    assert networks.parameters == model.parameter_counts().total
    # The shared decoder's norms are called once for each branch.
    of_encoders = [m.num_features for m in model.encoders.modules() if isinstance(m, nn.BatchNorm2d)]
    of_decoder = [m.num_features for m in model.decoders.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(networks.norm_channels) == sorted([*of_encoders, *of_decoder, *of_decoder])


def test_global_batch_norms_do_more_than_local_ones(networks: Networks) -> None:
    shared = Networks.of(CONFIG, "fp32", many=True)
    local = Networks.of(
        RunConfig(data=CONFIG.data, model=CONFIG.model, engine=EngineConfig(batch_norm="local")), "fp32", many=True
    )
    assert local.forward == networks.forward
    operators = [sum(amount.operators for amount in one.forward_of(2).values()) for one in (networks, shared)]
    assert operators[1] > operators[0]
    assert shared.flops(2) == networks.flops(2)


def test_half_precision_moves_about_half_and_keeps_a_copy_of_the_weights(networks: Networks) -> None:
    half = Networks.of(CONFIG, "bf16", many=False)
    moved = [sum(amount.bytes for amount in one.forward_of(8).values()) for one in (networks, half)]
    assert moved[1] / moved[0] == pytest.approx(0.5, abs=0.02)
    grown = [one.activation_bytes(9, False) - one.activation_bytes(8, False) for one in (networks, half)]
    assert grown[1] / grown[0] == pytest.approx(0.5, abs=0.1)

"""The oracle is torch's own batch norm that sees the whole batch in one process."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from cromss_dist.errors import ConfigError
from cromss_dist.models.batch_norm import GlobalBatchNorm2d, frozen_statistics, globalise_batch_norms
from cromss_dist.world import World
from tests.ranks import run_ranks

CHANNELS = 5


def make(kind: str) -> nn.Sequential:
    """One batch norm used twice a step, as those of a decoder are that two branches share."""
    torch.manual_seed(1)
    norm: nn.BatchNorm2d
    match kind:
        case "plain":
            norm = nn.BatchNorm2d(CHANNELS)
        case "with activation":
            norm = BatchNormAct2d(CHANNELS, act_layer=nn.SiLU)
        case "cumulative":
            norm = nn.BatchNorm2d(CHANNELS, momentum=None)
        case _:
            norm = nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return nn.Sequential(norm, nn.Tanh(), norm)


KINDS = ("plain", "with activation", "cumulative", "bare")


def step(model: nn.Module, x: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """A training step whose loss is linear in the output; and the output of evaluation after it."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(slope)
    assert x.grad is not None
    grads = {f"sum {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    state = {f"same {name}": buffer for name, buffer in model.named_buffers()}
    evaluated = {"eval": model.eval()(x).detach()} if state else {}  # without statistics, evaluation is by batch
    return {"y": y.detach(), "dx": x.grad, **evaluated, **grads, **state}


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scale = torch.tensor([0.1, 1, 10, 1, 1]).view(1, CHANNELS, 1, 1)
    offset = torch.tensor([0.0, 5, -5, 1, 0]).view(1, CHANNELS, 1, 1)
    x = torch.randn(8, CHANNELS, 6, 7, generator=generator) * scale + offset
    return x.to(dtype), torch.randn(x.shape, generator=generator).to(dtype)


def one_rank(world: World, folder: Path) -> None:
    x, slope = (part.chunk(world.size)[world.rank] for part in batch())
    for kind in KINDS:
        for name, layout in (("rows", torch.contiguous_format), ("channels last", torch.channels_last)):
            model = make(kind)
            globalise_batch_norms(model, world.reduce_sum, world.size)
            results = step(model, x.contiguous(memory_format=layout), slope.contiguous(memory_format=layout))
            assert results["y"].is_contiguous(memory_format=layout)
            assert results["dx"].is_contiguous(memory_format=layout)
            results = {key: value.contiguous() for key, value in results.items()}
            save_file(results, folder / f"{kind} {name} {world.rank}.safetensors")


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_outputs_gradients_and_statistics_of_one_batch(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(one_rank, world_size, tmp_path) == [0] * world_size
    for kind in KINDS:
        expected = step(make(kind).double(), *batch(torch.float64))
        for layout in ("rows", "channels last"):
            ranks = [load_file(tmp_path / f"{kind} {layout} {rank}.safetensors") for rank in range(world_size)]
            for key, value in expected.items():
                parts = [rank[key].double() for rank in ranks]
                if key.startswith("same "):
                    assert all(torch.equal(part, parts[0]) for part in parts)
                    joined = parts[0]
                else:
                    joined = torch.stack(parts).sum(0) if key.startswith("sum ") else torch.cat(parts)
                # Gradients of parameters are float32 sums over pixels of numbers that cancel.
                tolerance = 4e-6 if key.startswith("sum ") else 1e-6
                torch.testing.assert_close(joined, value.double(), rtol=1e-6, atol=tolerance * max(1, float(value.abs().max())))


def pretend_two_ranks(model: nn.Module) -> None:
    """As if a second rank had the same batch."""
    globalise_batch_norms(model, lambda values: values * 2, 2)


def test_gradients_are_the_derivatives() -> None:
    norm = nn.BatchNorm2d(2).double()
    pretend_two_ranks(norm)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with frozen_statistics(norm):
        assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, norm.weight, norm.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    expected, model = make("plain"), make("plain")
    pretend_two_ranks(model)
    x, slope = batch(dtype)
    whole = step(expected[:1], torch.cat((x, x)), torch.cat((slope, slope)))
    half = step(model[:1], x, slope)
    spacing = torch.finfo(dtype).eps
    for key in ("y", "dx"):
        assert half[key].dtype == dtype
        torch.testing.assert_close(
            half[key], whole[key][: len(x)], rtol=2 * spacing, atol=spacing * float(whole[key].abs().max())
        )
    for key in ("sum 0.weight", "same 0.running_mean", "same 0.running_var"):
        assert half[key].dtype == torch.float32
    torch.testing.assert_close(2 * half["sum 0.weight"], whole["sum 0.weight"], rtol=1e-5, atol=1e-4)


def test_a_large_mean_costs_no_more_digits_than_it_costs_torch() -> None:
    x = 1000 + torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.BatchNorm2d(3))
    pretend_two_ranks(model)
    exact = nn.BatchNorm2d(3).double()(torch.cat((x, x)).double())[:4]
    torch.testing.assert_close(model(x).double(), exact, rtol=0, atol=1e-3)  # the spacing of float32 at 1000 is 6e-5


def test_parameters_buffers_and_keys_stay_the_same_objects() -> None:
    model = make("with activation")
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    pretend_two_ranks(model)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert isinstance(model[0], GlobalBatchNorm2d)
    copied = copy.deepcopy(model)
    x, slope = batch()
    assert torch.equal(step(copied, x, slope)["dx"], step(model, x, slope)["dx"])


def test_one_process_keeps_torchs_own() -> None:
    model = make("plain")
    globalise_batch_norms(model, lambda values: values, 1)
    assert type(model[0]) is nn.BatchNorm2d


def test_unknown_batch_norms_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"this model has BatchNorm1d; set engine\.batch_norm=local"):
        pretend_two_ranks(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2)))


@pytest.mark.parametrize("spread", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_statistics_hold_still_and_change_no_output(kind: str, spread: bool) -> None:
    model, free = make(kind), make(kind)
    if spread:
        pretend_two_ranks(model)
        pretend_two_ranks(free)
    x, _ = batch()
    objects = {name: id(buffer) for name, buffer in model.named_buffers()}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with frozen_statistics(model):
        assert torch.equal(model(x), free(x))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == objects
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(model(x), free(x))  # and they move again
    assert all(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo hides it, but not from warnings as errors
def test_compiled_models_break_their_graph_there_and_agree() -> None:
    model, plain = make("with activation"), make("with activation")
    pretend_two_ranks(model)
    pretend_two_ranks(plain)
    model.compile(backend="aot_eager")
    x, slope = batch()
    compiled, eager = step(model, x, slope), step(plain, x, slope)
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-6, atol=1e-6)

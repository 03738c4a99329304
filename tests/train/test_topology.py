"""One global batch is one optimiser step, on 1, 2 and 4 real ranks and in micro batches: engine, networks and loss as in a run.

The labels are such that no rank sees all classes.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cromss_dist.config import EngineConfig, LossConfig, ModelConfig, TrainConfig, plan_batches
from cromss_dist.losses import CromssLoss
from cromss_dist.models.batch_norm import globalise_batch_norms
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.pretrain.loss import BranchLoss
from cromss_dist.schema import IGNORE, NUM_CLASSES, Example
from cromss_dist.train.step.accumulation import accumulated_step
from cromss_dist.train.step.engine import Engine
from cromss_dist.world import World
from tests.ranks import Ranks

FUSIONS = ("middle", "late")
GLOBAL_BATCH, CROP = 8, 24
STEPS, EXACT_STEPS = 20, 10
PROGRESS = 60.0  # epochs: selection keeps 63 % of each class
FIRST = 36  # a batch without an activation within 5e-6 of zero: a ReLU that rounding switches moves the gradient by up to 1 %
CALM_LR = 3e-5  # at which Adam does not blow rounding up; docs/numerics.md shows what it does at larger ones
Scope = Literal["global", "local"]


def model(fusion: str) -> TwoBranchUNet:
    torch.manual_seed(3)
    return TwoBranchUNet(ModelConfig(fusion, "resnet18", 3, (16, 8, 8)), 2, 13)  # type: ignore[arg-type]


def example(step: int) -> Example:
    """A global batch: sample i has classes i to i + 2 in stripes, which the images show under noise; a tenth is unlabelled."""
    draw = torch.Generator().manual_seed(100 + step)
    stripes = torch.arange(CROP).div(CROP / 3, rounding_mode="floor").long().clamp(max=2)
    label = (torch.arange(GLOBAL_BATCH)[:, None, None] + stripes[:, None]).expand(-1, -1, CROP) % NUM_CLASSES
    images = [
        (label[:, None] / NUM_CLASSES + 0.3 * torch.randn(GLOBAL_BATCH, n, CROP, CROP, generator=draw)).clamp(0, 1)
        for n in (2, 13)
    ]
    noise = torch.rand(label.shape, generator=draw)
    noisy = torch.where(noise < 0.2, (label + 1) % NUM_CLASSES, label).masked_fill(noise > 0.9, IGNORE)
    prior = torch.rand(GLOBAL_BATCH, NUM_CLASSES, CROP, CROP, generator=draw)
    return Example({"s1": images[0], "s2": images[1]}, noisy, prior / prior.sum(1, keepdim=True), None, torch.ones(GLOBAL_BATCH))


def cut(whole: Example, part: int, parts: int) -> Example:
    def of(values: Tensor) -> Tensor:
        return values.chunk(parts)[part]

    assert whole.prior is not None
    images = {modality: of(values) for modality, values in whole.images.items()}
    return Example(images, of(whole.label), of(whole.prior), None, of(whole.weights))


def gradients(world: World, fusion: str, scope: Scope) -> dict[str, Tensor]:
    """Loss and gradient of a first step in plain torch, averaged over ranks as engines do."""
    networks = model(fusion)
    if scope == "global":
        globalise_batch_norms(networks, world.reduce_sum, world.size)
    loss = CromssLoss(LossConfig(scope=scope), reduce_sum=world.reduce_sum, world_size=world.size)
    part = cut(example(FIRST), world.rank, world.size)
    logits_s1, logits_s2 = networks(*part.images.values())
    out = loss(logits_s1, logits_s2, part.label, part.prior, PROGRESS, part.weights)
    out.total.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in networks.named_parameters() if p.grad is not None}
    found["loss"] = out.total.detach()
    return {name: world.reduce_sum(value) / world.size for name, value in found.items()}


def engine_losses(world: World, fusion: str) -> Tensor:
    """Losses of training steps by the engine, in float32, at a rate that does not blow rounding up."""
    config = EngineConfig(global_batch=GLOBAL_BATCH)
    engine = Engine(model(fusion), config, TrainConfig(lr=CALM_LR), plan_batches(config, world.size), world)
    loss = CromssLoss(LossConfig(), reduce_sum=world.reduce_sum, world_size=world.size)
    found = []
    for step in range(STEPS):
        part = cut(example(step), world.rank, world.size)
        found.append(accumulated_step(engine.forward, [part], BranchLoss(loss), PROGRESS + step, engine).total)
        assert engine.step().applied
    engine.close()
    return world.reduce_sum(torch.stack(found)) / world.size


def exact_losses(world: World, fusion: str) -> Tensor:
    """Losses of training steps in plain torch, networks in float64 and the published rate: what is left is the method's."""
    networks = model(fusion).double()
    globalise_batch_norms(networks, world.reduce_sum, world.size)
    adam = torch.optim.Adam(networks.parameters(), lr=TrainConfig().lr)
    loss = CromssLoss(LossConfig(), reduce_sum=world.reduce_sum, world_size=world.size)
    found = []
    for step in range(EXACT_STEPS):
        part = cut(example(step), world.rank, world.size)
        logits_s1, logits_s2 = networks(part.images["s1"].double(), part.images["s2"].double())
        out = loss(logits_s1, logits_s2, part.label, part.prior, PROGRESS + step, part.weights)
        adam.zero_grad()
        out.total.backward()  # type: ignore[no-untyped-call]
        for parameter in networks.parameters():
            if parameter.grad is not None:
                parameter.grad = world.reduce_sum(parameter.grad) / world.size
        adam.step()
        found.append(out.total.detach())
    return torch.stack(found)


def accumulated(world: World, training: bool, micro_batches: int) -> dict[str, Tensor]:
    """Loss and gradient of a first step by the engine, batch norms as in training or as in evaluation."""
    config = EngineConfig(global_batch=GLOBAL_BATCH, accumulation_steps=micro_batches)
    engine = Engine(model("middle"), config, TrainConfig(weight_decay=0.0), plan_batches(config, world.size), world)
    engine.train(training)
    parts = [cut(example(FIRST), i, micro_batches) for i in range(micro_batches)]
    loss = accumulated_step(engine.forward, parts, BranchLoss(CromssLoss(LossConfig())), PROGRESS, engine).total
    assert engine.step().applied
    # After one step Adam's first moment is a tenth of the gradient.
    found = {name.removeprefix("exp_avg/"): value for name, value in engine.snapshot().items() if name.startswith("exp_avg/")}
    engine.close()
    return {"loss": loss, **found}


def record(world: World, folder: Path) -> None:
    """Everything of this number of ranks, into one file."""
    found = {"engine losses": engine_losses(world, "middle")}
    if world.size <= 2:
        found["exact losses"] = exact_losses(world, "late")
    for fusion in FUSIONS:
        for scope in ("global", "local"):
            values = gradients(world, fusion, scope)
            found |= {f"{scope} {fusion} {name}": value for name, value in values.items()}
    if world.size == 1:
        for training in (False, True):
            for micro_batches in (1, 4):
                values = accumulated(world, training, micro_batches)
                found |= {f"{training} {micro_batches} {name}": value for name, value in values.items()}
    if world.is_main:
        save_file(found, folder / f"{world.size}.safetensors")


Records = dict[int, dict[str, Tensor]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("topology")
    with ExitStack() as all_sizes:  # at once: a single rank leaves a core idle
        groups = [all_sizes.enter_context(Ranks(record, size, folder, timeout_s=400)) for size in (1, 2, 4)]
        assert [group.wait() for group in groups] == [[0], [0] * 2, [0] * 4]
    return {size: load_file(folder / f"{size}.safetensors") for size in (1, 2, 4)}


def gradient(record: dict[str, Tensor], prefix: str) -> Tensor:
    """All of it, in one vector."""
    names = sorted(name for name in record if name.startswith(prefix) and not name.endswith("loss"))
    return torch.cat([record[name].flatten() for name in names]).double()


def distance(a: Tensor, b: Tensor) -> float:
    """Of two vectors, relative to the second one's length."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_loss_and_gradient_are_those_of_one_rank(records: Records, fusion: str, size: int) -> None:
    one, many = records[1], records[size]
    torch.testing.assert_close(many[f"global {fusion} loss"], one[f"global {fusion} loss"], rtol=1e-6, atol=0)
    for name in (name for name in one if name.startswith(f"global {fusion} ")):
        assert distance(many[name], one[name]) < 1e-5, name


@pytest.mark.parametrize("size", [2, 4])
def test_losses_stay_together_over_20_steps_of_the_engine(records: Records, size: int) -> None:
    losses = records[1]["engine losses"]
    assert losses[-1] < losses[0] - 0.3  # they do train
    torch.testing.assert_close(records[size]["engine losses"], losses, rtol=1e-4, atol=0)


def test_at_the_published_rate_nothing_but_rounding_tells_ranks_apart(records: Records) -> None:
    losses = records[1]["exact losses"]
    assert losses[-1] < losses[0] - 1
    torch.testing.assert_close(records[2]["exact losses"], losses, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_local_scope_depends_on_the_number_of_ranks(records: Records, fusion: str) -> None:
    prefix = f"local {fusion} "
    assert distance(gradient(records[1], prefix), gradient(records[1], f"global {fusion} ")) < 1e-6
    assert distance(gradient(records[2], prefix), gradient(records[1], prefix)) > 0.1
    assert distance(gradient(records[4], prefix), gradient(records[1], prefix)) > 0.1


def test_accumulated_steps_are_exact_but_for_batch_norms(records: Records) -> None:
    one = records[1]
    torch.testing.assert_close(one["False 4 loss"], one["False 1 loss"], rtol=1e-6, atol=0)
    assert distance(gradient(one, "False 4 "), gradient(one, "False 1 ")) < 1e-5
    # Four micro batches of two samples: other means and variances, another gradient, and nearly the same loss.
    assert 1e-5 < abs(float(one["True 4 loss"] / one["True 1 loss"]) - 1) < 0.05
    assert 0.1 < distance(gradient(one, "True 4 "), gradient(one, "True 1 ")) < 2

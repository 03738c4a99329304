"""The gradient of a step cut into micro batches is that of one batch. The oracle is plain torch on the whole batch."""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cromss_dist.losses import CromssLoss, LossConfig
from cromss_dist.models.batch_norm import frozen_statistics
from cromss_dist.pretrain.loss import BranchLoss
from cromss_dist.schema import Example
from cromss_dist.train.step.accumulation import Forward, StepLoss, accumulated_step
from cromss_dist.world import World
from tests.ranks import run_ranks
from tests.train.step import engine_programs as programs

CONFIG = LossConfig(segmentation=("ce", "dice", "focal"), consistency="kl")
PROGRESS = 60.0
SIDE = 12
CUTS = {1: [8], 2: [4, 4], 4: [2, 2, 2, 2], 3: [5, 1, 2]}


class Branches(nn.Module):
    """A network a branch, in float64, so that what differs is the loss's; `between` is between its two convolutions."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.s1, self.s2 = (nn.Sequential(nn.Conv2d(n, 6, 3, padding=1), between, nn.Tanh(), nn.Conv2d(6, 9, 1)) for n in (2, 4))

    def forward(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        return 4 * self.s1(s1), 4 * self.s2(s2)


class PlainEngine:
    """Plain torch: the mean over micro batches and ranks."""

    def __init__(self, model: nn.Module, num_micro_batches: int, world: World | None = None, scale: float = 1) -> None:
        self.model, self.world, self.scale = model, world, scale / num_micro_batches
        self.num_backward = 0

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale).backward()  # type: ignore[no-untyped-call]
        self.num_backward += 1

    def frozen_statistics(self) -> AbstractContextManager[None]:
        return frozen_statistics(self.model)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return found if self.world is None else {k: self.world.reduce_sum(g) / self.world.size for k, g in found.items()}


def model(between: nn.Module | None = None) -> Branches:
    torch.manual_seed(4)
    return Branches(between or nn.Identity()).double()


def example() -> Example:
    """Eight samples: ignored pixels, one sample of weight 0, class 7 in the first two samples alone."""
    generator = torch.Generator().manual_seed(2)
    label = torch.randint(0, 7, (8, SIDE, SIDE), generator=generator)
    label[:2, :4] = 7
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    prior = torch.rand(8, 9, SIDE, SIDE, generator=generator)
    return Example(
        images={
            "s1": torch.rand(8, 2, SIDE, SIDE, generator=generator, dtype=torch.float64),
            "s2": torch.rand(8, 4, SIDE, SIDE, generator=generator, dtype=torch.float64),
        },
        label=label,
        prior=prior / prior.sum(1, keepdim=True),
        reference=None,
        weights=torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1]),
    )


def cut(whole: Example, sizes: list[int]) -> list[Example]:
    def parts(values: Tensor | None) -> Sequence[Any]:
        return [None] * len(sizes) if values is None else torch.split(values, sizes)

    images = [dict(zip(whole.images, of, strict=True)) for of in zip(*map(parts, whole.images.values()), strict=True)]
    others = (whole.label, whole.prior, whole.reference, whole.weights)
    return [Example(*part) for part in zip(images, *map(parts, others), strict=True)]


def cromss(world: World | None = None, **changes: Any) -> BranchLoss:
    config = dataclasses.replace(CONFIG, **changes)
    return BranchLoss(
        CromssLoss(config) if world is None else CromssLoss(config, reduce_sum=world.reduce_sum, world_size=world.size)
    )


def one_batch(network: nn.Module, loss: BranchLoss, whole: Example) -> StepLoss:
    return loss(network(*whole.images.values()), whole, PROGRESS)


def oracle(network: nn.Module, reliability: str = "none") -> tuple[StepLoss, dict[str, Tensor]]:
    whole = example()
    out = one_batch(network, cromss(consistency_reliability=reliability), whole)
    out.total.backward()  # type: ignore[no-untyped-call]
    return out, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("reliability", ["none", "agreement"])
@pytest.mark.parametrize("sizes", CUTS.values(), ids=str)
def test_any_cut_into_micro_batches_gives_the_loss_and_gradient_of_one_batch(sizes: list[int], reliability: str) -> None:
    network = model()
    engine = PlainEngine(network, len(sizes))
    loss = cromss(consistency_reliability=reliability)
    out = accumulated_step(network, cut(example(), sizes), loss, PROGRESS, engine)
    expected, gradients = oracle(model(), reliability)
    assert_same_gradients(engine.gradients(), gradients)
    assert engine.num_backward == len(sizes)
    assert not out.total.requires_grad
    torch.testing.assert_close(out.total, expected.total.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.parts, expected.parts, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.counts, expected.counts, rtol=1e-6, atol=0)


def test_a_mean_over_micro_batches_would_be_another_gradient() -> None:
    network = model()
    engine = PlainEngine(network, 4)
    micro = cromss(scope="micro")
    accumulated_step(network, cut(example(), CUTS[4]), micro, PROGRESS, engine)
    _, gradients = oracle(model())
    found = engine.gradients()
    assert max(float((found[k] - g).abs().max() / g.abs().max()) for k, g in gradients.items()) > 1e-3


def rank_of_two(world: World, folder: Path) -> None:
    network = model()
    half = cut(example(), [4, 4])[world.rank]
    engine = PlainEngine(network, 2, world)
    loss = cromss(world)
    out = accumulated_step(network, cut(half, [2, 2]), loss, PROGRESS, engine)
    counts = world.reduce_sum(out.counts)
    result = engine.gradients() | {"total": out.total, "counts": counts}
    save_file(result, folder / f"rank-{world.rank}.safetensors")


def test_two_ranks_of_two_micro_batches_give_the_gradient_of_one_batch(tmp_path: Path) -> None:
    assert run_ranks(rank_of_two, 2, tmp_path) == [0, 0]
    expected, gradients = oracle(model())
    for rank in range(2):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        torch.testing.assert_close(found.pop("total"), expected.total.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.pop("counts"), expected.counts, rtol=1e-6, atol=0)
        assert_same_gradients(found, gradients)


def engine_steps(world: World, folder: Path, zero_stage: int) -> None:
    engine = programs.build(world, programs.TwoHeads(), zero_stage=zero_stage, accumulation_steps=3)
    loss = cromss(world)
    losses, norms = [], []
    for s1, s2, label in programs.batches():
        share = Example({"s1": s1, "s2": s2}, label, None, None, torch.ones(len(s1)))
        sizes = [programs.BATCH // world.size] * world.size
        micro_batches = cut(cut(share, sizes)[world.rank], [2, 2, 2])
        losses.append(accumulated_step(engine.forward, micro_batches, loss, PROGRESS, engine).total)
        norms.append(torch.tensor(engine.step().grad_norm))
    save_file({"losses": torch.stack(losses), "norms": torch.stack(norms)}, folder / f"rank-{world.rank}.safetensors")
    engine.close()


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_an_engine_of_any_zero_stage_makes_the_steps_of_plain_torch_on_the_whole_batch(zero_stage: int, tmp_path: Path) -> None:
    assert run_ranks(engine_steps, 2, tmp_path, zero_stage) == [0, 0]
    network, loss, losses, norms = programs.TwoHeads(), cromss(), [], []
    optimizer = torch.optim.Adam(network.parameters(), lr=programs.TRAIN.lr, weight_decay=programs.TRAIN.weight_decay)
    for s1, s2, label in programs.batches():
        optimizer.zero_grad()
        out = one_batch(network, loss, Example({"s1": s1, "s2": s2}, label, None, None, torch.ones(len(s1))))
        out.total.backward()  # type: ignore[no-untyped-call]
        losses.append(out.total.detach())
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), programs.CLIP))
        optimizer.step()
    for rank in range(2):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        torch.testing.assert_close(found["losses"], torch.stack(losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(found["norms"].float(), torch.stack(norms), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scope", ["micro", "local"])
def test_other_scopes_take_the_mean_over_micro_batches_in_one_pass(scope: Any) -> None:
    loss = cromss(scope=scope)
    network, alone = model(), model()
    calls: list[int] = []

    def forward(s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(s1))
        logits: tuple[Tensor, Tensor] = network(s1, s2)
        return logits

    parts = cut(example(), CUTS[2])
    engine = PlainEngine(network, 2)
    out = accumulated_step(forward, parts, loss, PROGRESS, engine)
    outputs = [one_batch(alone, loss, part) for part in parts]
    mean = (outputs[0].total + outputs[1].total) / 2
    mean.backward()  # type: ignore[no-untyped-call]
    assert_same_gradients(engine.gradients(), {n: p.grad for n, p in alone.named_parameters() if p.grad is not None})
    assert calls == CUTS[2]
    torch.testing.assert_close(out.total, mean.detach())
    for name, value in out.parts.items():
        torch.testing.assert_close(value, (outputs[0].parts[name] + outputs[1].parts[name]) / 2)
    assert torch.equal(out.counts, outputs[0].counts + outputs[1].counts)


def recorded(network: nn.Module, passes: list[Tensor]) -> Forward:
    def forward(s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        logits: tuple[Tensor, Tensor] = network(s1, s2)
        passes.append(logits[0].detach())
        return logits

    return forward


def test_both_passes_drop_the_same_units_and_the_next_step_others() -> None:
    network = model(nn.Dropout(0.5))
    passes: list[Tensor] = []
    for _ in range(2):
        accumulated_step(recorded(network, passes), cut(example(), CUTS[2]), cromss(), PROGRESS, PlainEngine(network, 2))
    assert torch.equal(passes[0], passes[2])
    assert torch.equal(passes[1], passes[3])
    assert not torch.equal(passes[0], passes[4])


def test_batch_norms_are_moved_once_by_each_micro_batch() -> None:
    network, alone = model(nn.BatchNorm2d(6)), model(nn.BatchNorm2d(6))
    parts = cut(example(), CUTS[4])
    accumulated_step(network, parts, cromss(), PROGRESS, PlainEngine(network, 4))
    for part in parts:
        alone(*part.images.values())
    for name, buffer in alone.named_buffers():
        assert torch.equal(dict(network.named_buffers())[name], buffer)


def test_gradients_of_half_precision_logits_are_rounded_after_the_loss_scale() -> None:
    # Without the scale many are below the smallest float16: rounding first would lose them.
    found = []
    for sizes in (CUTS[1], CUTS[2]):
        network = model()

        def forward(s1: Tensor, s2: Tensor, network: nn.Module = network) -> tuple[Tensor, Tensor]:
            logits_s1, logits_s2 = network(s1, s2)
            return logits_s1.half(), logits_s2.half()

        engine = PlainEngine(network, len(sizes), scale=2.0**12)
        accumulated_step(forward, cut(example(), sizes), cromss(), PROGRESS, engine)
        found.append(engine.gradients())
    assert_same_gradients(found[1], found[0])


def test_hard_labels_need_no_prior() -> None:
    network = model()
    parts = [dataclasses.replace(part, prior=None) for part in cut(example(), CUTS[2])]
    out = accumulated_step(network, parts, cromss(), PROGRESS, PlainEngine(network, 2))
    expected = one_batch(network, cromss(), dataclasses.replace(example(), prior=None))
    torch.testing.assert_close(out.total, expected.total.detach(), rtol=1e-6, atol=0)

"""What ranks run in the tests of the engine: small networks, fixed batches, losses of every step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cromss_dist.config import EngineConfig, LossConfig, TrainConfig, plan_batches
from cromss_dist.errors import CheckpointError
from cromss_dist.losses import CromssLoss
from cromss_dist.train.step.engine import Engine
from cromss_dist.world import World

STEPS, BATCH, CROP = 3, 12, 8
TRAIN = TrainConfig(lr=1e-2, weight_decay=1e-3)
CLIP = 0.5


class TwoHeads(nn.Module):
    """Two small branches without batch norm, so that nothing but loss and engine depends on the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.s1 = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 1))
        self.s2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 1))

    def forward(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        return self.s1(s1), self.s2(s2)


class Normed(TwoHeads):
    """The same with batch norms, blocks that can be computed again, and sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.s1, self.s2 = self._branch(2), self._branch(4)

    @staticmethod
    def _branch(bands: int) -> nn.Sequential:
        # No bias before a batch norm: its gradient is zero but for rounding, which Adam would blow up.
        block = nn.Sequential(nn.Conv2d(bands, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU())
        return nn.Sequential(_Block(block), nn.Conv2d(7, 9, 1))


class _Block(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 2, CROP, CROP, generator=generator),
            torch.rand(BATCH, 4, CROP, CROP, generator=generator),
            torch.randint(0, 9, (BATCH, CROP, CROP), generator=generator),
        )
        for _ in range(steps)
    ]


def rate(step: int) -> float:
    """The learning rate of a step; another one each time, as schedules have it."""
    return TRAIN.lr / (1 + step)


def build(world: World, model: nn.Module | None = None, **switches: Any) -> Engine:
    config = EngineConfig(**{"global_batch": BATCH, "grad_clip": CLIP, **switches})
    return Engine(model or Normed(), config, TRAIN, plan_batches(config, world.size), world)


def cross_entropy(logits: tuple[Tensor, ...], label: Tensor) -> Tensor:
    """A loss that is a mean over samples, so that a mean over ranks is that of the whole batch."""
    return F.cross_entropy(logits[0].float(), label) + F.cross_entropy(logits[1].float(), label)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Everything in one float64 vector."""
    return torch.cat([value.double().flatten() for value in tensors.values()])


def share_of(batch: tuple[Tensor, ...], world: World) -> list[Tensor]:
    return [part.chunk(world.size)[world.rank] for part in batch]


def step_by(engine: Engine, batch: tuple[Tensor, ...], world: World) -> float:
    """One optimiser step; returns this rank's loss before it."""
    s1, s2, label = share_of(batch, world)
    loss = cross_entropy(engine.forward(s1, s2), label)
    engine.backward(loss)
    assert engine.step().applied
    return float(loss.detach())


def cromss_steps(world: World, folder: Path, zero_stage: int, accumulation: int, precision: str) -> None:
    """Steps of the whole loss, as a run makes them, with the same pixels on any number of ranks."""
    engine = build(world, TwoHeads(), zero_stage=zero_stage, accumulation_steps=accumulation, precision=precision)
    loss = CromssLoss(LossConfig(prior="none"), reduce_sum=world.reduce_sum, world_size=world.size)
    losses, norms = [], []
    for step, batch in enumerate(batches()):
        engine.lr = rate(step)
        for s1, s2, label in zip(*(part.chunk(accumulation) for part in share_of(batch, world)), strict=True):
            logits_s1, logits_s2 = engine.forward(s1, s2)
            out = loss(logits_s1, logits_s2, label, None, progress=60.0)
            engine.backward(out.total)
            losses.append(float(out.total.detach()))
        result = engine.step()
        assert result.applied
        norms.append(result.grad_norm)
    weights = engine.state_dict()
    if world.is_main:
        figures = {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}
        save_file(weights | figures, folder / "result.safetensors")
    engine.close()


def steps_with_a_bad_gradient(world: World, folder: Path, zero_stage: int) -> None:
    """Rank 1's gradient of step 1 is nan, step 2 is vetoed; writes applied steps, and weights before and after the two."""
    engine = build(world, zero_stage=zero_stage)
    results, weights = [], []
    for step, batch in enumerate(batches(4)):
        s1, s2, label = share_of(batch, world)
        loss = cross_entropy(engine.forward(s1, s2), label)
        engine.backward(loss * float("nan") if step == 1 and world.rank == 1 else loss)
        results.append(engine.step(veto=step == 2))
        weights.append(flat(engine.state_dict()))
    finite = [bool(torch.tensor(result.grad_norm).isfinite()) for result in results]
    save_file(
        {
            "applied": torch.tensor([result.applied for result in results]),
            "finite": torch.tensor(finite),
            "overflow": torch.tensor([result.overflow for result in results]),
            "weights": torch.stack(weights),
            "steps": torch.tensor(engine.state()["steps"]),
        },
        folder / f"rank-{world.rank}.safetensors",
    )
    engine.close()


def scaled_steps(world: World, folder: Path, zero_stage: int) -> None:
    """fp16 steps; a loss of 300 times its size overflows until the scale has fallen."""
    engine = build(world, zero_stage=zero_stage, precision="fp16", grad_clip=0.0)
    engine._scale.GROWTH_STEPS = 3
    scales, applied, overflow, norms = [], [], [], []
    for step in range(16):
        s1, s2, label = share_of(batches(1)[0], world)
        engine.backward(cross_entropy(engine.forward(s1, s2), label) * (300.0 if step < 10 else 1.0))
        result = engine.step()
        scales.append(engine.loss_scale)
        applied.append(result.applied)
        overflow.append(result.overflow)
        norms.append(result.grad_norm)
    weights = engine.state_dict()
    columns = {"scales": torch.tensor(scales), "applied": torch.tensor(applied), "overflow": torch.tensor(overflow)}
    columns |= {"norms": torch.tensor(norms), "finite": torch.tensor([value.isfinite().all() for value in weights.values()])}
    save_file(columns, folder / f"rank-{world.rank}.safetensors")
    engine.close()


def scale_after_fp32(world: World, folder: Path) -> None:
    """fp16 that goes on from fp32."""
    engine = build(world)
    tensors, state = engine.snapshot(), engine.state()
    engine.close()
    engine = build(world, precision="fp16")
    first = engine.loss_scale
    engine.restore(tensors, state)
    assert engine.loss_scale == first > 1
    engine.close()


def shares(world: World, folder: Path, zero_stage: int) -> None:
    """Trains, saves every rank's share, trains on; writes the losses after the saving."""
    engine = build(world, zero_stage=zero_stage)
    data = batches(4)
    before = engine.snapshot()
    assert all(not value.any() for key, value in before.items() if key.startswith("exp_avg"))
    for batch in data[:2]:
        step_by(engine, batch, world)
    share = engine.snapshot()
    frozen = {key: value.clone() for key, value in share.items()}
    losses = [step_by(engine, batch, world) for batch in data[2:]]
    assert all(torch.equal(share[key], frozen[key]) for key in share), "later steps do not show in it"
    whole = engine.state_dict()
    if world.is_main:
        save_file(whole, folder / "weights.safetensors")
    save_file(share, folder / f"share-{world.rank}.safetensors")
    save_file({"losses": torch.tensor(losses, dtype=torch.float64)}, folder / f"losses-{world.rank}.safetensors")
    engine.close()


def refusals(world: World, folder: Path, zero_stage: int) -> None:
    """Tries to take over what does not fit; writes what was said, and leaves by an assertion if anything has changed."""
    engine = build(world, zero_stage=zero_stage)
    step_by(engine, batches(1)[0], world)
    whole, state = load_shares(folder), engine.state()
    before = engine.snapshot()
    name, other = "weights/s1.1.weight", "exp_avg/s1.1.weight"
    told = []
    for wrong, of in (
        ({key: value for key, value in whole.items() if key != name}, state),
        (whole | {"weights/s3.1.weight": whole[name]}, state),
        (whole | {other: whole[other][:, :3]}, state),
        (whole | {other: whole[other].half()}, state),
        (whole, {"steps": 2}),
    ):
        with pytest.raises(CheckpointError) as error:
            engine.restore(wrong, of)
        told.append(str(error.value))
    after = engine.snapshot()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert engine.state() == state
    (folder / f"told-{world.rank}").write_text("\n".join(told))
    engine.close()


def resumed(world: World, folder: Path, zero_stage: int, source: Path) -> None:
    """Takes over what `shares` saved, saves it again, and trains on."""
    engine = build(world, _other(Normed()), zero_stage=zero_stage)
    engine.restore(load_shares(source), {"steps": 2, "loss_scale": None})
    save_file(engine.snapshot(), folder / f"share-{world.rank}.safetensors")
    losses = [step_by(engine, batch, world) for batch in batches(4)[2:]]
    save_file({"losses": torch.tensor(losses, dtype=torch.float64)}, folder / f"losses-{world.rank}.safetensors")
    whole = engine.state_dict()
    if world.is_main:
        save_file(whole, folder / "weights.safetensors")
    engine.close()


def _other(model: nn.Module) -> nn.Module:
    """Other weights than any saved ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def load_shares(folder: Path) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for path in sorted(folder.glob("share-*.safetensors")):
        share: Mapping[str, Tensor] = load_file(path)
        assert not whole.keys() & share.keys(), "shares are disjoint"
        whole |= share
    return whole


def switched_steps(world: World, folder: Path, name: str, switches: dict[str, Any]) -> None:
    engine = build(world, **switches)
    losses = [step_by(engine, batch, world) for batch in batches()]
    save_file({"losses": torch.tensor(losses)}, folder / f"{name}-{world.rank}.safetensors")
    engine.close()


def own_statistics(world: World, folder: Path, batch_norm: str) -> None:
    """Running means after a step on other pixels each, before and after averaging; and that a frozen forward moves none."""
    model = Normed()
    engine = build(world, model, batch_norm=batch_norm)
    step_by(engine, batches(1)[0], world)
    mean, seen = model.get_buffer("s1.0.layers.1.running_mean"), model.get_buffer("s1.0.layers.1.num_batches_tracked")
    own = mean.clone()
    with engine.frozen_statistics(), torch.no_grad():
        engine.forward(*share_of(batches(2)[1], world)[:2])
    assert torch.equal(own, mean)
    assert int(seen) == 1
    engine.average_running_statistics()
    save_file({"own": own, "averaged": mean.clone()}, folder / f"rank-{world.rank}.safetensors")
    engine.close()


def measured(world: World, folder: Path, free: int) -> None:
    """A step of an engine that thinks it is on a GPU with so many bytes free; rank 1 has 100 times as many."""
    model = Normed()
    engine = build(world, model, zero_stage=3)
    engine._must_measure = True
    drawn = torch.empty(1)

    def draw(*_: Any) -> None:
        drawn.uniform_()

    model.register_forward_pre_hook(draw)
    expected = torch.rand(STEPS, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    losses = []
    with patch("cromss_dist.train.step.engine.free_bytes", lambda device: free * (1 if world.rank == 0 else 100)):
        for batch, number in zip(batches(), expected, strict=True):
            losses.append(step_by(engine, batch, world))
            assert drawn == number, "measuring draws no random numbers: a resumed run measures at another step"
    recomputes = torch.tensor("forward" in vars(model.get_submodule("s1.0")))
    seen = model.get_buffer("s1.0.layers.1.num_batches_tracked").clone()
    columns = {"losses": torch.tensor(losses), "recomputes": recomputes, "seen": seen}
    save_file(columns, folder / f"rank-{world.rank}.safetensors")
    engine.close()

"""Networks of which a part is frozen: an engine trains the rest, at every ZeRO stage, and its checkpoints have both."""

from pathlib import Path
from typing import Literal, Self, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cromss_dist.config import EngineConfig, plan_batches
from cromss_dist.train.step.engine import Engine
from cromss_dist.world import World
from tests.ranks import run_ranks
from tests.train.step.engine_programs import BATCH, TRAIN, batches, share_of

Norms: TypeAlias = Literal["global", "local"]
# ZeRO stage, that of the engine that goes on, batch norms.
CASES: tuple[tuple[int, int, Norms], ...] = ((0, 2, "global"), (2, 3, "global"), (3, 0, "global"), (0, 3, "local"))


class Downstream(nn.Module):
    """A new head on a frozen encoder of one image, whose batch norm stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Conv2d(4, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU()).requires_grad_(False)
        self.head = nn.Sequential(nn.Conv2d(7, 7, 1, bias=False), nn.BatchNorm2d(7), nn.Conv2d(7, 9, 1))
        norm = self.encoder[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        norm.running_mean.uniform_(-0.3, 0.3)
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.head(self.encoder(image)),)


def engine_of(world: World, stage: int, norms: Norms, model: nn.Module) -> Engine:
    config = EngineConfig(global_batch=BATCH, zero_stage=stage, batch_norm=norms)
    return Engine(model, config, TRAIN, plan_batches(config, world.size), world)


def every_stage(world: World, folder: Path) -> None:
    """Steps at each stage, and another engine at another stage that takes over what they came to."""
    for stage, next_stage, norms in CASES:
        engine = engine_of(world, stage, norms, Downstream())
        for _, image, label in batches():
            image, label = share_of((image, label), world)
            engine.backward(F.cross_entropy(engine.forward(image)[0], label))
            assert engine.step().applied
        shares = folder / f"shares-{norms}-{stage}"
        shares.mkdir(exist_ok=True)
        save_file(engine.snapshot(), shares / f"{world.rank}.safetensors")
        weights, state = engine.state_dict(), engine.state()
        engine.close()
        world.barrier()
        other = Downstream()
        nn.init.zeros_(other.encoder[0].weight)  # type: ignore[arg-type]
        engine = engine_of(world, next_stage, norms, other)
        engine.restore({name: value for file in shares.iterdir() for name, value in load_file(file).items()}, state)
        for name, value in engine.state_dict().items():
            assert torch.equal(value, weights[name]), name
        engine.close()
        save_file(weights, folder / f"{norms}-{stage}-{world.rank}.safetensors")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    assert run_ranks(every_stage, 2, folder) == [0, 0]
    return folder


def test_the_frozen_part_stays_as_it_is_to_the_bit(ranks: Path) -> None:
    begun = Downstream().state_dict()
    for stage, _, norms in CASES:
        for rank in range(2):
            found = load_file(ranks / f"{norms}-{stage}-{rank}.safetensors")
            for name, value in begun.items():
                same = torch.equal(found[name], value)
                assert same == name.startswith("encoder."), f"{name}, stage {stage}, {norms} batch norms"


def test_the_rest_makes_the_steps_of_plain_torch_on_the_whole_batch(ranks: Path) -> None:
    model = Downstream()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)
    for _, image, label in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(image)[0], label).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for stage in (stage for stage, _, norms in CASES if norms == "global"):
        found = load_file(ranks / f"global-{stage}-0.safetensors")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


def test_a_checkpoint_has_the_frozen_weights_once_and_no_moments_of_them(ranks: Path) -> None:
    for stage, _, norms in CASES:
        shares = [load_file(file) for file in (ranks / f"shares-{norms}-{stage}").iterdir()]
        names = [name for share in shares for name in share]
        assert len(names) == len(set(names))
        assert {"weights/encoder.0.weight", "buffers/encoder.1.running_mean", "exp_avg/head.0.weight"} <= set(names)
        assert not [name for name in names if name.startswith("exp_avg") and "/encoder." in name]
        own = {name.partition("/")[2] for name in names if name.startswith("buffers-")}
        assert own == ({"head.1.running_mean", "head.1.running_var"} if norms == "local" else set())

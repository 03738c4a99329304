"""N ranks with B / N samples each give the loss and gradients of one rank with B."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cromss_dist.losses import CromssLoss, LossConfig
from cromss_dist.losses.selection import ReduceSum
from cromss_dist.world import World
from tests.ranks import run_ranks

CONFIG = LossConfig(segmentation=("ce", "dice", "focal"), consistency="kl")
RELIABLE = dataclasses.replace(CONFIG, consistency_reliability="agreement")


def step(loss: CromssLoss, batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    logits = [batch[f"logits_{m}"][rows].clone().requires_grad_() for m in ("s1", "s2")]
    output = loss(logits[0], logits[1], batch["label"][rows], batch["prior"][rows], progress=60.0)
    output.total.backward()  # type: ignore[no-untyped-call]
    grads = {f"grad_{i}": x.grad for i, x in enumerate(logits) if x.grad is not None}
    return {"total": output.total.detach(), "selection": output.selection_s1, **output.parts, **grads}


class Exchange:
    """Adds tensors up over threads that stand for ranks."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.slots: list[Tensor] = [torch.empty(0)] * world_size

    def reduce_sum_of(self, rank: int) -> ReduceSum:
        def reduce_sum(x: Tensor) -> Tensor:
            assert not x.requires_grad
            self.slots[rank] = x
            self.barrier.wait(30)
            total = torch.stack(self.slots).sum(0)
            self.barrier.wait(30)
            return total

        return reduce_sum


def assert_equal_to_one_rank(ranks: list[dict[str, Tensor]], one: dict[str, Tensor]) -> None:
    for key, value in one.items():
        if value.ndim:
            # Engines average gradients over ranks: a rank's own must be world times its part.
            scale = len(ranks) if key.startswith("grad") else 1
            joined = torch.cat([rank[key] for rank in ranks]) / scale
            torch.testing.assert_close(joined, value, rtol=1e-6, atol=1e-8)
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "config", [CONFIG, RELIABLE, dataclasses.replace(RELIABLE, scope="micro")], ids=("kl", "reliable", "micro")
)
@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 2, 3, 4), (0, 3, 4)])
def test_loss_and_gradients_are_the_same_on_one_and_many_ranks(
    batch: dict[str, Tensor], cuts: tuple[int, ...], config: LossConfig
) -> None:
    world_size = len(cuts) - 1
    exchange = Exchange(world_size)
    losses = [CromssLoss(config, reduce_sum=exchange.reduce_sum_of(rank), world_size=world_size) for rank in range(world_size)]
    rows = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    with ThreadPoolExecutor(world_size) as pool:
        ranks = list(pool.map(step, losses, [batch] * world_size, rows))
    assert_equal_to_one_rank(ranks, step(CromssLoss(config), batch, slice(None)))


def test_local_scope_sets_the_other_ranks_aside(batch: dict[str, Tensor]) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError

    local = CromssLoss(dataclasses.replace(RELIABLE, scope="local"), reduce_sum=never, world_size=2)
    for key, value in step(CromssLoss(RELIABLE), batch, slice(0, 2)).items():
        assert torch.equal(step(local, batch, slice(0, 2))[key], value)


def one_of_many(world: World, folder: Path) -> None:
    """A rank: what the loss gives for its share of the batch."""
    batch = load_file(folder / "batch.safetensors")
    share = len(batch["label"]) // world.size
    loss = CromssLoss(RELIABLE, reduce_sum=world.reduce_sum, world_size=world.size)
    output = step(loss, batch, slice(world.rank * share, (world.rank + 1) * share))
    save_file({key: value.contiguous() for key, value in output.items()}, folder / f"rank{world.rank}.safetensors")


def test_two_gloo_processes_give_the_loss_of_one(batch: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in batch.items()}, tmp_path / "batch.safetensors")
    assert run_ranks(one_of_many, 2, tmp_path) == [0, 0]
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    assert_equal_to_one_rank(ranks, step(CromssLoss(RELIABLE), batch, slice(None)))

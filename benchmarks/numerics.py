"""What the number of ranks does to a training step, in scope 'global' and in scope 'local': tables, and docs/numerics.jpg.

    python benchmarks/numerics.py --figure docs/numerics.jpg

A synthetic archive goes through loader and augmentation as in a run; networks and loss are the package's. Ranks are threads
that add up through memory: their arithmetic is that of processes, and 16 of them fit on a laptop. Minutes on two cores.
"""

import argparse
import copy
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from cromss_dist.config import DataConfig, EngineConfig, LossConfig, ModelConfig, TrainConfig, plan_batches
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.loading.augment import train_example
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.data.synthetic import SyntheticConfig, write_archive
from cromss_dist.losses import CromssLoss
from cromss_dist.models.batch_norm import globalise_batch_norms
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.schema import IGNORE, Example

SEED, GLOBAL_BATCH, CROP_PX, STEPS, WARM_UP_STEPS = 0, 32, 32, 20, 10
RANKS = (1, 2, 4, 8, 16)
CURVES = (1, 4, 16)
PROGRESS = 60.0  # epochs of an 80-epoch ramp
LR, CALM_LR = TrainConfig().lr, 3e-5
HALF_A_PLACE = 2.0**-24
Scope = Literal["global", "local"]

SCOPES: tuple[tuple[str, Scope, Scope], ...] = (
    ("global", "global", "global"),
    ("local loss alone", "local", "global"),
    ("local", "local", "local"),
)
COLOURS = {"global": ("lightblue", "C0", "black"), "local": ("", "limegreen", "darkgreen")}


@dataclass(frozen=True)
class Way:
    """How a step is spread.

    Args:
        ranks: Number of them.
        loss: Scope of the loss.
        batch_norm: Scope of batch norms.
        disturbed: Whether weights start off by half a unit in the last place, at random: what rounding may do.
    """

    ranks: int
    loss: Scope = "global"
    batch_norm: Scope = "global"
    disturbed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What training steps gave.

    Args:
        losses: Mean over ranks, of each step.
        kept: bool (2, B, H, W), pixels of weight 1 in the first step.
        gradient: Of the first step, all of it.
        networks: After the last.
    """

    losses: Tensor
    kept: Tensor
    gradient: Tensor
    networks: nn.Module


class Exchange:
    """Adds up tensors over threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._slots = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def reduce_sum_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        """A rank's `reduce_sum`."""

        def reduce_sum(values: Tensor) -> Tensor:
            self._slots[rank] = values.detach()
            self._barrier.wait()
            total = torch.stack(self._slots).sum(0)
            self._barrier.wait()
            return total

        return reduce_sum


def make_batches(folder: Path, number: int) -> list[Example]:
    """Global batches, as training draws them."""
    archive = folder / "archive"
    write_archive(archive, SyntheticConfig(num_locations=2 * GLOBAL_BATCH, seed=SEED, size_px=96))
    data = DataConfig(shards=str(convert(open_archive(archive), folder / "shards").folder), crop_px=CROP_PX)
    plan = plan_batches(EngineConfig(global_batch=GLOBAL_BATCH), 1)
    with RunData.open(data, SEED).train_loader(plan) as loader:
        return [train_example(next(loader), data, data.s1_bands, data.s2_bands, "ts", SEED, "cpu") for _ in range(number)]


def cut(whole: Example, part: int, parts: int) -> Example:
    """A rank's share of a global batch."""
    names = ("s1", "s2", "label", "prior", "weights")
    return replace(whole, reference=None, **{name: getattr(whole, name).chunk(parts)[part] for name in names})


def train(way: Way, start: nn.Module, batches: Sequence[Example], lr: float, dtype: torch.dtype = torch.float32) -> Outcome:
    """Trains a copy of `start`, one step a batch."""
    exchange = Exchange(way.ranks)
    with ThreadPoolExecutor(way.ranks) as pool:
        parts = list(
            pool.map(
                lambda rank: _train_rank(way, rank, exchange.reduce_sum_of(rank), start, batches, lr, dtype), range(way.ranks)
            )
        )
    return replace(parts[0], kept=torch.cat([part.kept for part in parts], 1))


def _train_rank(
    way: Way,
    rank: int,
    reduce_sum: Callable[[Tensor], Tensor],
    start: nn.Module,
    batches: Sequence[Example],
    lr: float,
    dtype: torch.dtype,
) -> Outcome:
    networks = copy.deepcopy(start).to(dtype)
    parameters = list(networks.parameters())
    if way.disturbed:
        draw = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1 + HALF_A_PLACE * torch.randn(parameter.shape, generator=draw))
    if way.batch_norm == "global":
        globalise_batch_norms(networks, reduce_sum, way.ranks)
    loss = CromssLoss(LossConfig(scope=way.loss), reduce_sum=reduce_sum, world_size=way.ranks)
    adam = torch.optim.Adam(parameters, lr=lr, weight_decay=TrainConfig().weight_decay)
    losses, kept, gradient = [], torch.empty(0), torch.empty(0)
    for step, batch in enumerate(batches):
        part = cut(batch, rank, way.ranks)
        logits_s1, logits_s2 = networks(part.images["s1"].to(dtype), part.images["s2"].to(dtype))
        out = loss(logits_s1, logits_s2, part.label, part.prior, PROGRESS, part.weights)
        own = torch.autograd.grad(out.total, parameters)
        mean = [reduce_sum(part) / way.ranks for part in own]
        for parameter, value in zip(parameters, mean, strict=True):
            parameter.grad = value
        adam.step()
        losses.append(reduce_sum(out.total.detach()) / way.ranks)
        if step == 0:
            kept = torch.stack((out.selection_s1, out.selection_s2)) == 1
            gradient = torch.cat([value.flatten() for value in mean]).double()
    return Outcome(torch.stack(losses), kept, gradient, networks)


def distance(a: Tensor, b: Tensor) -> float:
    """Of two vectors, relative to the second one's length."""
    return float((a - b).norm() / b.norm())


def first_steps(start: nn.Module, batch: Example) -> dict[str, list[float]]:
    """Prints what one step at equal weights is on any number of ranks; returns the shares of flips, by scope."""
    one = train(Way(1), start, [batch], LR)
    labelled = (batch.label != IGNORE).expand_as(one.kept)
    print("\n| ranks | scope | loss, relative | gradient, relative | keep or discard flips |\n| --: | -- | --: | --: | --: |")
    flips: dict[str, list[float]] = {}
    for name, loss, batch_norm in SCOPES:
        for ranks in RANKS:
            way = train(Way(ranks, loss, batch_norm), start, [batch], LR)
            flips.setdefault(name, []).append(float((way.kept != one.kept)[labelled].double().mean()))
            of_loss = abs(float(way.losses[0] / one.losses[0]) - 1)
            print(
                f"| {ranks} | {name} | {of_loss:.1e} | {distance(way.gradient, one.gradient):.1e} | {flips[name][-1]:.2%} |",
                flush=True,
            )
    return flips


def curves(start: nn.Module, batches: Sequence[Example]) -> dict[tuple[str, int], Tensor]:
    """Prints how far losses are from one rank's over training steps; returns those at the published rate."""
    print("\n| rate | arithmetic | ranks | scope | largest difference of the loss |\n| --: | -- | --: | -- | --: |")
    found = {}
    for lr, dtype in ((LR, torch.float32), (CALM_LR, torch.float32), (LR, torch.float64)):
        one = train(Way(1), start, batches, lr, dtype).losses
        ways = {("global", ranks): Way(ranks) for ranks in CURVES[1:]}
        if dtype == torch.float32:
            ways["1 rank, weights half a last place off", 1] = Way(1, disturbed=True)
        if (lr, dtype) == (LR, torch.float32):
            ways |= {("local", ranks): Way(ranks, "local", "local") for ranks in CURVES[1:]}
            found["global", 1] = one
        for (name, ranks), way in ways.items():
            losses = train(way, start, batches, lr, dtype).losses
            if (lr, dtype) == (LR, torch.float32):
                found[name, ranks] = losses
            arithmetic = "float32" if dtype == torch.float32 else "networks in float64"
            print(f"| {lr:g} | {arithmetic} | {ranks} | {name} | {float((losses - one).abs().max()):.1e} |", flush=True)
    print(f"\nThe loss goes from {float(found['global', 1][0]):.2f} to {float(found['global', 1][-1]):.2f}.")
    return found


def draw(path: Path, flips: dict[str, list[float]], losses: dict[tuple[str, int], Tensor]) -> None:
    """Both as one figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (name, shares), style in zip(flips.items(), ("o-", "s--", "^-"), strict=True):
        left.plot(RANKS, [100 * share for share in shares], style, label=name)
    left.set(xscale="log", xlabel="ranks, at one global batch", ylabel="keep or discard flips, % of labelled px")
    left.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
    left.minorticks_off()
    left.legend()
    for (name, ranks), of_steps in losses.items():
        if name in COLOURS:
            style, width = {1: ("-", 4.5), 4: ("--", 2.5), 16: (":", 1.5)}[ranks]  # curves that coincide stay visible
            colour = COLOURS[name][CURVES.index(ranks)]
            right.plot(range(1, STEPS + 1), of_steps, style, linewidth=width, color=colour, label=f"{name}, {ranks}")
    right.set(xlabel="optimiser step", ylabel="training loss", xticks=range(0, STEPS + 1, 5))
    right.legend(loc="upper left", bbox_to_anchor=(1, 1), title="scope, ranks")
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 80, "optimize": True})
    plt.close(figure)


def main() -> None:
    """Prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("numerics.jpg"))
    figure: Path = parser.parse_args().figure
    torch.set_num_threads(1)  # a rank has one
    with tempfile.TemporaryDirectory() as folder:
        batches = make_batches(Path(folder), WARM_UP_STEPS + STEPS)
    torch.manual_seed(SEED)
    fresh = TwoBranchUNet(ModelConfig("middle", "resnet18", 3, (32, 16, 8)), 2, 13)
    # So that confidences mean something when pixels are selected by them.
    start = train(Way(1), fresh, batches[:WARM_UP_STEPS], LR).networks
    draw(figure, first_steps(start, batches[WARM_UP_STEPS]), curves(start, batches[WARM_UP_STEPS:]))


if __name__ == "__main__":
    main()

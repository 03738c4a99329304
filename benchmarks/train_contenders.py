"""One process of benchmarks/train.py: runs a part of it, and rank 0 prints what it took, as JSON.

    python benchmarks/train_contenders.py PART [--encoder E --crop-px N --batch N --rounds N] [--rank R --ranks N --meet FILE]

Parts, of which all but `switch` take turns between ways in this process:
  loss    label prior, and loss with selection, forward and backward: ours and published
  step    whole steps: ours, bare, published
  switch  whole steps with the engine's keys given by --engine as JSON: time, memory, losses
  scope   whole steps with the loss and batch norms over all ranks and over one's own pixels; accumulation exact and not
  save    saving and loading a checkpoint: ours, torch.save, safetensors, DeepSpeed's
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from published_step import PublishedLoss
from stopwatch import cpu_s
from torch import Tensor
from train_saving import measure_saving
from train_ways import (
    EPOCH,
    LOSS,
    CountedWorld,
    OurStep,
    Size,
    alternate,
    bare_step,
    make_inputs,
    published_step,
    settle,
)

from cromss_dist.config import EngineConfig, LossConfig
from cromss_dist.losses import CromssLoss
from cromss_dist.schema import NUM_CLASSES
from cromss_dist.world import World, join

WARM_UP_STEPS = 2
ACCUMULATION = 2


def run_loss(size: Size, rounds: int, world: World) -> dict[str, Any]:
    """Priors, and losses with their gradients at random logits."""
    inputs = make_inputs(size, world.device, 0, size.batch)
    example, prior = inputs.with_prior(), inputs.published_prior().to(world.device)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, size.batch, NUM_CLASSES, size.crop_px, size.crop_px, generator=generator).to(world.device)
    ours, published = CromssLoss(LOSS), PublishedLoss(LOSS)

    def our_loss() -> tuple[float, Tensor]:
        leaf = logits.clone().requires_grad_()
        total = ours(leaf[0], leaf[1], example.label, prior, EPOCH, example.weights).total
        return total.item(), torch.autograd.grad(total, leaf)[0]

    def published_loss() -> tuple[float, Tensor]:
        leaf = logits.clone().requires_grad_()
        total = published((leaf[0], leaf[1]), example.label, prior, EPOCH)["total"]
        return total.item(), torch.autograd.grad(total, leaf)[0]

    assert example.prior is not None
    (value, slope), (expected, expected_slope) = our_loss(), published_loss()
    differences = {
        "prior": float((example.prior - prior).abs().max()),
        "loss": abs(value - expected) / expected,
        "gradient": float((slope - expected_slope).abs().max() / expected_slope.abs().max()),
    }
    ways: dict[str, Callable[[], object]] = {
        "ours prior": inputs.with_prior,
        "published prior": lambda: inputs.published_prior().to(world.device),
        "ours loss": our_loss,
        "published loss": published_loss,
    }
    return {"runs": alternate(ways, rounds, world.device), "differences": differences}


def run_step(size: Size, rounds: int, world: World) -> dict[str, Any]:
    """Whole steps on one rank, fp32."""
    engine = EngineConfig(global_batch=size.batch, precision="fp32")
    ours, bare = OurStep(size, engine, world), bare_step(size, world.device)
    ways: dict[str, Callable[[], float]] = {"ours": ours, "bare": bare, "published": published_step(size, world.device)}
    first = {name: way() for name, way in ways.items()}
    told = {"runs": alternate(ways, rounds, world.device), "first": first}
    ours.engine.close()
    return told


def run_switch(size: Size, rounds: int, world: World, keys: dict[str, Any]) -> dict[str, Any]:
    """Whole steps with one setting of the engine."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = memory_mib("VmRSS")
    step = OurStep(size, EngineConfig(global_batch=size.batch, **keys), world)
    started = time.perf_counter()
    losses = [step() for _ in range(WARM_UP_STEPS)]
    settle(world.device)
    warm, cpu = time.perf_counter(), cpu_s()
    losses += [step() for _ in range(rounds)]
    settle(world.device)
    told = {
        "samples": size.batch * rounds,
        "wall_s": time.perf_counter() - warm,
        "cpu_s": cpu_s() - cpu,
        "warm_up_s": warm - started,
        "peak_mib": memory_mib("VmHWM") - before,
        "losses": losses,
    }
    step.engine.close()
    return told


def run_scope(size: Size, rounds: int, world: World) -> dict[str, Any]:
    """Whole steps with what sees all ranks' pixels switched off one after the other."""
    worlds: dict[str, CountedWorld] = {}

    def step(name: str, scope: str, batch_norm: str, accumulation: int = 1) -> OurStep:
        worlds[name] = CountedWorld(world.rank, world.size, world.device)
        keys: dict[str, Any] = {"accumulation_steps": accumulation, "batch_norm": batch_norm, "precision": "fp32"}
        engine = EngineConfig(global_batch=size.batch, **keys)
        return OurStep(size, engine, worlds[name], LossConfig(scope=scope))  # type: ignore[arg-type]

    ways = {
        "global": step("global", "global", "global"),
        "local loss": step("local loss", "local", "global"),
        "local": step("local", "local", "local"),
    }
    if size.batch % (ACCUMULATION * world.size) == 0:
        ways["accumulated, exact"] = step("accumulated, exact", "global", "global", ACCUMULATION)
        ways["accumulated, micro"] = step("accumulated, micro", "micro", "global", ACCUMULATION)
    runs = alternate(ways, rounds, world.device)
    for way in ways.values():
        way.engine.close()
    calls = 1 + rounds
    return {"runs": runs, "told": {name: {key: value / calls for key, value in w.told.items()} for name, w in worlds.items()}}


def memory_mib(field: str) -> float:
    """Resident memory of this process, MiB: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def main() -> None:
    """Parses, joins the other ranks, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("loss", "step", "switch", "scope", "save"))
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", type=json.loads, default={})
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--meet", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ranks > 1:
        os.environ |= {"RANK": str(options.rank), "LOCAL_RANK": str(options.rank), "WORLD_SIZE": str(options.ranks)}
        where = f"file://{options.meet}"
        dist.init_process_group("gloo", where, timedelta(minutes=5), rank=options.rank, world_size=options.ranks)
    world = join("cpu")
    size = Size(options.encoder, options.crop_px, options.batch)
    match options.part:
        case "loss":
            told = run_loss(size, options.rounds, world)
        case "step":
            told = run_step(size, options.rounds, world)
        case "switch":
            told = run_switch(size, options.rounds, world, options.engine)
        case "scope":
            told = run_scope(size, options.rounds, world)
        case "save":
            with tempfile.TemporaryDirectory(prefix="cromss-save-") as folder:
                told = measure_saving(size, options.rounds, world, Path(folder))
    if world.is_main:
        print(json.dumps(told), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

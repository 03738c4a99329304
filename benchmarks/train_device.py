"""The training step on a GPU: called by benchmarks/train.py --device cuda.

The published size, two-branch ResNet-50 U-Net, 13 bands, micro batches of 128 at 256 px, in bfloat16 (the published step in
fp16). Utilisation is of the networks' multiplications alone, forward and backward, counted by torch, over the peak of the
device's dense bf16 arithmetic.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from datetime import date

import torch
from convert import machine, say, spread
from published_step import ATOL, largest_deviation
from torch.utils.flop_counter import FlopCounterMode
from train_contenders import run_loss
from train_ways import OurStep, Run, Size, alternate, bare_step, build_model, make_inputs, published_step

from cromss_dist.config import EngineConfig
from cromss_dist.train.step.engine import Engine
from cromss_dist.world import World, join

SIZE = Size("resnet50", 256, 128)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "B200": 2250}  # dense bf16, data sheets
PACKAGES = ("cromss-dist", "torch", "deepspeed", "segmentation-models-pytorch", "scipy", "numpy")
TARGET = 5
WAYS = ("bare", "ours", "ours, recomputing", "ours, compiled", "published, fp16")


def measure_device(options: argparse.Namespace) -> str:
    """The dated document. Raises SystemExit where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: torch finds no GPU on this machine. Run it where there is one; without --device the CPU is measured."
        )
    if options.golden and (deviation := largest_deviation(options.golden)) > ATOL:
        raise SystemExit(f"The published step is {deviation:.1e} off {options.golden}, which is more than {ATOL:.0e}.")
    world = join("cuda")
    name = torch.cuda.get_device_name()
    lines = [
        f"# Training on a GPU, {date.today().isoformat()}",
        "",
        f"- {name}, CUDA {torch.version.cuda}",
        *machine(None, PACKAGES),
        f"- {SIZE.batch} samples of {SIZE.crop_px} px a step, batches on the device; {options.rounds} turns; median "
        "(lowest-highest)",
        "",
        *loss_table(world, options.rounds),
        *step_table(world, options.rounds, name),
    ]
    return "\n".join(lines)


def loss_table(world: World, rounds: int) -> list[str]:
    """Prior and loss, ours against published, by wall time."""
    say("loss")
    runs = run_loss(SIZE, rounds, world)["runs"]
    lines = ["## Prior and loss", "", "| | ours, ms | published, ms | times as fast | target |", "|---|---|---|---|---|"]
    for what in ("prior", "loss", "both"):
        ours, published = (_milliseconds(runs, who, what) for who in ("ours", "published"))
        faster = spread([theirs / mine for mine, theirs in zip(ours, published, strict=True)])
        aim = "-" if what == "prior" else str(TARGET)
        lines.append(f"| {what} | {spread(ours, 2)} | {spread(published, 2)} | {faster} | {aim} |")
    return [*lines, "", "The published prior is SciPy's on one core; its data workers make it beside the training.", ""]


def _milliseconds(runs: dict[str, list[Run]], who: str, what: str) -> list[float]:
    if what == "both":
        return [a + b for a, b in zip(_milliseconds(runs, who, "prior"), _milliseconds(runs, who, "loss"), strict=True)]
    return [1e3 * run["wall_s"] for run in runs[f"{who} {what}"]]


def step_table(world: World, rounds: int, name: str) -> list[str]:
    """Whole steps, one way after the other, since two do not fit."""
    flops = count_flops(world.device)
    peak = next((PEAK_TFLOPS[part] for part in PEAK_TFLOPS if part in name.split()[-1] or part in name.split()), None)
    lines = [
        "## A step",
        "",
        f"{flops / SIZE.batch / 1e9:.0f} GFLOP a sample, forward and backward; peak of this device: "
        f"{f'{peak} TFLOP/s, dense bf16' if peak else 'not known here'}.",
        "",
        "| way | samples/s | utilisation | peak memory, GiB | first two steps, s |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        say(way)
        try:
            steps, first_s, memory_gib = time_steps(way, world, rounds)
        except torch.OutOfMemoryError:
            lines.append(f"| {way} | out of memory | - | - | - |")
            continue
        used = f"{100 * flops / statistics.median(steps) / (peak * 1e12):.1f} %" if peak else "-"
        rate = spread([SIZE.batch / seconds for seconds in steps], 0)
        lines.append(f"| {way} | {rate} | {used} | {memory_gib:.1f} | {first_s:.1f} |")
    return [*lines, ""]


def time_steps(way: str, world: World, rounds: int) -> tuple[list[float], float, float]:
    """Seconds of each step, of the first two, and the peak of memory, GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine: Engine | None = None
    step: Callable[[], float]
    if way == "bare":
        step = bare_step(SIZE, world.device, torch.bfloat16)
    elif way.startswith("published"):
        step = published_step(SIZE, world.device)
    else:
        switches = EngineConfig(
            global_batch=SIZE.batch,
            precision="bf16",
            compile=way.endswith("compiled"),
            activation_checkpointing=way.endswith("recomputing"),
        )
        step = ours = OurStep(SIZE, switches, world)
        engine = ours.engine
    first = sum(run["wall_s"] for run in alternate({way: step}, 2, world.device, warm_up=0)[way])
    steps = [run["wall_s"] for run in alternate({way: step}, rounds, world.device)[way]]
    if engine:
        engine.close()
    return steps, first, torch.cuda.max_memory_allocated() / 2**30


def count_flops(device: torch.device) -> float:
    """Of the networks in a step, forward and backward: a multiplication and its addition are two."""
    model, example = build_model(SIZE, device), make_inputs(SIZE, device, 0, 1).example
    model.eval()  # batch norms of one sample
    with FlopCounterMode(display=False) as counter:
        s1, s2 = model(*example.images.values())
        (s1.sum() + s2.sum()).backward()
    return SIZE.batch * float(counter.get_total_flops())

"""One process of `cromss probe`: measures a part of it and writes what it took as JSON.

Layer 4. `python -m cromss_dist.plan.measure alone|together OUT ...`; see cromss_dist/plan/probe.py, which starts it.
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cromss_dist.config import EngineConfig, LossConfig, ModelConfig, TrainConfig, plan_batches
from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.loading import Source, TrainLoader, TrainPlan
from cromss_dist.data.loading.augment import prepare, train_geometry
from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.prior import label_prior
from cromss_dist.data.store.open import open_dataset
from cromss_dist.data.synthetic import SyntheticConfig, write_archive
from cromss_dist.losses import CromssLoss
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.plan.fit import fit_line, fit_link, fit_rates
from cromss_dist.plan.machine import Line
from cromss_dist.plan.work import Operators, Timed, add_up, clock
from cromss_dist.schema import NUM_CLASSES, S1_BANDS, S2_BANDS, Batch
from cromss_dist.train.checkpoint.writer import write_share
from cromss_dist.train.step.engine import Engine, Precision, resolve_precision
from cromss_dist.world import World, join

# Encoder, crop in px, samples. Together they have every kind of operator; ResNet-50 with few and with many samples, since
# flops grow with them and the bytes of weights do not.
ON_CPU = (
    ("resnet18", 64, 4),
    ("resnet18", 96, 2),
    ("resnet50", 64, 16),
    ("resnet50", 64, 8),
    ("resnet50", 64, 3),
    ("mobilenet_v2", 64, 3),
)
ON_GPU = (("resnet18", 256, 16), ("resnet50", 128, 8), ("resnet50", 256, 16), ("mobilenet_v2", 256, 16))
REPEATS = 2
LOCATIONS = 3
READ_BATCHES = 40
LOSS_CROPS_PX = (64, 192)
SHARE_MIB = 64
MESSAGES_BYTES = (2048, 300_000, 4 << 20, 32 << 20)  # a batch norm's, a histogram's, a bucket's
MESSAGE_REPEATS = 12
EPOCH = 40.0  # half way up the ramp, where selection works


def measure_alone(device: torch.device, precision: Precision, folder: Path) -> dict[str, Any]:
    """All that one rank can measure."""
    world = World(0, 1, device)
    sizes = ON_GPU if device.type == "cuda" else ON_CPU
    runs = [_measure_networks(world, precision, *size) for size in sizes]
    rates = fit_rates(call for run in runs for call in run["calls"])
    ratios = []
    for run in runs:
        summed = sum(rates[kind].seconds(amount) for kind, amount in add_up(run["calls"]).items())
        ratios.append(run["step_s"] / summed)
    batch, read_bytes_per_s = _read(folder, pin=device.type == "cuda")
    return {
        "rates": {kind: dataclasses.asdict(rate) for kind, rate in rates.items()},
        "step_factor": statistics.geometric_mean(ratios),
        "residual": statistics.stdev(math.log(ratio) for ratio in ratios),
        "optimizer": dataclasses.asdict(fit_line([run["parameters"] for run in runs], [run["optimizer_s"] for run in runs])),
        **_measure_pixels(batch, device),
        "read_bytes_per_s": read_bytes_per_s,
        "write_bytes_per_s": _measure_writing(folder),
        "alone_s": measure_step(device, precision, sizes[0]),
    }


def _measure_networks(world: World, precision: Precision, encoder: str, crop_px: int, samples: int) -> dict[str, Any]:
    """Operators one by one; then whole passes through the engine, and its optimiser step."""
    s1, s2 = _images(world.device, crop_px, samples)
    engine_config = EngineConfig(
        global_batch=samples, precision=precision, activation_checkpointing=False, batch_norm="local", device="auto"
    )
    model = TwoBranchUNet(ModelConfig(encoder=encoder), len(S1_BANDS), len(S2_BANDS))
    engine = Engine(model, engine_config, TrainConfig(lr=1e-6), plan_batches(engine_config, 1), world)
    calls: list[list[Timed]] = []
    passes, steps = [], []
    for number in range(REPEATS + 1):
        pass_s = _seconds(world.device, lambda: engine.backward(sum_of(engine.forward(s1, s2))))
        step_s = _seconds(world.device, engine.step)
        with Operators(world.device) as operators:
            logits = engine.forward(s1, s2)
            engine.backward(sum_of(logits))
        engine.step()
        if number:  # the first one warms up
            passes.append(pass_s)
            steps.append(step_s)
            calls.append(operators.timed())
    engine.close()
    quickest = [Timed(same[0].kind, same[0].amount, min(call.seconds for call in same)) for same in zip(*calls, strict=True)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"calls": quickest, "step_s": min(passes), "optimizer_s": min(steps), "parameters": parameters}


def sum_of(logits: Sequence[Tensor]) -> Tensor:
    """A loss that costs nothing."""
    return logits[0].float().mean() + logits[1].float().mean()


def measure_step(device: torch.device, precision: Precision, size: tuple[str, int, int]) -> float:
    """Seconds of forward and backward passes without an engine, the quickest."""
    encoder, crop_px, samples = size
    s1, s2 = _images(device, crop_px, samples)
    model: nn.Module = TwoBranchUNet(ModelConfig(encoder=encoder), len(S1_BANDS), len(S2_BANDS)).to(device)

    def passes() -> None:
        half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        with torch.autocast(device.type, half, enabled=precision != "fp32"):
            total = sum_of(model(s1, s2))
        torch.autograd.backward(total)
        model.zero_grad()

    return min(_seconds(device, passes) for _ in range(REPEATS + 2))


def _measure_pixels(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Prior, images and loss of small and of large crops."""
    samples, patch_px = len(batch.keys), batch.labels.shape[-1]
    loss = CromssLoss(LossConfig())
    bands = len(S1_BANDS) + len(S2_BANDS) + 1  # the label goes with them
    pixels: list[float] = []
    prior_s: list[float] = []
    images_s: list[float] = []
    loss_s: list[float] = []
    for crop_px in LOSS_CROPS_PX:
        geometry = train_geometry(Draws(0, batch.epochs.numpy(), batch.sample_ids.numpy()), patch_px, crop_px, 0.5, 0.2, 90)
        rows, cols = geometry.rows.to(device), geometry.cols.to(device)
        labels, seasons = batch.labels.to(device), batch.seasons.to(device)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, samples, NUM_CLASSES, crop_px, crop_px, generator=generator).to(device)
        example = prepare(batch, geometry, S1_BANDS, S2_BANDS, "ts", device)

        def whole_loss(logits: Tensor = logits, example: Any = example) -> None:
            leaf = logits.clone().requires_grad_()
            total = loss(leaf[0], leaf[1], example.label, example.prior, EPOCH, example.weights).total
            torch.autograd.grad(total, leaf)

        def prior(rows: Tensor = rows, cols: Tensor = cols, labels: Tensor = labels, seasons: Tensor = seasons) -> None:
            label_prior(labels, seasons, "ts", NUM_CLASSES, rows=rows, cols=cols)

        def images(geometry: Any = geometry) -> None:
            prepare(batch, geometry, S1_BANDS, S2_BANDS, "none", device)

        pixels.append(samples * crop_px**2)
        for into, call in ((prior_s, prior), (images_s, images), (loss_s, whole_loss)):
            into.append(min(_seconds(device, call) for _ in range(REPEATS + 2)))
    lines: dict[str, Line] = {
        "prior": fit_line(pixels, prior_s),
        "images": fit_line([bands * number for number in pixels], images_s),
        "loss": fit_line(pixels, loss_s),
    }
    return {name: dataclasses.asdict(line) for name, line in lines.items()}


def _read(folder: Path, pin: bool) -> tuple[Batch, float]:
    """A batch of a synthetic dataset, and bytes a second at which one thread reads them."""
    with tempfile.TemporaryDirectory(prefix=".cromss-probe-", dir=folder) as place:
        archive = Path(place) / "archive"
        write_archive(archive, SyntheticConfig(num_locations=LOCATIONS, seed=1), lambda _: None)
        dataset = open_dataset(convert(open_archive(archive), Path(place) / "shards").folder)
        plan = TrainPlan(sources=(Source(dataset),), seed=0, global_batch=LOCATIONS, micro_batch=LOCATIONS)
        with TrainLoader(plan=plan, threads=1, pin_memory=pin) as loader:
            batch = next(loader)
            size = sum(values.nbytes for values in batch.images.values()) + batch.labels.nbytes
            for _ in range(2):  # what was read ahead
                next(loader)
            started = time.perf_counter()
            for _ in range(READ_BATCHES):
                next(loader)
            return batch, READ_BATCHES * size / (time.perf_counter() - started)


def _measure_writing(folder: Path) -> float:
    with tempfile.TemporaryDirectory(prefix=".cromss-probe-", dir=folder) as place:
        share = {"share": torch.rand(SHARE_MIB << 18)}
        started = time.perf_counter()
        write_share(Path(place), 0, 1, share)
        return (SHARE_MIB << 20) / (time.perf_counter() - started)


def measure_together(world: World, precision: Precision) -> dict[str, Any]:
    """What ranks of a node cost each other: passes at once, and sums of several sizes between passes.

    A sum waits for the slowest rank and for processes that compute, so it is timed behind a little work of each, as in a step.
    """
    sizes = ON_GPU if world.device.type == "cuda" else ON_CPU
    world.barrier()
    step_s = measure_step(world.device, precision, sizes[0])
    work = nn.Conv2d(32, 32, 3).to(world.device)
    image = torch.rand(2, 32, 64, 64, device=world.device)
    seconds = []
    for size in MESSAGES_BYTES:
        message = torch.zeros(size // 8, dtype=torch.float64, device=world.device)
        spans = []
        for _ in range(MESSAGE_REPEATS):
            with torch.no_grad():
                work(image)
            _settle(world.device)
            started = time.perf_counter()
            world.reduce_sum(message)
            _settle(world.device)
            spans.append(time.perf_counter() - started)
        seconds.append(statistics.median(spans))
    link = fit_link(MESSAGES_BYTES, seconds, world.size)
    return {"together_s": step_s, "link": dataclasses.asdict(link)}


def _images(device: torch.device, crop_px: int, samples: int) -> tuple[Tensor, Tensor]:
    s1, s2 = (torch.rand(samples, len(bands), crop_px, crop_px, device=device) for bands in (S1_BANDS, S2_BANDS))
    return s1, s2


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    _settle(device)
    started = clock()
    call()
    _settle(device)
    return clock() - started


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Joins the other ranks, measures, writes; rank 0's is what counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("alone", "together"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.ranks > 1:
        backend = "gloo" if options.device == "cpu" else "nccl"
        meet = f"file://{options.out}.meet"
        dist.init_process_group(backend, meet, timedelta(minutes=3), rank=options.rank, world_size=options.ranks)
    world = join(options.device)
    precision = resolve_precision(EngineConfig(), world.device)
    if options.part == "alone":
        told = measure_alone(world.device, precision, options.folder)
    else:
        told = measure_together(world, precision)
    if world.is_main:
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        memory = torch.cuda.get_device_properties(world.device).total_memory if world.device.type == "cuda" else 0
        device = {"device": world.device.type, "precision": precision, "device_name": name, "memory_bytes": memory}
        options.out.write_text(json.dumps(told | device))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

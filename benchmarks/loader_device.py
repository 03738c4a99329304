"""What reaches a GPU: called by benchmarks/loader.py --device cuda, once that has written the shards at WORK/ours.

Batches are read by threads into page-locked memory, copied and prepared (up-sampled, cropped, flipped, label prior) on the
device, and given to two ResNet-50 encoders at 256 px, forward and backward, in bfloat16. A step on one prepared batch that
stays on the device is what a GPU would do if nothing had to be loaded: the idle share is what is missing to that.
"""

import argparse
import time
from collections.abc import Callable
from datetime import date

import torch

from cromss_dist.data.loading.augment import prepare, train_geometry
from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.data.loading.plan import Source, TrainPlan
from cromss_dist.data.store.open import open_dataset
from cromss_dist.models.encoder import build_encoder
from cromss_dist.schema import S1_BANDS, S2_BANDS, Batch, Example

CROP_PX = 256
WARM_UP_STEPS = 20
STEPS = 100
MICRO_BATCHES = (32, 128)
THREADS = 8
SEED = 0


def measure_device(options: argparse.Namespace) -> str:
    """The dated document. Raises SystemExit where there is no GPU or nothing to read."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: torch finds no GPU on this machine. Run it where there is one; without --device the host is measured."
        )
    if options.work is None or not (options.work / "ours").is_dir():
        raise SystemExit(f"--work {options.work}: there is no folder 'ours' in it; run without --device first, which makes it.")
    dataset = open_dataset(options.work / "ours")
    lines = [
        f"# Loading to a GPU, {date.today().isoformat()}",
        "",
        f"- {torch.cuda.get_device_name()}, torch {torch.__version__}; {THREADS} threads read; {STEPS} steps of each kind",
        "- loaded: handed out in page-locked memory; prepared: on the device; alone: of one batch again and again",
        "",
        "samples/s:",
        "",
        "| micro batch | loaded | prepared | trained | trained alone | idle share | share of prepare |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in MICRO_BATCHES:
        plan = TrainPlan(sources=[Source(dataset)], seed=SEED, global_batch=size, micro_batch=size)
        with TrainLoader(plan=plan, threads=THREADS, prefetch=4, pin_memory=True) as loader:
            lines.append(_row(loader, size))
    return "\n".join([*lines, ""])


def _row(loader: TrainLoader, size: int) -> str:
    device, patch_px = torch.device("cuda"), loader.plan.dataset.patch_px
    encoders = torch.nn.ModuleList([build_encoder("resnet50", 5, len(bands)) for bands in (S1_BANDS, S2_BANDS)]).to(device)

    def on_device(batch: Batch) -> Example:
        geometry = train_geometry(Draws(SEED, batch.epochs.numpy(), batch.sample_ids.numpy()), patch_px, CROP_PX, 0.5, 0.2, 90.0)
        return prepare(batch, geometry, S1_BANDS, S2_BANDS, "ts", device)

    def train(example: Example) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            features = [encoder(image)[-1] for encoder, image in zip(encoders, example.images.values(), strict=True)]
            loss = sum((feature.float().square().mean() for feature in features), torch.zeros((), device=device))
        loss.backward()
        encoders.zero_grad(set_to_none=True)

    host = next(loader)
    resident = on_device(host)
    loaded = _seconds_a_step(lambda: next(loader))
    prepared = _seconds_a_step(lambda: on_device(next(loader)))
    trained = _seconds_a_step(lambda: train(on_device(next(loader))))
    no_loading = _seconds_a_step(lambda: train(on_device(host)))
    step_only = _seconds_a_step(lambda: train(resident))
    cells = [f"{size / seconds:.0f}" for seconds in (loaded, prepared, trained, no_loading)]
    shares = [f"{max(0.0, 1 - no_loading / trained):.1%}", f"{1 - step_only / no_loading:.1%}"]
    return f"| {size} | {' | '.join([*cells, *shares])} |"


def _seconds_a_step(step: Callable[[], object]) -> float:
    for _ in range(WARM_UP_STEPS):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / STEPS


if __name__ == "__main__":
    raise SystemExit("Run benchmarks/loader.py --device cuda.")

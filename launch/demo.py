"""The whole system on one small archive, in a few minutes on two cores: what `make demo` runs.

Layer 5. Each stage is a command that is printed before it runs, so that a reader can type it for their own data.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cromss_dist import load_encoder
from cromss_dist.data.store.index import ShardIndex, open_shards
from cromss_dist.errors import main_guard
from cromss_dist.parse import parse_run
from cromss_dist.schema import MODALITIES
from cromss_dist.train.run.folder import SUMMARY_FILE, RunSummary

CONFIG = "configs/pretrain/demo.yaml"
FULL_CONFIG = "configs/pretrain/resnet50_13b_middle.yaml"
NUM_LOCATIONS = 48
TRAIN_SAMPLES = 5000
RAMP_SHARE = 0.4  # of the run


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help="SSL4EO-S12 + NoLDO-S12 folder; without it, a synthetic one is made")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default %(default)s)")
    parser.add_argument("--locations", type=int, default=NUM_LOCATIONS, help="of the synthetic archive (default %(default)s)")
    parser.add_argument("--samples", type=int, default=TRAIN_SAMPLES, help="to train on (default %(default)s)")
    options = parser.parse_args()
    console, out = Console(), options.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    archive = options.archive
    if archive is None:
        archive = out / "archive"
        console.rule("1/4  a synthetic archive with known truth")
        if archive.exists():
            console.print(f"{archive} is there from an earlier run and is kept; `make clean` removes it.", highlight=False)
        else:
            _run(console, "tools/synth.py", str(archive), "--locations", str(options.locations))
    else:
        console.rule("1/4  your archive")
        console.print(f"{archive}")

    console.rule("2/4  shards")
    shards = out / f"shards-{archive.name}"
    _run(console, "tools/shard.py", str(archive), str(shards), "--overwrite")

    console.rule("3/4  CromSS on two workers: Ray, DeepSpeed, MLflow")
    index = open_shards(shards)
    summary = _train(console, out / "runs", shards, len(index), options.samples)

    console.rule("4/4  the registry")
    store = summary.tracking_uri
    assert store is not None, "the demo's config names a store"
    _show_and_run(console, [_command("cromss"), "registry", "list", "--tracking_uri", store])
    maps = {name: _look_up(f"{name}@candidate", store) for name in summary.registered}

    console.rule("done")
    console.print(_table(index, summary, maps, time.perf_counter() - started))
    panels = sorted((Path(summary.run_dir) / "panels").glob("*.png"))
    console.print(f"The last prediction panel: {panels[-1]}", soft_wrap=True, highlight=False)
    console.print("Next:")
    for arguments in (
        [_command("mlflow"), "ui", "--backend-store-uri", store, "--host", "127.0.0.1"],
        [_command("cromss"), "registry", "show", f"{list(maps)[-1]}@candidate", "--tracking_uri", store],
        [sys.executable, "launch/pretrain.py", "--config", FULL_CONFIG, "--data.shards", str(shards), "--dry-run"],
    ):
        console.print(f"  {_shown(arguments)}", highlight=False, soft_wrap=True)
    return 0


def _train(console: Console, runs: Path, shards: Path, num_locations: int, samples: int) -> RunSummary:
    """Pretrains on about `samples` samples, whatever the archive's size."""
    val_fraction = parse_run(["--config", CONFIG]).config.data.val_fraction
    epochs = samples / max(1, round(num_locations * (1 - val_fraction)))
    lengths = {
        "train.epochs": epochs,
        "train.warmup_epochs": 0.02 * epochs,
        "train.validate_every_epochs": epochs / 3,
        "checkpoint.every_epochs": epochs / 3,
        "loss.ramp_epochs": RAMP_SHARE * epochs,
    }
    before = set(runs.glob(f"*/{SUMMARY_FILE}"))
    options = [text for key, value in lengths.items() for text in (f"--{key}", f"{value:.4g}")]
    _run(console, "launch/pretrain.py", "--config", CONFIG, "--output", str(runs), "--data.shards", str(shards), *options)
    (path,) = set(runs.glob(f"*/{SUMMARY_FILE}")) - before
    return RunSummary(**json.loads(path.read_text()))


def _look_up(ref: str, store: str) -> str:
    """Loads a registered encoder, feeds it, and tells what came out."""
    import torch

    encoder = load_encoder(ref, tracking_uri=store).eval()
    with torch.no_grad():
        maps = encoder(torch.zeros(1, len(encoder.bands), 64, 64))
    return " ".join("x".join(map(str, feature.shape[1:])) for feature in maps)


def _table(index: ShardIndex, summary: RunSummary, maps: dict[str, str], seconds: float) -> Table:
    table = Table(title="cromss_dist demo", show_header=False, title_justify="left")
    size_mib = sum(shard["size"] for shard in index.manifest["shards"]) / 2**20
    table.add_row("shards", f"{len(index.shard_sizes)} ({len(index)} locations x 4 seasons, {size_mib:.0f} MiB)")
    table.add_row(
        "trained on", f"{summary.samples} samples of {summary.num_train} locations, {summary.samples_per_s:.1f} samples/s"
    )
    table.add_row(
        "validation loss", f"{summary.before['val/loss/total']:.3f} before, {summary.after['val/loss/total']:.3f} after"
    )
    for kind, truth in (("miou", "noisy labels"), ("reference_miou", "clean truth")):
        for modality in MODALITIES:
            key = f"val/{kind}_{modality}"
            if key in summary.after:
                text = f"{summary.before[key]:.3f} before, {summary.after[key]:.3f} after"
                table.add_row(f"mIoU {modality.upper()}, {truth}", text)
    for name, version in summary.registered.items():
        table.add_row("registered", f"{name} version {version}, alias candidate")
        table.add_row("  looked up, fed 64 px", f"feature maps {maps[name]}")
    table.add_row("time", f"{seconds:.0f} s")
    return table


def _command(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).with_name(name))


def _run(console: Console, script: str, *arguments: str) -> None:
    _show_and_run(console, [sys.executable, script, *arguments])


def _show_and_run(console: Console, arguments: list[str]) -> None:
    console.print(f"$ {_shown(arguments)}", style="bold", highlight=False, soft_wrap=True)
    code = subprocess.run(arguments, check=False).returncode
    if code:
        raise SystemExit(code)  # the command has said why


def _shown(arguments: list[str]) -> str:
    """A command as one would type it in this folder."""
    here = Path.cwd()
    names = [os.path.relpath(a, here) if Path(a).is_absolute() and Path(a).is_relative_to(here) else a for a in arguments]
    return shlex.join(names)


if __name__ == "__main__":
    sys.exit(main_guard(main))

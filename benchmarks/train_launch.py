"""Runs of the product against a bare loop over its loader: a part of benchmarks/train.py."""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from convert import HERE, call, say, spread
from train_processes import percent

from cromss_dist.data.store.index import open_shards

WAYS = ("bare", "in process", "Ray")
LOG_STEPS, INTERVALS, WARM_UP_INTERVALS = 4, 6, 1
SYNTHETIC_LOCATIONS = 16


def launch_group(options: argparse.Namespace) -> list[str]:
    """Runs of the product against a bare loop over its loader."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="cromss-bench-") as folder:
        config = make_run(options, Path(folder))
        for number in range(options.repeats):
            for way in WAYS:
                say(f"launch {way}, {number + 1} of {options.repeats}")
                rates[way].append(statistics.median(run_of(way, config)[WARM_UP_INTERVALS:]))
    lines = [
        f"## A run of one worker: {options.encoder}, {options.batch} x {options.crop_px} px a step, loaded and augmented",
        "",
        f"Samples/s when running: median of {INTERVALS - WARM_UP_INTERVALS} intervals of {LOG_STEPS} steps, without validation "
        "and saving. Each run is a process of its own, so the spread is the machine's from minute to minute.",
        "",
        "| way | samples/s | time over bare | over the one before |",
        "|---|---|---|---|",
    ]
    before = "bare"
    for way in WAYS:
        over = [percent([a / b for a, b in zip(rates[base], rates[way], strict=True)]) for base in ("bare", before)]
        lines.append(f"| {way} | {spread(rates[way], 2)} | {' | '.join(['-', '-'] if way == 'bare' else over)} |")
        before = way
    return [*lines, ""]


def make_run(options: argparse.Namespace, folder: Path) -> Path:
    """Shards and a config."""
    archive, shards = options.archive, folder / "shards"
    tools = HERE.parent / "tools"
    if archive is None:
        archive = folder / "archive"
        call([sys.executable, str(tools / "synth.py"), str(archive), "--locations", str(SYNTHETIC_LOCATIONS)])
    call([sys.executable, str(tools / "shard.py"), str(archive), str(shards)])
    locations = len(open_shards(shards)) - 1  # one is held out
    epochs = INTERVALS * LOG_STEPS * options.batch / locations
    settings = {
        "output": str(folder / "runs"),
        "data": {"shards": str(shards), "crop_px": options.crop_px},
        "model": {"encoder": options.encoder},
        "train": {"epochs": epochs, "log_every_steps": LOG_STEPS, "validate_every_epochs": epochs},
        "checkpoint": {"every_epochs": epochs},
        "engine": {"device": "cpu", "global_batch": options.batch},
        "tracking": {"register": False},
        "launch": {"workers": 1},
    }
    config = folder / "run.yaml"
    config.write_text(json.dumps(settings))  # which is YAML
    return config


def run_of(way: str, config: Path) -> list[float]:
    """Samples a second of each interval of a run."""
    if way == "bare":
        lines = call([sys.executable, str(HERE / "train_bare.py"), str(config)]).splitlines()
        return [json.loads(line)["samples_per_s"] for line in lines]
    runs = Path(json.loads(config.read_text())["output"])
    known = set(runs.glob("*/events.jsonl"))
    launch = [sys.executable, str(HERE.parent / "launch" / "pretrain.py"), "--config", str(config)]
    call([*launch, "--launch.ray", "true" if way == "Ray" else "false"])
    (file,) = set(runs.glob("*/events.jsonl")) - known
    events = [json.loads(line) for line in file.read_text().splitlines()]
    return [event["metrics"]["perf/samples_per_s"] for event in events if event["event"] == "progress"]

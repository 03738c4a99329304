"""Folders of runs as runs leave them, without the training: spools, panels, results of transfers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cromss_dist.schema import BANDS, CLASS_NAMES, Modality
from cromss_dist.tracking.run.spool import EVENTS_FILE
from cromss_dist.transfer.results import EncoderUsed, LabelsUsed, Mode, Tiles, TransferResult, write_result

BEGAN = 1_700_000_000.0
NUM_STEPS = 20
_LABELLED = CLASS_NAMES[:2]  # that have figures of their own: each is drawn


def write_spool(folder: Path, *events: Mapping[str, Any]) -> None:
    """Appends lines, a second apart."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EVENTS_FILE).open("a") as file:
        for number, event in enumerate(events):
            file.write(json.dumps({"event": event["event"], "time": BEGAN + number, **event}) + "\n")


def pretraining_run(folder: Path, seed: int = 0, num_steps: int = NUM_STEPS, **config: Any) -> Path:
    """A finished run with figures of both modalities, three validations and three panels."""
    events: list[Mapping[str, Any]] = [
        {"event": "run", "run": "a" * 32, "name": folder.name, "experiment": "tests"},
        {"event": "attempt", "number": 1, "step": 0},
        {"event": "tags", "values": {"git_revision": "b" * 40, "device": "cpu", "world_size": "2"}},
        {"event": "params", "values": {"name": folder.name, "seed": seed, "train": {"lr": 1e-3}, **config}},
        {"event": "dataset", "name": "shards", "digest": "d" * 64, "source": "/data/shards"},
        {"event": "start", "total_samples": 16 * num_steps},
    ]
    for step in range(1, num_steps + 1):
        metrics = {
            "train/loss/total": 9 / step + seed,
            "train/agreement": 0.5,
            "train/lr": 1e-3,
            "train/epoch": step,
            "perf/samples_per_s": 20,
        }
        for modality in ("s1", "s2"):
            metrics |= {f"train/loss/segmentation_{modality}": 2 / step, f"train/kept_{modality}": 0.7}
            metrics |= {f"train/kept_{modality}/{name}": 1 - 0.4 * step / num_steps for name in _LABELLED}
        events.append({"event": "progress", "step": step, "samples": 16 * step, "metrics": metrics})
    for step in (0, num_steps // 2, num_steps):
        share = step / num_steps
        metrics = {"val/loss/total": 5 - share}
        for modality, best in (("s1", 0.4), ("s2", 0.6)):
            metrics |= {f"val/miou_{modality}": best * share, f"val/reference_miou_{modality}": (best + 0.05) * share}
            metrics |= {f"val/iou_{modality}/{name}": best * share for name in _LABELLED}
        events.append({"event": "validation", "step": step, "samples": 16 * step, "metrics": metrics})
        panel(folder / "panels" / f"step_{step:07d}.png")
    write_spool(folder, *events, {"event": "end", "status": "FINISHED", "error": None})
    return folder


def panel(path: Path) -> Path:
    """A small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(2, 1))
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def transfer_run(
    folder: Path, ref: str = "cromss-resnet50-s2/1", seed: int = 0, skill: float = 0.6, mode: Mode = "frozen",
    modality: Modality = "s2", random: bool = False, class_names: tuple[str, ...] = CLASS_NAMES, num_tiles: int = 30,
) -> Path:  # fmt: skip
    """A finished transfer: tiles of 1,000 labelled pixels, of which about `skill` are right; equal seeds have equal labels."""
    draws, classes = np.random.default_rng([seed, num_tiles]), len(class_names)
    of_class = draws.dirichlet(np.linspace(0.3, 2, classes), num_tiles)
    right = np.eye(classes) * skill + (1 - skill) * np.random.default_rng(7).dirichlet(np.ones(classes), classes)
    confusion = np.rint(1000 * of_class[:, :, None] * right).astype(np.int32)
    tiles = Tiles(tuple(f"tile_{i:04d}" for i in range(num_tiles)), confusion)
    result = TransferResult(
        task="dw",
        mode=mode,
        protocol="default",
        seed=seed,
        encoders={modality: EncoderUsed(ref, "random" if random else "pretrained", "resnet50", BANDS[modality])},
        labels=LabelsUsed(100, "e" * 64),
        train_digest="1" * 64,
        test_digest="2" * 64,
        class_names=class_names,
        confusion=tiles.total,
        tiles=num_tiles,
        decoder="deeplabv3plus",
        steps=50,
        samples=1600,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder, result, tiles)
    return folder

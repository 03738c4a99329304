"""What saving and loading a checkpoint takes, ours and others': called by train_contenders.py.

Every way saves weights, Adam's moments and buffers of the same engine, waits until they are on disk, and loads them back into
it. Files are in the page cache when they are read. ours: hashed while written, committed, verified before it is loaded.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from train_ways import OurStep, Run, Size

from cromss_dist.config import EngineConfig
from cromss_dist.train.checkpoint.store import Checkpoints
from cromss_dist.world import World


class Saving:
    """Saves and loads one engine in several ways; each returns seconds by name.

    Args:
        step: Whose engine it is; has taken a step.
        world: Of one rank.
        folder: To write into.
    """

    def __init__(self, step: OurStep, world: World, folder: Path) -> None:
        self.step, self.engine, self.folder = step, step.engine, folder
        self.checkpoints = Checkpoints(folder / "ours", world, keep=1, on_failure="stop")
        self.number = 0

    def ours(self) -> Run:
        """The product's: `held` is what the loop waits for, `written` when it is committed, a step trained meanwhile."""
        self.number += 1
        clock = Clock()
        tensors = self.engine.snapshot()
        told = {"snapshot_s": clock.lap()}
        self.checkpoints.save(self.number, self.engine.state(), tensors)
        told["held_s"] = told["snapshot_s"] + clock.lap()
        self.checkpoints.wait()
        told["written_s"] = told["held_s"] + clock.lap()
        saved = self.checkpoints.newest()
        told["verify_s"] = clock.lap()
        assert saved is not None
        self.engine.restore(saved.tensors, saved.state)
        told["load_s"] = told["verify_s"] + clock.lap()
        return told

    def overlapped(self) -> Run:
        """A training step alone, and one while a checkpoint is written."""
        self.number += 1
        clock = Clock()
        self.step()
        told = {"step_s": clock.lap()}
        self.checkpoints.save(self.number, self.engine.state(), self.engine.snapshot())
        clock.lap()
        self.step()
        told["step_while_writing_s"] = clock.lap()
        self.checkpoints.wait()
        told["rest_s"] = clock.lap()
        return told

    def torch_save(self) -> Run:
        """`torch.save` of model and optimizer, no hash; `torch.load` of tensors alone."""
        path, model, optimizer = self.folder / "torch.pt", self.step.model, self.engine.optimizer
        clock = Clock()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        flush([path])
        told = {"held_s": clock.lap()}
        found = torch.load(path, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        return told | {"written_s": told["held_s"], "load_s": clock.lap()}

    def safetensors(self) -> Run:
        """Our tensors by `save_file`, then the file's sha256; read back with the hash."""
        path = self.folder / "plain.safetensors"
        clock = Clock()
        save_file(self.engine.snapshot(), path)
        digest(path)
        flush([path])
        told = {"held_s": clock.lap()}
        digest(path)
        self.engine.restore(load_file(path), self.engine.state())
        return told | {"written_s": told["held_s"], "load_s": clock.lap()}

    def deepspeed(self) -> Run:
        """DeepSpeed's own files, pickles; no hash."""
        folder, inner = self.folder / "deepspeed", self.engine._engine
        clock = Clock()
        inner.save_checkpoint(str(folder), tag="step")
        flush([path for path in folder.rglob("*") if path.is_file()])
        told = {"held_s": clock.lap()}
        inner.load_checkpoint(str(folder), tag="step")
        return told | {"written_s": told["held_s"], "load_s": clock.lap()}


class Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since it was made, or since the last lap."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def measure_saving(size: Size, rounds: int, world: World, folder: Path) -> dict[str, Any]:
    """All ways in turn, `rounds` times after one."""
    step = OurStep(size, EngineConfig(global_batch=size.batch, precision="fp32"), world)
    step()
    tensors = step.engine.snapshot()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    del tensors
    saving = Saving(step, world, folder)
    ways: dict[str, Callable[[], Run]] = {
        "ours": saving.ours,
        "overlapped": saving.overlapped,
        "torch.save": saving.torch_save,
        "safetensors": saving.safetensors,
        "DeepSpeed": saving.deepspeed,
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    with saving.checkpoints:
        for number in range(1 + rounds):
            for name, way in ways.items():
                told = way()
                if number:
                    runs[name].append(told)
    step.engine.close()
    return {"runs": runs, "bytes": num_bytes}


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(paths: list[Path]) -> None:
    """Waits until files are on disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())

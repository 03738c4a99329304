"""What ranks run in the tests of checkpoints, and what a checkpoint of theirs must hold."""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cromss_dist.train.checkpoint import writer
from cromss_dist.train.checkpoint.reader import Saved
from cromss_dist.train.checkpoint.store import Checkpoints
from cromss_dist.world import World

ALONE = World(0, 1, torch.device("cpu"))
NUM_VALUES = 3000


def share(step: int, rank: int) -> dict[str, Tensor]:
    """Every value tells of which step it is."""
    return {f"weights/{rank}": torch.full((NUM_VALUES,), float(step)), f"buffers/num_{rank}": torch.tensor(step)}


def assert_whole(saved: Saved | None, step: int, world_size: int = 2) -> None:
    """A checkpoint of `share` of all ranks: nothing missing, nothing of another step."""
    assert saved is not None
    assert (saved.step, saved.state, saved.world_size) == (step, {"step": step}, world_size)
    assert set(saved.tensors) == {name for rank in range(world_size) for name in share(step, rank)}
    for tensor in saved.tensors.values():
        assert bool((tensor == step).all())


def newest(folder: Path) -> Saved | None:
    """As one process finds it."""
    with Checkpoints(folder, ALONE, 2, "stop") as checkpoints:
        return checkpoints.newest()


def save_steps(world: World, folder: Path, steps: list[int], keep: int = 2) -> None:
    """Saves and waits, a step after the other."""
    with Checkpoints(folder / "saved", world, keep, "stop") as checkpoints:
        for step in steps:
            checkpoints.save(step, {"step": step}, share(step, world.rank))


def die_while_saving(world: World, folder: Path, victim: int, place: str, delay_s: float, keep: int = 2) -> None:
    """Saves step 1 and 2 well; in step 3 one rank dies at a failpoint, and the other comes late."""
    with pytest.MonkeyPatch.context() as patch, Checkpoints(folder / "saved", world, keep, "stop") as checkpoints:
        patch.setattr(writer, "GRACE_S", 0.2)
        for step in (1, 2, 3):
            if step == 3 and world.rank == victim:
                patch.setenv("CROMSS_FAILPOINT", place)
            elif step == 3:
                patch.setattr(writer, "write_share", late(delay_s))
            checkpoints.save(step, {"step": step}, share(step, world.rank))
            checkpoints.wait()


def late(delay_s: float) -> Any:
    """`write_share`, after some time."""
    write_share = writer.write_share

    def slow(*args: Any) -> Any:
        time.sleep(delay_s)
        return write_share(*args)

    return slow


def fill_the_disk(world: World, folder: Path, on_failure: Any, room_bytes: int) -> None:
    """Saves step 1, 2 where rank 1 has room for files of a few bytes, and 3; tells what each rank knows."""
    with pytest.MonkeyPatch.context() as patch, Checkpoints(folder / "saved", world, 2, on_failure) as checkpoints:
        patch.setattr(writer, "GRACE_S", 0.2)
        failures = []
        for step in (1, 2, 3):
            room = room_bytes if (world.rank, step) == (1, 2) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            checkpoints.save(step, {"step": step}, share(step, world.rank))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            failures += [told for told in checkpoints.take_news() if isinstance(told, str)]
            tell(world, folder, [failures, checkpoints.last_committed, os.listdir(folder / "saved")])


def find(world: World, folder: Path) -> None:
    """Tells what each rank finds."""
    with Checkpoints(folder / "saved", world, 2, "stop") as checkpoints:
        saved = checkpoints.newest()
        assert saved
        values = {name: sorted(set(tensor.flatten().tolist())) for name, tensor in saved.tensors.items()}
        tell(world, folder, [saved.step, saved.state, values, checkpoints.take_news()])


def see_other_folders(world: World, folder: Path) -> None:
    """Each rank on a disk of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "GRACE_S", 0.2)
        with Checkpoints(folder / f"disk-{world.rank}", world, 2, "stop"):
            pass


def tell(world: World, folder: Path, what: Any) -> None:
    (folder / f"told-{world.rank}.json").write_text(json.dumps(what))


def told(folder: Path, world_size: int) -> list[Any]:
    """What each rank has told last."""
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(world_size)]

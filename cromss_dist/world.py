"""The processes of a run: rank, size, device, and sums over ranks that are no-ops in one process.

Layer 1.
"""

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from cromss_dist.errors import ConfigError

COLLECTIVE_TIMEOUT_S = 1800  # beyond what the watch for hanging ranks allows, which says more


@dataclass(frozen=True)
class World:
    """This process among the others of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files, tracks and prints."""
        return self.rank == 0

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over ranks, on every rank; `values` stays as it is. No gradient flows."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank, on every rank; a collective call."""
        return float(self.reduce_sum(torch.tensor([float(flag)], device=self.device))) > 0

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value of JSON types, on every rank; a collective call."""
        if self.size == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(text) if self.is_main else 0], device=self.device)
        dist.broadcast(length, 0)
        text = text if self.is_main else torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.reduce_sum(torch.zeros(1, device=self.device)).item()


def device_name(device: torch.device) -> str:
    """A device in words: the model of a GPU, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def choose_device(wish: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process; on a GPU machine the one of LOCAL_RANK.

    Raises:
        ConfigError: 'cuda' on a machine where torch finds no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if wish == "cuda" and not has_gpu:
        raise ConfigError("engine.device='cuda', but torch finds no GPU here; set engine.device to auto or cpu.")
    if wish == "cpu" or not has_gpu:
        return torch.device("cpu")
    # Ray Train and torchrun alike show every worker all GPUs of the run; DeepSpeed takes this one, too.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join(device: Literal["auto", "cpu", "cuda"]) -> World:
    """Joins the process group that Ray or torchrun prepared, or forms a group of one.

    A group exists in any case, so that one process runs the same code as many.

    Raises:
        ConfigError: see `choose_device`.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            # In-memory store: no port is opened.
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), chosen)

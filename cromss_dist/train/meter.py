"""Means of training figures between two log lines, without a device sync per step.

Layer 3.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from cromss_dist.world import World


class Meter:
    """Adds up loss parts on the device, and times the wait for data on the host."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets everything and starts the clock."""
        self._sums: dict[str, Tensor] = {}
        self._grad_norms: list[Tensor | float] = []
        self._started = time.perf_counter()
        self._wait_s = 0.0
        self.num_batches = 0

    def waits(self) -> None:
        """Marks the start of a wait for data."""
        self._wait_started = time.perf_counter()

    def works(self) -> None:
        """Marks its end."""
        self._wait_s += time.perf_counter() - self._wait_started

    def add(self, parts: Mapping[str, Tensor], grad_norm: Tensor | float | None) -> None:
        """Takes one micro batch: detached scalars by name, and the norm of the gradient where a step was taken."""
        for name, value in parts.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.num_batches += 1
        if grad_norm is not None:
            self._grad_norms.append(grad_norm)

    def read(self, world: World, samples_per_batch: int) -> dict[str, float]:
        """Means over the micro batches of all ranks since the last restart, under MLflow's names; a collective call.

        Args:
            world: The ranks.
            samples_per_batch: Samples of one micro batch on one rank.
        """
        names = list(self._sums)
        sums = torch.stack([self._sums[name].double() for name in names])
        means = (world.reduce_sum(sums) / world.size / self.num_batches).tolist()  # waits for the device
        seconds = time.perf_counter() - self._started
        wait = world.reduce_sum(torch.tensor([self._wait_s], dtype=torch.float64, device=sums.device))
        values = {
            f"train/loss/{name}" if not name.startswith("kept") else f"train/{name}": v
            for name, v in zip(names, means, strict=True)
        }
        if self._grad_norms:
            values["train/grad_norm"] = sum(map(float, self._grad_norms)) / len(self._grad_norms)
        values["perf/samples_per_s"] = self.num_batches * samples_per_batch * world.size / seconds
        values["perf/data_wait_s"] = float(wait) / world.size / self.num_batches
        return values

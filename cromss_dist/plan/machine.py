"""What a machine can do, as far as a training step asks for it: a profile that `cromss probe` writes, or a data sheet's.

Layer 4.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import ConfigError
from cromss_dist.plan.work import KINDS, Amount

FORMAT = 1


@dataclass(frozen=True)
class Rate:
    """Seconds of operators of a kind: a x operators + b x flops + c x bytes.

    Args:
        operator_s: a, seconds.
        flop_s: b, seconds.
        byte_s: c, seconds.
    """

    operator_s: float
    flop_s: float
    byte_s: float

    def seconds(self, amount: Amount) -> float:
        """Of this much work."""
        return self.operator_s * amount.operators + self.flop_s * amount.flops + self.byte_s * amount.bytes


@dataclass(frozen=True)
class Line:
    """Seconds of something that grows by the unit: fixed + each x units."""

    fixed_s: float
    each_s: float

    def seconds(self, units: float) -> float:
        """Of so many units."""
        return self.fixed_s + self.each_s * units


@dataclass(frozen=True)
class Link:
    """What ranks are summed over: seconds of a message's one hop, and bytes a second that a ring carries.

    Args:
        hop_s: Seconds of a hop, whatever its size.
        bytes_per_s: Of a ring through these ranks, in one direction.
        assumed: Whether nobody measured it.
    """

    hop_s: float
    bytes_per_s: float
    assumed: bool = False


@dataclass(frozen=True)
class Machine:
    """One node: its device, its links and its disk.

    Args:
        name: For people.
        source: Where the numbers are from.
        device: 'cpu' or 'cuda'.
        precision: Arithmetic that the rates are of.
        memory_bytes: Of one device.
        rates: Seconds of operators by kind.
        step_factor: What a whole step took over the sum of its operators.
        crowding: What a step of one rank takes over one that is alone, by ranks on the node that compute at once; 1 for one.
        residual: Relative error of the model on what it was measured with, standard deviation.
        prior: Seconds of the label prior, units: pixels of both sources.
        images: Seconds of up-sampling, cropping and flipping, units: pixels of all bands and labels.
        loss: Seconds of the loss with its gradient, units: pixels.
        optimizer: Seconds of an optimiser step, units: weights.
        inside: Link of the ranks of a node.
        between: Link of nodes, of a whole node; None where the machine is alone.
        tree: Whether small messages go along a tree (NCCL) in place of a ring (gloo).
        read_bytes_per_s: Of one reading thread, verified, from a warm page cache.
        write_bytes_per_s: Of one rank that writes a checkpoint, hashed and synced.
        versions: Of packages, and the date.
    """

    name: str
    source: str
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "fp16"]
    memory_bytes: int
    rates: Mapping[str, Rate]
    step_factor: float
    crowding: Mapping[int, float]
    residual: float
    prior: Line
    images: Line
    loss: Line
    optimizer: Line
    inside: Link | None
    between: Link | None
    tree: bool
    read_bytes_per_s: float
    write_bytes_per_s: float
    versions: Mapping[str, str] = field(default_factory=dict)

    def network_seconds(self, work: Mapping[str, Amount]) -> float:
        """Of operators by kind, whole steps taken into account; a kind that was not measured goes as the slowest alike."""
        return self.step_factor * sum(self._rate(kind).seconds(amount) for kind, amount in work.items())

    def _rate(self, kind: str) -> Rate:
        return self.rates.get(kind) or self.rates[kind.split("/")[0]]

    def crowding_of(self, ranks: int) -> float:
        """What a step takes with so many ranks on the node over one alone; beyond what was measured, as at the most that was."""
        known = [number for number in self.crowding if number <= ranks]
        return self.crowding[max(known)] if known else 1.0

    def to_json(self) -> str:
        """As a profile."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    def write(self, path: Path) -> None:
        """Writes a profile; it appears whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        write_atomically(path, self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> "Machine":
        """Reads a profile.

        Raises:
            ConfigError: it is none.
        """
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--machine={path} is no profile of a machine: {error!r}. Give a file that `cromss probe` has written, or one of "
                "the names that `cromss plan --help` lists."
            ) from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Machine":
        """The machine of a profile's JSON.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        values = dict(content)
        if values.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        values["rates"] = {kind: Rate(**rate) for kind, rate in values["rates"].items()}
        values["crowding"] = {int(ranks): float(factor) for ranks, factor in values["crowding"].items()}
        for name in ("prior", "images", "loss", "optimizer"):
            values[name] = Line(**values[name])
        for name in ("inside", "between"):
            values[name] = values[name] and Link(**values[name])
        machine = cls(**values)
        machine._check()
        return machine

    def _check(self) -> None:
        if missing := [kind for kind in KINDS if kind not in self.rates]:
            raise ValueError(f"rates lack {', '.join(missing)}")
        numbers = [
            self.step_factor,
            self.residual,
            self.memory_bytes,
            self.read_bytes_per_s,
            self.write_bytes_per_s,
            *self.crowding.values(),
        ]
        numbers += [number for rate in self.rates.values() for number in dataclasses.astuple(rate)]
        if not all(isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("a rate is negative or not finite")
        if min(self.step_factor, self.memory_bytes, self.read_bytes_per_s, self.write_bytes_per_s) <= 0:
            raise ValueError("a rate is 0")

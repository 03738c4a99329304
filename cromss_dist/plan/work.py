"""What the networks of a run compute in a step, operator by operator: counted on the meta device, or timed on a real one.

Layer 4.
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from cromss_dist.config import RunConfig
from cromss_dist.models.batch_norm import globalise_batch_norms
from cromss_dist.models.recompute import recompute_activations
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.schema import NUM_CLASSES
from cromss_dist.train.step.engine import Precision
from cromss_dist.train.step.memory import saved_bytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
COUNTED_SAMPLES = (2, 3)  # batch norms of one sample may have one pixel; what grows with the batch does so by the sample
KINDS = ("convolution", "pointwise", "grouped", "norm", "other")
_CONVOLUTIONS = ("convolution", "convolution_backward")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True)
class Amount:
    """Work of one kind, added up.

    Args:
        operators: Calls of an operator.
        flops: Floating point operations; a multiplication and its addition are two.
        bytes: Read and written, as if nothing stayed in a cache.
    """

    operators: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.operators + other.operators, self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Amount":
        """This much `factor` times."""
        return Amount(self.operators * factor, self.flops * factor, self.bytes * factor)


@dataclass(frozen=True)
class Timed:
    """One call of an operator on a real device."""

    kind: str
    amount: Amount
    seconds: float


def clock() -> float:
    """Seconds. With one thread those that this process computed, so that a machine's other work disturbs little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every call of an operator is counted by kind; on a real device it can be timed, too.

    Kinds are those of KINDS, with `/backward` for the gradient of a convolution, product or norm.

    Args:
        device: Times each call there, see `clock`; None only counts.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Timed] = []
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator."""
        cuda = self._device is not None and self._device.type == "cuda"
        begin, end = (_event(), _event()) if cuda else (None, None)
        if begin is not None:
            begin.record()
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        started = clock()
        if name == "batch_norm_update_stats" and args[0].is_meta:  # has no kernel there
            result = tuple(args[0].new_empty(args[0].shape[1], dtype=torch.float32) for _ in range(2))
        else:
            result = func(*args, **(kwargs or {}))
        seconds = clock() - started
        if func.is_view or name.startswith(("prim::", "empty")) or name == "detach":
            return result
        self.calls.append(Timed(*_work_of(name, args, result), seconds))
        if begin is not None and end is not None:
            end.record()
            self._events.append((begin, end))
        return result

    def timed(self) -> list[Timed]:
        """The calls so far; waits for a GPU."""
        if not self._events:
            return self.calls
        torch.cuda.synchronize()
        spans = [begin.elapsed_time(end) / 1000 for begin, end in self._events]
        return [Timed(call.kind, call.amount, seconds) for call, seconds in zip(self.calls, spans, strict=True)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _work_of(name: str, args: Any, result: Any) -> tuple[str, Amount]:
    """Kind and amount of one call."""
    moved = sum(tensor.numel() * tensor.element_size() for tensor in _tensors((args, result)))
    backward = name.endswith("backward")
    if name in _CONVOLUTIONS:
        # convolution(input, weight, ...) -> output; convolution_backward(grad_output, input, weight, ...) -> gradients
        output, weight = (args[0], args[2]) if backward else (result, args[1])
        wanted = sum(gradient is not None for gradient in result[:2]) if backward else 1
        flops = 2.0 * output.numel() * math.prod(weight.shape[1:]) * wanted
        grouped = args[0 if not backward else 1].shape[1] != weight.shape[1]
        kind = "grouped" if grouped else "pointwise" if math.prod(weight.shape[2:]) == 1 else "convolution"
    elif name in _PRODUCTS:
        left, right = args[-2:]
        kind, flops, backward = "pointwise", 2.0 * left.numel() * right.shape[-1], False
    else:
        kind, flops = ("norm" if "norm" in name else "other"), 0.0
        backward = backward and kind == "norm"
    return (f"{kind}/backward" if backward else kind), Amount(1, flops, moved)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def add_up(calls: Iterable[Timed]) -> dict[str, Amount]:
    """Work by kind."""
    sums: defaultdict[str, Amount] = defaultdict(Amount)
    for call in calls:
        sums[call.kind] += call.amount
    return dict(sums)


@dataclass(frozen=True)
class Networks:
    """What the networks of a run are and do, whatever the number of ranks.

    Args:
        parameters: Weights that are trained.
        buffer_bytes: Of running statistics.
        norm_channels: Channels of each batch norm call of a forward pass, both branches.
        tensors: Number of trained tensors.
        forward: Work by kind for each of COUNTED_SAMPLES samples.
        backward: Likewise.
        saved_bytes: Activations that a forward pass of COUNTED_SAMPLES samples keeps.
        saved_bytes_recomputing: The same with activation checkpointing.
    """

    parameters: int
    buffer_bytes: int
    norm_channels: tuple[int, ...]
    tensors: int
    forward: tuple[Mapping[str, Amount], Mapping[str, Amount]]
    backward: tuple[Mapping[str, Amount], Mapping[str, Amount]]
    saved_bytes: tuple[int, int]
    saved_bytes_recomputing: tuple[int, int]

    @classmethod
    def of(cls, config: RunConfig, precision: Precision, many: bool) -> "Networks":
        """Builds the networks and counts, without computing: seconds on any machine.

        Half precision is counted with networks in that type: on a GPU autocast keeps activations in it, and weights twice.

        Args:
            config: The run.
            precision: Arithmetic of the networks.
            many: Whether there are several ranks, whose batch norms may be global: these do more.

        Raises:
            ConfigError: the encoder cannot be built.
        """
        data = config.data
        model = TwoBranchUNet(config.model, len(data.s1_bands), len(data.s2_bands))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        model.to("meta", dtype)
        for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
            norm.float()  # as under autocast
        counted = copy.deepcopy(model)
        if many and config.engine.batch_norm == "global":
            globalise_batch_norms(counted, lambda sums: sums, world_size=2)
        channels: list[int] = []
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(lambda norm, _: channels.append(norm.num_features))

        def images(samples: int) -> tuple[Tensor, Tensor]:
            bands = (len(data.s1_bands), len(data.s2_bands))
            s1, s2 = (torch.empty(samples, number, data.crop_px, data.crop_px, device="meta", dtype=dtype) for number in bands)
            return s1, s2

        passes = [_count_passes(counted, *images(samples)) for samples in COUNTED_SAMPLES]
        parameters = list(model.parameters())
        copies = sum(p.nbytes for p in parameters) if precision != "fp32" else 0
        kept = [saved_bytes(model, *images(COUNTED_SAMPLES[0])) + copies]
        one_pass = tuple(channels)
        kept.append(saved_bytes(model, *images(COUNTED_SAMPLES[1])) + copies)
        recompute_activations(model)
        recomputed = [saved_bytes(model, *images(samples)) + copies for samples in COUNTED_SAMPLES]
        return cls(
            sum(p.numel() for p in parameters),
            buffers,
            one_pass,
            len(parameters),
            (passes[0][0], passes[1][0]),
            (passes[0][1], passes[1][1]),
            (kept[0], kept[1]),
            (recomputed[0], recomputed[1]),
        )

    def forward_of(self, samples: int) -> dict[str, Amount]:
        """Work of a forward pass by kind."""
        return _at(self.forward, samples)

    def backward_of(self, samples: int) -> dict[str, Amount]:
        """Work of a backward pass by kind, without recomputation."""
        return _at(self.backward, samples)

    def activation_bytes(self, samples: int, recomputing: bool) -> int:
        """Bytes kept from a forward pass for its backward pass."""
        few, more = self.saved_bytes_recomputing if recomputing else self.saved_bytes
        return max(0, few + (samples - COUNTED_SAMPLES[0]) * (more - few))

    def flops(self, samples: int) -> float:
        """Of a forward and backward pass."""
        both = (*self.forward_of(samples).values(), *self.backward_of(samples).values())
        return sum(amount.flops for amount in both)


def _count_passes(model: nn.Module, s1: Tensor, s2: Tensor) -> tuple[dict[str, Amount], dict[str, Amount]]:
    with Operators() as operators:
        logits = model(s1, s2)
        num_forward = len(operators.calls)
        torch.autograd.backward(logits, [torch.empty_like(branch) for branch in logits])
    model.zero_grad()  # else the next backward pass would add to these gradients
    assert logits[0].shape[1] == NUM_CLASSES
    return add_up(operators.calls[:num_forward]), add_up(operators.calls[num_forward:])


def _at(counted: tuple[Mapping[str, Amount], Mapping[str, Amount]], samples: int) -> dict[str, Amount]:
    few, more = counted
    beyond = (samples - COUNTED_SAMPLES[0]) / (COUNTED_SAMPLES[1] - COUNTED_SAMPLES[0])
    return {kind: few[kind] + (more[kind] + few[kind].times(-1)).times(beyond) for kind in few}

"""Training steps on the same model and the same made-up batch, and the clock they run under: for benchmarks/train.py.

OurStep    prior on the training device, DeepSpeed's engine, our loss, the guard's vote and the meter: a step of the product
BareStep   prior and loss as ours, then torch's Adam, and nothing else: what a loop costs at least
published  see published_step.py
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from published_step import PublishedStep, batch_prior
from torch import Tensor

from cromss_dist.config import EngineConfig, FaultConfig, LossConfig, ModelConfig, TrainConfig, plan_batches
from cromss_dist.data.loading.prior import label_prior
from cromss_dist.losses import CromssLoss
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.pretrain.loss import BranchLoss
from cromss_dist.schema import NUM_CLASSES, NUM_SEASONS, S1_BANDS, S2_BANDS, Example
from cromss_dist.train.figures.meter import Meter
from cromss_dist.train.safety.guard import Guard
from cromss_dist.train.step.accumulation import accumulated_step
from cromss_dist.train.step.engine import Engine, resolve_memory_format
from cromss_dist.world import World

SEED = 0
LOSS = LossConfig()  # selection, Dice and both consistency terms, as published
TRAIN = TrainConfig(lr=1e-3)
EPOCH = 40.0  # half way up the ramp, where selection works
MARGIN_PX = 8  # of a patch around its crop, as 264 to 256
FIELD_PX = 22  # side of a patch's fields: areas of one label

Run = dict[str, float]


@dataclass(frozen=True)
class Size:
    """The work of a step.

    Args:
        encoder: Of both branches.
        crop_px: Side of the input.
        batch: Samples over all ranks and micro batches.
    """

    encoder: str
    crop_px: int
    batch: int


@dataclass(frozen=True)
class Inputs:
    """A batch as cropping and flipping leave it, and what its prior is made from."""

    example: Example  # without prior
    labels: Tensor  # uint8 (B, T, H, W), whole patches
    seasons: Tensor
    rows: Tensor  # int64 (B, h): where the crop comes from
    cols: Tensor

    def with_prior(self) -> Example:
        """What our step is given, the prior computed now."""
        prior = label_prior(self.labels, self.seasons, "ts", NUM_CLASSES, rows=self.rows, cols=self.cols)
        return replace(self.example, prior=prior)

    def published_prior(self) -> Tensor:
        """The same prior the published way, on the host."""
        return batch_prior(self.labels.cpu(), self.seasons.cpu(), self.rows.cpu(), self.cols.cpu())


def make_inputs(size: Size, device: torch.device, first: int, samples: int) -> Inputs:
    """`samples` of the global batch from number `first` on; the same pixels however it is cut. Class 8 has no pixel."""
    generator = torch.Generator().manual_seed(SEED)
    patch = size.crop_px + MARGIN_PX
    side = -(-patch // FIELD_PX)
    fields = torch.randint(0, NUM_CLASSES - 1, (size.batch, NUM_SEASONS, side, side), generator=generator, dtype=torch.uint8)
    labels = fields.repeat_interleave(FIELD_PX, 2).repeat_interleave(FIELD_PX, 3)[:, :, :patch, :patch]
    images = torch.rand(size.batch, len(S1_BANDS) + len(S2_BANDS), size.crop_px, size.crop_px, generator=generator)
    start = torch.randint(0, MARGIN_PX + 1, (2, size.batch, 1), generator=generator)
    rows, cols = (start + torch.arange(size.crop_px)).unbind()
    rows[::2] = rows[::2].flip(1)
    seasons = torch.randint(0, NUM_SEASONS, (size.batch,), generator=generator)
    batch = torch.arange(size.batch)
    label = labels[batch, seasons][batch[:, None, None], rows[:, :, None], cols[:, None, :]].long()

    def part(values: Tensor) -> Tensor:
        return values[first : first + samples].contiguous().to(device)

    s1, s2 = torch.split(part(images), [len(S1_BANDS), len(S2_BANDS)], 1)
    weights = torch.ones(samples, device=device)
    example = Example({"s1": s1.contiguous(), "s2": s2.contiguous()}, part(label), prior=None, reference=None, weights=weights)
    return Inputs(example, part(labels), part(seasons), part(rows), part(cols))


def build_model(size: Size, device: torch.device) -> TwoBranchUNet:
    """The networks; equal wherever they are built."""
    torch.manual_seed(SEED)
    return TwoBranchUNet(ModelConfig(encoder=size.encoder), len(S1_BANDS), len(S2_BANDS)).to(device)


class OurStep:
    """A training step of this project.

    Args:
        size: Model and batch.
        engine: How it is computed.
        world: The ranks; the loss's collectives go through it.
        loss: CromSS.
    """

    def __init__(self, size: Size, engine: EngineConfig, world: World, loss: LossConfig = LOSS) -> None:
        self.plan = plan_batches(engine, world.size)
        self.model = build_model(size, world.device)
        self.engine = Engine(self.model, engine, TRAIN, self.plan, world)
        reduce_sum = world.reduce_sum if world.size > 1 else None
        self.loss = BranchLoss(CromssLoss(loss, reduce_sum=reduce_sum, world_size=world.size))
        self.guard = Guard(FaultConfig(), world)
        self.meter = Meter(world.device, self.plan.global_batch, self.loss.figures)
        micro, accumulation = self.plan.micro_batch, self.plan.accumulation_steps
        starts = [(world.rank * accumulation + number) * micro for number in range(accumulation)]
        self.inputs = [make_inputs(size, world.device, start, micro) for start in starts]
        self.steps = 0

    def __call__(self) -> float:
        """Takes a step and returns its loss, of the global batch."""
        self.steps += 1
        examples = [inputs.with_prior() for inputs in self.inputs]
        output = accumulated_step(self.engine.forward, examples, self.loss, EPOCH, self.engine, self.meter.phase)
        verdict = self.guard.judge(output.total, stop=False)
        with self.meter.phase("optimizer"):
            result = self.engine.step(veto=verdict.skip)
        self.guard.settle(verdict, result, self.steps)
        self.meter.add(output)
        self.meter.step_done(result.grad_norm, result.applied)
        return verdict.loss


def bare_step(size: Size, device: torch.device, precision: torch.dtype = torch.float32) -> Callable[[], float]:
    """Our prior and loss in a plain loop of one process; what it returns takes a step and returns its loss."""
    model, loss = build_model(size, device), CromssLoss(LOSS)
    optimizer = torch.optim.Adam(model.parameters(), TRAIN.lr, weight_decay=TRAIN.weight_decay, fused=True)
    inputs = make_inputs(size, device, 0, size.batch)
    memory_format = resolve_memory_format(EngineConfig(), device)

    def take() -> float:
        example = inputs.with_prior()
        s1, s2 = (x.contiguous(memory_format=memory_format) for x in example.images.values())
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits_s1, logits_s2 = model(s1, s2)
        total = loss(logits_s1, logits_s2, example.label, example.prior, EPOCH, example.weights).total
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total.detach())

    return take


def published_step(size: Size, device: torch.device) -> Callable[[], float]:
    """The published step, its prior included."""
    step = PublishedStep(build_model(size, device), LOSS, TRAIN.lr, TRAIN.weight_decay)
    inputs = make_inputs(size, device, 0, size.batch)

    def take() -> float:
        example = inputs.example
        return step(*example.images.values(), example.label, inputs.published_prior(), EPOCH)["total"]

    return take


@dataclass(frozen=True)
class CountedWorld(World):
    """A world that counts what is summed over its ranks."""

    told: Run = field(default_factory=lambda: {"collectives": 0, "bytes": 0, "seconds": 0.0})

    def reduce_sum(self, values: Tensor) -> Tensor:
        """As `World`; the time includes the wait for other ranks."""
        started = time.perf_counter()
        total = super().reduce_sum(values)
        self.told["seconds"] += time.perf_counter() - started
        self.told["collectives"] += 1
        self.told["bytes"] += values.numel() * values.element_size()
        return total


def alternate(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[Run]]:
    """Calls each way in turn, `rounds` times after `warm_up`; each round another one begins. Ranks start each call together.

    Returns:
        Wall and CPU seconds of each call; CPU seconds are those of all threads of this process.
    """
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    names: Sequence[str] = list(ways)
    for number in range(-warm_up, rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            settle(device)
            started, cpu = time.perf_counter(), time.process_time()
            ways[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                runs[name].append({"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu})
    return runs


def settle(device: torch.device) -> None:
    """Waits for the device and for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()

"""Computes a step again that went wrong, from its replay bundle, and says whether it goes wrong here, too.

Layer 4. One process and plain torch, without DeepSpeed: what all ranks did, in their micro batches, exactly. Samples that were
normalised together go through the networks together, so with global batch norms one forward pass here has as many samples as
a micro step of all ranks; `--engine.activation_checkpointing true` makes it need less memory. Networks that draw random
numbers (dropout) draw others here.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cromss_dist.config import BatchPlan
from cromss_dist.config.transfer import TransferConfig
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.errors import CheckpointError, ConfigError
from cromss_dist.models.recompute import recompute_activations
from cromss_dist.parse import parse_run, parse_run_of
from cromss_dist.pretrain.task import Pretraining
from cromss_dist.schema import IGNORE, Batch, Example
from cromss_dist.train.safety.bundle import CONFIG_FILE, Bundle, Samples, read_bundle
from cromss_dist.train.step.accumulation import join_examples
from cromss_dist.train.step.engine import autocast, resolve_precision
from cromss_dist.train.task import Task, TaskLoss
from cromss_dist.transfer.task import Transfer
from cromss_dist.world import World, choose_device, device_name

PROG = "cromss replay"
_MAX_ROWS = 8  # samples and tensors that are printed
_SAME = 0.01  # relative: losses of a step on another machine
_ALIKE = 0.5  # the same after one more step
_NOT_ITS_OWN = ("--dry-run", "--resume", "--fresh", "--profile")  # of what the config's parser takes


@dataclass(frozen=True)
class SampleFigures:
    """One sample of the step, by itself."""

    key: str
    season: int
    rank: int  # that had it
    inputs_finite: bool
    logits_finite: bool
    loss: float  # against hard labels, all pixels alike
    labelled: float  # share of the pixels that have a label


@dataclass(frozen=True)
class Replayed:
    """What a step gave when it was computed again."""

    device: str
    precision: str
    loss: float
    parts: dict[str, float]
    samples: list[SampleFigures]
    grad_norms: dict[str, float]  # part of the networks -> norm
    weights_not_finite: list[str]
    outputs_not_finite: list[str]  # layers in the order in which they ran
    gradients_not_finite: list[str]  # parameters, those first that the backward pass reaches first

    @property
    def grad_norm(self) -> float:
        """Of the whole gradient, before clipping."""
        return math.hypot(*self.grad_norms.values())

    def reproduces(self, bundle: Bundle) -> bool:
        """Whether the step goes wrong here as it did there."""
        if not math.isfinite(bundle.loss):
            return not math.isfinite(self.loss)
        if not bundle.reason.startswith("spike"):
            return not math.isfinite(self.grad_norm)
        within = _SAME if bundle.weights_of == "before" else _ALIKE
        return not math.isfinite(self.loss) or abs(self.loss - bundle.loss) <= within * abs(bundle.loss)

    def verdict(self, bundle: Bundle) -> str:
        """One sentence or two."""
        there = f"{bundle.plan.world_size} x {bundle.device}, {bundle.precision}"
        if not self.reproduces(bundle):
            here = f"a loss of {self.loss:.6g}" if bundle.reason.startswith("spike") else "finite"
            return (
                f"{here} here: a fault of a machine or of arithmetic (recorded on {there}; here {self.device}, "
                f"{self.precision}), not of the data."
            )
        return f"reproduces: {bundle.reason}. {self._cause()}"

    def _cause(self) -> str:
        if self.weights_not_finite:
            return f"Weights were not finite before it: {_some(self.weights_not_finite)}."
        if bad := [sample.key for sample in self.samples if not sample.inputs_finite]:
            return f"The inputs of some samples are not finite: {_some(bad)}."
        if self.outputs_not_finite:
            return f"Inputs and weights are finite; the first layer whose output is not: {self.outputs_not_finite[0]}."
        if self.gradients_not_finite:
            return f"The logits are finite; the first gradient that is not: {self.gradients_not_finite[0]}."
        worst = max(self.samples, key=lambda sample: sample.loss)
        return f"All is finite; the sample with the largest loss is {worst.key}, season {worst.season} ({worst.loss:.6g})."


def replay(folder: Path, overrides: Sequence[str] = ()) -> tuple[Bundle, Replayed]:
    """Computes the step of a bundle again: loss and gradient, no optimiser.

    Args:
        folder: Of the bundle.
        overrides: Dotted config keys and values, for data that lie elsewhere, another device or precision.

    Raises:
        CheckpointError: the bundle is damaged, or its weights are not those of `model`.
        ConfigError: a key or value is wrong, or the data are not the ones that the step read.
        ShardError: the data are missing or damaged.
    """
    bundle, weights = read_bundle(folder)
    if wrong := [flag for argument in overrides if (flag := argument.partition("=")[0]) in _NOT_ITS_OWN]:
        raise ConfigError(
            f"{PROG} does not take {wrong[0]}: it computes one step and leaves the run alone. Give it dotted config "
            "keys alone, such as --engine.device cpu."
        )
    task = _task_of(folder, overrides, bundle.plan.world_size)
    config = task.config
    device = choose_device(config.engine.device)
    precision = resolve_precision(config.engine, device)
    model = task.build_model()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} has weights of another model than its config describes: {error}") from error
    if config.engine.activation_checkpointing is True:
        recompute_activations(model)
    model.to(device).train()
    batches = _read_samples(task, bundle)
    examples = [task.example(batch, device) for batch in batches]
    loss_of = task.loss(World(0, 1, device))
    with _watched(model) as outputs:
        loss, parts, logits = _loss_and_gradient(autocast(precision, device)(model), examples, task, loss_of, bundle)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return bundle, Replayed(
        device=device_name(device),
        precision=precision,
        loss=loss,
        parts=parts,
        samples=list(_sample_figures(batches, examples, logits, loss_of, bundle.plan)),
        grad_norms=_norms(gradients),
        weights_not_finite=[name for name, value in weights.items() if not _is_finite(value)],
        outputs_not_finite=outputs,
        gradients_not_finite=[name for name, gradient in reversed(gradients.items()) if not _is_finite(gradient)],
    )


def _task_of(folder: Path, overrides: Sequence[str], world_size: int) -> Task:
    """What was trained, by the config in a bundle."""
    # One process reads few batches: workers would take longer to start.
    arguments = ["--config", str(folder / CONFIG_FILE), "--data.reading.workers", "0", *overrides]
    if "encoder" in yaml.safe_load((folder / CONFIG_FILE).read_text()):
        transfer = parse_run_of(TransferConfig, arguments, PROG).config.with_absolute_paths()
        return Transfer.of(transfer, world_size, trains_here=False)
    return Pretraining.of(parse_run(arguments, PROG).config.with_absolute_paths(), world_size, trains_here=False)


def report(folder: Path, bundle: Bundle, found: Replayed, console: Console) -> None:
    """Prints what `replay` found."""

    def row(name: str, value: str) -> None:
        console.print(f"{name:<20}{value}", highlight=False, markup=False, soft_wrap=True)

    row("bundle", str(folder))
    row("step", f"{bundle.step}, {bundle.progress_epochs:.4g} epochs; weights of {bundle.weights_of} the step")
    row("recorded", f"{bundle.reason}; loss {bundle.loss:.8g}, gradient norm {bundle.grad_norm}")
    row("", f"{bundle.plan.world_size} x {bundle.device}, {bundle.precision}")
    row("here", f"loss {found.loss:.8g}, gradient norm {found.grad_norm:.8g}; {found.device}, {found.precision}")
    for name, value in found.parts.items():
        row(f"  {name}", f"{value:.8g}")
    for name, value in found.grad_norms.items():
        row(f"  {name}", f"gradient norm {value:.8g}")
    for what, names in (
        ("weights", found.weights_not_finite),
        ("layer outputs", found.outputs_not_finite),
        ("gradients", found.gradients_not_finite),
    ):
        row(what, f"not finite: {_some(names)}" if names else "all finite")
    table = Table("sample", "season", "rank", "inputs", "logits", "loss alone", "labelled", title_justify="left")
    table.title = f"{min(_MAX_ROWS, len(found.samples))} of {len(found.samples)} samples, the worst first"
    for sample in sorted(found.samples, key=_badness, reverse=True)[:_MAX_ROWS]:
        finite = ["finite" if ok else "NOT FINITE" for ok in (sample.inputs_finite, sample.logits_finite)]
        table.add_row(sample.key, str(sample.season), str(sample.rank), *finite, f"{sample.loss:.6g}", f"{sample.labelled:.1%}")
    console.print(table)
    console.print(found.verdict(bundle), highlight=False, markup=False, soft_wrap=True)


def _read_samples(task: Task, bundle: Bundle) -> list[Batch]:
    """The micro batches of all ranks, rank by rank; of the samples that the bundle names and no others."""
    digests = tuple(task.datasets.values())
    if digests != bundle.datasets:
        raise ConfigError(
            f"{', '.join(task.datasets)} is not what the step read: digests {_short(digests)}, recorded "
            f"{_short(bundle.datasets)}. Give the datasets of the run: --data.shards FOLDER."
        )
    if Samples.of(task.train_plan, bundle.plan, bundle.samples_seen) != bundle.samples:
        raise ConfigError(
            f"Behind {bundle.samples_seen} samples, this config reads other samples than the step did; leave seed, data.window, "
            "data.tail, data.filter and data.val_fraction as recorded."
        )
    num_micro_batches = bundle.plan.accumulation_steps * bundle.plan.world_size
    plan = replace(bundle.plan, accumulation_steps=num_micro_batches, world_size=1)
    with TrainLoader.of(task.train_plan(plan).starting_at(bundle.samples_seen), task.reading) as loader:
        return [next(loader) for _ in range(num_micro_batches)]


def _loss_and_gradient(
    model: Callable[..., tuple[Tensor, ...]], examples: Sequence[Example], task: Task, loss: TaskLoss, bundle: Bundle
) -> tuple[float, dict[str, float], list[tuple[Tensor, ...]]]:
    """Loss, its parts and the logits of each micro batch; adds the gradient to the parameters'.

    As in training by accumulation: logits without gradient, the loss of those pixels that it sees together, and a second
    forward pass that takes the gradient on.
    """
    plan = bundle.plan
    alone = [[k] for k in range(len(examples))]
    micro_steps = [list(range(first, len(examples), plan.accumulation_steps)) for first in range(plan.accumulation_steps)]
    normalised = micro_steps if task.config.engine.batch_norm == "global" else alone
    seen = {"global": [list(range(len(examples)))], "micro": micro_steps, "local": alone}[loss.scope]
    sizes = [len(example.label) for example in examples]

    def forward(group: list[int]) -> list[tuple[Tensor, ...]]:
        branches = model(*(torch.cat([examples[k].images[m] for k in group]) for m in examples[0].images))
        return list(zip(*(torch.split(branch, [sizes[k] for k in group]) for branch in branches), strict=True))

    logits: dict[int, tuple[Tensor, ...]] = {}
    with torch.no_grad():
        for group in normalised:
            logits |= zip(group, forward(group), strict=True)
    slopes: dict[int, tuple[Tensor, ...]] = {}
    total, parts = 0.0, defaultdict[str, float](float)
    for group in seen:
        joined = [torch.cat(branch).float().requires_grad_() for branch in zip(*(logits[k] for k in group), strict=True)]
        out = loss(joined, join_examples([examples[k] for k in group]), bundle.progress_epochs)
        total += float(out.total.detach()) / len(seen)
        for name, part in out.parts.items():
            parts[name] += float(part) / len(seen)
        halves = [torch.split(slope, [sizes[k] for k in group]) for slope in torch.autograd.grad(out.total / len(seen), joined)]
        slopes |= zip(group, zip(*halves, strict=True), strict=True)
    for group in normalised:
        pairings = [
            (x.float() * slope).sum()
            for k, branches in zip(group, forward(group), strict=True)
            for x, slope in zip(branches, slopes[k], strict=True)
        ]
        torch.autograd.backward(pairings)
    return total, dict(parts), [logits[k] for k in range(len(examples))]


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of layers whose outputs are not finite, in the order in which they run."""
    found: dict[str, None] = {}
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not _is_finite(output):
            found[names[module]] = None

    hooks = [module.register_forward_hook(look) for module in model.modules() if not list(module.children())]
    result: list[str] = []
    try:
        yield result
    finally:
        result += found
        for hook in hooks:
            hook.remove()


def _sample_figures(
    batches: Sequence[Batch], examples: Sequence[Example], logits: Sequence[tuple[Tensor, ...]], loss: TaskLoss, plan: BatchPlan
) -> Iterator[SampleFigures]:
    for number, (batch, example, branches) in enumerate(zip(batches, examples, logits, strict=True)):
        inputs = [values for values in (*example.images.values(), example.prior) if values is not None]
        for i, key in enumerate(batch.keys):
            one = slice(i, i + 1)
            alone = Example({}, example.label[one], None, None, example.weights[one])
            sums = loss.validation_sums([branch[one] for branch in branches], alone)
            yield SampleFigures(
                key=key,
                season=int(batch.seasons[i]),
                rank=number // plan.accumulation_steps,
                inputs_finite=all(_is_finite(values[i]) for values in inputs),
                logits_finite=all(_is_finite(branch[i]) for branch in branches),
                loss=float(loss.validation_loss(sums)["total"]),
                labelled=float((example.label[i] != IGNORE).double().mean()),
            )


def _norms(gradients: dict[str, Tensor]) -> dict[str, float]:
    squares = defaultdict[str, float](float)
    for name, gradient in gradients.items():
        squares[".".join(name.split(".")[:2])] += float(gradient.double().square().sum())
    return {part: math.sqrt(square) for part, square in squares.items()}


def _badness(sample: SampleFigures) -> float:
    return sample.loss if sample.inputs_finite and sample.logits_finite and math.isfinite(sample.loss) else math.inf


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _MAX_ROWS} more" if len(names) > _MAX_ROWS else ""
    return ", ".join(names[:_MAX_ROWS]) + rest


def _short(digests: Sequence[str]) -> str:
    return ", ".join(digest[:12] for digest in digests)

"""Measures our training step against the published one and a bare torch loop, and what each switch of the engine costs, here.

    python benchmarks/train.py --golden ../shared/golden --archive ../shared/data/noldo_real_mini --out benchmarks/results
    python benchmarks/train.py --device cuda --out benchmarks/results      on a machine with a GPU; see train_device.py

One thread a rank; ranks are processes of this machine over gloo. Ways that are compared take turns step by step in one process,
and a ratio is taken between steps of the same turn; a process' figure is its median, and the report has the median (lowest to
highest) over --repeats processes. Takes about a quarter of an hour on two quiet cores.

  loss    label prior and loss with selection, forward and backward, of ours and the published way, at 256 px
  step    whole steps: ours (DeepSpeed's engine, guard, meter), bare (our prior and loss in a plain loop), published
  switch  ZeRO stages, bf16, memory format, recomputation, fused Adam: speed, peak memory, losses; fp16 and compile on request
  scope   what seeing all ranks' pixels costs, at 1, 2 and 4 ranks, and the second forward pass of exact accumulation
  save    seconds that a checkpoint holds the loop up, is written and loaded in, against other ways
  launch  a run of the product with its loader, in this process and under Ray, against a bare loop over the same loader
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from convert import machine, say, spread
from published_step import ATOL, largest_deviation
from train_launch import launch_group
from train_processes import milliseconds, more_milliseconds, part, percent, ratios

PACKAGES = ("cromss-dist", "torch", "deepspeed", "ray", "segmentation-models-pytorch", "scipy", "numpy", "safetensors")
SWITCHES: dict[str, dict[str, Any]] = {  # differences from the first, which has every switch off
    "plain": {},
    "zero_stage=1": {"zero_stage": 1},
    "zero_stage=2": {"zero_stage": 2},
    "zero_stage=3": {"zero_stage": 3},
    "channels_last": {"channels_last": True},
    "fused_optimizer": {"fused_optimizer": True},
    "activation_checkpointing": {"activation_checkpointing": True},
    "precision=bf16": {"precision": "bf16"},
    "precision=fp16": {"precision": "fp16"},
    "compile": {"compile": True},
}
# On a CPU fp16 is tens of times slower, and leaves steps out until its loss scale fits; compiling takes many minutes.
FOR_GPUS = ("precision=fp16", "compile")
OFF = {
    "precision": "fp32",
    "channels_last": False,
    "activation_checkpointing": False,
    "compile": False,
    "fused_optimizer": False,
}
SWITCH_RANKS = 2
SCOPE_RANKS = (1, 2, 4)
LOSS_CROP_PX, LOSS_BATCH = 256, 8
SAVE_CROP_PX, SAVE_BATCH = 64, 2
SIZE_NOTE = "loss forward and backward, selection half way up its ramp"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="published numbers that the published step is checked with")
    parser.add_argument("--archive", type=Path, metavar="FOLDER", help="of `launch`; without it a synthetic one is made")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write train-<date>.md there")
    parser.add_argument("--encoder", default="resnet18", help="of all but `save` (default: %(default)s)")
    parser.add_argument("--save-encoder", default="resnet50", help="of `save` (default: %(default)s)")
    parser.add_argument("--crop-px", type=int, default=96, help="of all but `loss` and `save` (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="global, likewise (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of `loss`, `step` and `launch` (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="turns in a process (default: %(default)s)")
    parser.add_argument("--groups", nargs="*", choices=tuple(GROUPS), default=list(GROUPS), help="default: all")
    parser.add_argument("--switches", nargs="*", choices=tuple(SWITCHES), default=[n for n in SWITCHES if n not in FOR_GPUS])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: only what needs a GPU is measured")
    return parser.parse_args(arguments)


def work(options: argparse.Namespace) -> str:
    """What a step works on."""
    return f"two-branch U-Net on {options.encoder}, {options.batch} samples of {options.crop_px} px a step over all ranks"


def loss_group(options: argparse.Namespace) -> list[str]:
    """Label prior and loss, ours against published."""
    told = []
    for number in range(options.repeats):
        say(f"loss, {number + 1} of {options.repeats}")
        told.append(part(options, "loss", crop_px=LOSS_CROP_PX, batch=LOSS_BATCH))
    for one in told:  # their sum, turn by turn
        for who in ("ours", "published"):
            turns = zip(one["runs"][f"{who} prior"], one["runs"][f"{who} loss"], strict=True)
            one["runs"][f"{who} both"] = [{clock: a[clock] + b[clock] for clock in a} for a, b in turns]
    lines = [
        f"## Prior and loss: {LOSS_BATCH} samples of {LOSS_CROP_PX} px, {SIZE_NOTE}",
        "",
        "| | ours, CPU ms | published, CPU ms | times as fast | target |",
        "|---|---|---|---|---|",
    ]
    for what, aim in (("prior", "-"), ("loss", "-"), ("both", "1")):
        faster = ratios(told, f"published {what}", f"ours {what}")
        cells = [milliseconds(told, f"{who} {what}", "cpu_s") for who in ("ours", "published")]
        lines.append(f"| {what} | {' | '.join(cells)} | {spread(faster, 2)} | {aim} |")
    different = {name: max(one["differences"][name] for one in told) for name in told[0]["differences"]}
    stated = ", ".join(f"{name} {value:.0e}" for name, value in different.items())
    return [*lines, "", f"Largest differences between the two: {stated} (loss and gradient relative).", ""]


def step_group(options: argparse.Namespace) -> list[str]:
    """Whole steps: ours, bare, published."""
    told = []
    for number in range(options.repeats):
        say(f"step, {number + 1} of {options.repeats}")
        told.append(part(options, "step"))
    lines = [
        f"## A step of one rank, fp32: {work(options)}",
        "",
        "| | CPU ms | wall ms | CPU ms over bare | CPU time over bare | wall time over bare | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in ("bare", "ours", "published"):
        over = [more_milliseconds(told, way, "bare")]
        over += [percent(ratios(told, way, "bare", clock)) for clock in ("cpu_s", "wall_s")]
        cells = [milliseconds(told, way, clock) for clock in ("cpu_s", "wall_s")] + (["-"] * 3 if way == "bare" else over)
        lines.append(f"| {way} | {' | '.join(cells)} | {told[0]['first'][way]:.6f} |")
    return [
        *lines,
        "",
        "Target: ours less than 3 % over bare, Ray included: see the last section. What an engine adds depends on "
        "the number of weights and not on that of pixels: its share falls with the work of a step.",
        "",
    ]


def switch_group(options: argparse.Namespace) -> list[str]:
    """Every switch of the engine alone."""
    runs = {}
    for name in dict.fromkeys(("plain", *options.switches)):
        say(f"switch {name}")
        runs[name] = part(options, "switch", SWITCH_RANKS, engine={**OFF, **SWITCHES[name]})
    reference = runs["plain"]["losses"]
    lines = [
        f"## Switches of the engine: {SWITCH_RANKS} ranks, {work(options)}",
        "",
        "All off, fp32, ZeRO 0; then each alone. Peak: of rank 0, beyond what it held before the model was built. Loss: of the "
        f"last of {len(reference)} steps, each from the same weights; difference: the largest of all steps, relative.",
        "",
        "| switch | samples/s | of a core | of plain | peak, MiB | first two steps, s | last loss | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        rate, of_core = run["samples"] / run["wall_s"], run["samples"] / run["cpu_s"] / SWITCH_RANKS
        share = rate * runs["plain"]["wall_s"] / runs["plain"]["samples"]
        difference = max(abs(mine - theirs) / theirs for mine, theirs in zip(run["losses"], reference, strict=True))
        cells = [f"{rate:.2f}", f"{of_core:.2f}", f"{share:.2f}", f"{run['peak_mib']:.0f}", f"{run['warm_up_s']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {run['losses'][-1]:.6f} | {difference:.1e} |")
    return [*lines, "", "Target: ZeRO stages within 1e-4.", ""]


def scope_group(options: argparse.Namespace) -> list[str]:
    """The cost of seeing all ranks' pixels."""
    lines = [
        f"## What the global scope costs: {work(options)}",
        "",
        "Share of a step: 1 - (step with the loss, or with loss and batch norms, over one rank's pixels) / step, turn by turn. "
        "Collectives of loss, batch norms and the guard's vote a step, of one rank; seconds in them are mostly waiting for the "
        f"others, and four ranks share {os.cpu_count()} cores. DeepSpeed's own are not counted.",
        "",
        "| ranks | step, ms | loss global | loss and batch norms global | collectives | KiB | ms in them | local: collectives |",
        "|---|---|---|---|---|---|---|---|",
    ]
    accumulated = []
    for ranks in SCOPE_RANKS:
        say(f"scope, {ranks} ranks")
        told = part(options, "scope", ranks)
        counts, local = told["told"]["global"], told["told"]["local"]
        shares = [1 - ratios([told], way, "global", "wall_s")[0] for way in ("local loss", "local")]
        cells = [milliseconds([told], "global", "wall_s"), *(f"{100 * share:.1f} %" for share in shares)]
        cells += [f"{counts['collectives']:.0f}", f"{counts['bytes'] / 1024:.0f}", f"{1e3 * counts['seconds']:.1f}"]
        lines.append(f"| {ranks} | {' | '.join(cells)} | {local['collectives']:.0f} |")
        if "accumulated, exact" in told["runs"]:
            clock = "wall_s"
            times = [milliseconds([told], f"accumulated, {how}", clock) for how in ("micro", "exact")]
            more = percent(ratios([told], "accumulated, exact", "accumulated, micro", clock))
            accumulated.append(f"| {ranks} | {' | '.join(times)} | {more} |")
    lines += ["", "The same batch in two micro batches, exactly (a second forward pass) and with a loss of each micro batch:", ""]
    return [*lines, "| ranks | micro, ms | exact, ms | exact over micro |", "|---|---|---|---|", *accumulated, ""]


def save_group(options: argparse.Namespace) -> list[str]:
    """Checkpoints, ours and others."""
    say("save")
    told = part(options, "save", encoder=options.save_encoder, crop_px=SAVE_CROP_PX, batch=SAVE_BATCH, rounds=3)
    runs, size = told["runs"], told["bytes"]
    lines = [
        f"## A checkpoint of {options.save_encoder}: {size / 1e6:.0f} MB of one rank, in {tempfile.gettempdir()}",
        "",
        "| way | loop held up, s | on disk after, s | MB/s | loaded, s |",
        "|---|---|---|---|---|",
    ]
    for way in ("ours", "torch.save", "safetensors", "DeepSpeed"):
        cells = [spread([run[name] for run in runs[way]], 2) for name in ("held_s", "written_s")]
        cells.append(spread([size / 1e6 / run["written_s"] for run in runs[way]], 0))
        cells.append(spread([run["load_s"] for run in runs[way]], 2))
        lines.append(f"| {way} | {' | '.join(cells)} |")
    snapshot, verify = (spread([run[name] for run in runs["ours"]], 2) for name in ("snapshot_s", "verify_s"))
    alone, meanwhile = (spread([run[name] for run in runs["overlapped"]], 2) for name in ("step_s", "step_while_writing_s"))
    return [
        *lines,
        "",
        f"Of ours: copying to the host {snapshot} s, finding and verifying the newest checkpoint {verify} s. A step of "
        f"{SAVE_BATCH} x {SAVE_CROP_PX} px alone {alone} s, while a checkpoint is written {meanwhile} s.",
        "",
        "Weights, Adam's moments and buffers. ours: sha256 while it is written, a commit record last, verified before it is "
        "loaded; safetensors: `save_file`, then sha256; torch.save and DeepSpeed: no hash, DeepSpeed's are pickles. All wait for "
        "the disk; read back from the page cache.",
        "",
    ]


GROUPS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "loss": loss_group,
    "step": step_group,
    "switch": switch_group,
    "scope": scope_group,
    "save": save_group,
    "launch": launch_group,
}


def report(options: argparse.Namespace) -> str:
    """Measures, and writes the dated document."""
    before = os.getloadavg()[0]
    checked = "not checked against the published numbers (--golden)"
    if options.golden:
        deviation = largest_deviation(options.golden)
        if deviation > ATOL:
            raise SystemExit(f"The published step is {deviation:.1e} off {options.golden}, which is more than {ATOL:.0e}.")
        checked = f"within {deviation:.0e} of the published numbers in losses, gradients and priors"
    sections: list[str] = []
    for name in options.groups:
        sections += GROUPS[name](options)
    lines = [f"# Training, {date.today().isoformat()}", "", *machine(None, PACKAGES)]
    lines += [
        f"- Load of the machine before and after: {before:.1f}, {os.getloadavg()[0]:.1f}; one thread a rank",
        f"- {options.repeats} processes, {options.rounds} turns in each; median (lowest-highest)",
        f"- The published step, written from the method in plain torch: {checked}",
        "",
    ]
    return "\n".join([*lines, *sections])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures, prints."""
    options = parse_arguments(arguments)
    if options.device == "cuda":
        from train_device import measure_device

        text, name = measure_device(options), "train-gpu"
    else:
        text, name = report(options), "train"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}-{date.today().isoformat()}.md").write_text(text)


if __name__ == "__main__":
    main()

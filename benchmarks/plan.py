"""Holds the predictions of `cromss plan` against steps of the product that its profile was not measured with, on this machine.

    python benchmarks/plan.py --out benchmarks/results

The probe runs before and behind the steps, and the two profiles' predictions are averaged, so that a machine that slowly turns
faster or slower does not decide. One thread a rank; ranks are processes of this machine over gloo. Seconds of one rank are of its
CPU clock, as the probe's are; those of two ranks are of the wall, for which the machine must be idle. Takes about six minutes on
two idle cores.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from convert import machine as describe
from convert import say, spread
from train_processes import part

from cromss_dist.config import DataConfig, EngineConfig, ModelConfig, RunConfig
from cromss_dist.plan.collectives import Layout
from cromss_dist.plan.machine import Machine
from cromss_dist.plan.plan import Plan, Samples
from cromss_dist.plan.probe import probe

PACKAGES = ("cromss-dist", "torch", "deepspeed", "segmentation-models-pytorch", "numpy")
# Encoder, crop in px, global batch, ranks: none of them is among those of cromss_dist/plan/measure.py.
CASES = (
    ("resnet34", 96, 4, 1),
    ("resnet18", 160, 3, 1),
    ("resnet50", 64, 10, 1),
    ("efficientnet-b0", 96, 3, 1),
    ("resnet18", 96, 8, 2),
    ("resnet34", 64, 12, 2),
)
TARGET = 0.2


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write plan-<date>.md there")
    parser.add_argument("--rounds", type=int, default=4, help="steps of a case (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="processes of a case (default: %(default)s)")
    parser.add_argument("--cases", type=int, nargs="*", choices=range(len(CASES)), default=list(range(len(CASES))))
    parser.add_argument("--profile", type=Path, help="of this machine, in place of probing it")
    return parser.parse_args(arguments)


def predicted_s(profile: Machine, case: tuple[str, int, int, int]) -> float:
    """Seconds of a step, without images: benchmarks/train_ways.py makes them beforehand."""
    encoder, crop_px, batch, ranks = case
    config = RunConfig(
        data=DataConfig(crop_px=crop_px),
        model=ModelConfig(encoder=encoder),
        engine=EngineConfig(global_batch=batch, precision="fp32", device="cpu"),
    )
    step = Plan.of(config, profile, Layout(1, ranks), Samples(1000, 40)).step
    return sum(step.parts.values()) - step.parts["images"] - step.parts.get("reading", 0.0) + sum(step.sums.values())


def measured_s(options: argparse.Namespace, case: tuple[str, int, int, int]) -> list[float]:
    """Seconds of steps of the product: engine, loss, prior, guard and meter; rank 0's."""
    encoder, crop_px, batch, ranks = case
    engine = {"precision": "fp32", "device": "cpu"}
    size = {"encoder": encoder, "crop_px": crop_px, "batch": batch, "rounds": options.rounds}
    told = [part(argparse.Namespace(**size), "switch", ranks, engine=engine) for _ in range(options.repeats)]
    return [one["cpu_s" if ranks == 1 else "wall_s"] / options.rounds for one in told]


def report(options: argparse.Namespace) -> str:
    """Measures, and writes the dated document."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="cromss-plan-") as place:

        def profile() -> Machine:
            return Machine.read(options.profile) if options.profile else probe("cpu", Path(place), 1, say)

        first = profile()
        runs = {}
        for number in options.cases:
            say(f"{CASES[number]}")
            runs[CASES[number]] = measured_s(options, CASES[number])
        profiles = [first] if options.profile else [first, profile()]
    lines = [
        f"# Plan against steps, {date.today().isoformat()}",
        "",
        *describe(None, PACKAGES),
        f"- Load of the machine before and after: {before:.1f}, {os.getloadavg()[0]:.1f}; one thread a rank",
        f"- Profiles: residual {', '.join(f'{100 * one.residual:.0f} %' for one in profiles)}; crowding of two ranks "
        f"{', '.join(f'{one.crowding_of(2):.2f}' for one in profiles)}; step factor "
        f"{', '.join(f'{one.step_factor:.2f}' for one in profiles)}",
        f"- {options.rounds} steps in {options.repeats} processes each: median (lowest-highest); CPU time of one, wall of two",
        "",
        "| encoder | px | batch | ranks | measured, ms | predicted, ms | off | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, steps in runs.items():
        expected = statistics.mean(predicted_s(one, case) for one in profiles)
        off = expected / statistics.median(steps) - 1
        aim = "met" if abs(off) <= TARGET else "MISSED"
        cells = [*map(str, case), spread([1e3 * step for step in steps], 0), f"{1e3 * expected:.0f}", f"{100 * off:+.0f} %"]
        lines.append(f"| {' | '.join(cells)} | {100 * TARGET:.0f} %: {aim} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures, prints."""
    options = parse_arguments(arguments)
    text = report(options)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"plan-{date.today().isoformat()}.md").write_text(text)


if __name__ == "__main__":
    main()

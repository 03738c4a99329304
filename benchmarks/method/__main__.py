"""The proof: does pretraining with noisy labels help, does CromSS help beyond that, on a synthetic archive whose truth is known.

    python -m benchmarks.method WORK [--size full] [--processes 2] [--out benchmarks/results]

Makes archives, pretrains every variant, scores how well wrong labels are found, transfers every encoder, and writes the tables
(Markdown and JSON) and a figure. Everything lies in WORK: the same command goes on where one was cut. About an hour on two
cores; `--size smoke` takes a minute or two and ranks nothing; `--size gpu` is for one GPU. How to read it: docs/proof.md.

Exit codes: 0 every gate holds; 1 one does not; else that of an error.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from benchmarks.method.data import make_datasets, measure_separability, parts_of
from benchmarks.method.detection import detect
from benchmarks.method.findings import Findings
from benchmarks.method.jobs import Job, run_jobs
from benchmarks.method.page import draw, page
from benchmarks.method.plan import SIZES, VARIANTS, Size
from benchmarks.method.pretraining import pretrain
from benchmarks.method.transfer import transfer
from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import ConfigError, main_guard
from cromss_dist.tracking.revision import git_revision

SIZE_FILE = "size.json"


def stages(work: Path, size: Size) -> dict[str, list[Job]]:
    """All jobs; those of a stage need the results of the stages before it, and none of their own."""
    return {
        "data": [Job("data/" + "-".join(part), make_datasets, (work, size, *part)) for part in parts_of(size)],
        "separability": [Job("data/separability", measure_separability, (work,))],
        "pretraining": [Job(f"pretraining/{run.name}", pretrain, (work, size, run)) for run in size.pretrainings],
        "detection": [Job(f"detection/{run.name}", detect, (work, size, run)) for run in size.pretrainings],
        "transfer": [Job(f"transfer/{run.name}", transfer, (work, size, run)) for run in size.transfers],
    }


def check_work(work: Path, size: Size) -> None:
    """Marks the folder as of this size.

    Raises:
        ConfigError: it is of another.
    """
    losses = {variant: VARIANTS[variant] for variant in size.variants}
    stated, file = json.dumps(asdict(size) | {"losses": losses}, indent=1), work / SIZE_FILE
    if file.exists() and file.read_text() != stated:
        raise ConfigError(f"{work} holds the results of a proof of another size or plan; give another folder, or remove it.")
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(file, stated.encode())


def prove(work: Path, size: Size, processes: int) -> Findings:
    """Runs all that is not done yet, and reads what was found."""
    check_work(work, size)
    for stage, jobs in stages(work, size).items():
        run_jobs(work, jobs, processes, lambda line, stage=stage: print(f"{stage} {line}", file=sys.stderr, flush=True))  # type: ignore[misc]
    return Findings.read(work, size)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.method", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of archives, runs and results")
    parser.add_argument("--size", choices=SIZES, default="full", help="default: %(default)s")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at a time, one core each (default: as the size says)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write method-<date>.md, .json and .png there (default: WORK)")
    options = parser.parse_args(arguments)
    if options.processes is not None and options.processes < 1:
        raise ConfigError(f"--processes {options.processes} is not allowed; give 1 or more.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, proves, writes; returns the exit code."""
    options = parse_arguments(arguments)
    work, size = options.work.absolute(), SIZES[options.size]
    found = prove(work, size, options.processes or size.processes)
    today = date.today().isoformat()
    made_by = f"`python -m benchmarks.method --size {options.size}` of revision {git_revision()}; how to read it: docs/proof.md."
    text = "\n".join([f"# The proof, {today}", "", made_by, "", *page(found)])
    print(text)
    out = options.out or work
    out.mkdir(parents=True, exist_ok=True)
    stem = f"method-{options.size}-{today}"
    (out / f"{stem}.md").write_text(text)
    (out / f"{stem}.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    draw(found).savefig(out / f"{stem}.png", dpi=110)
    return 0 if found.holds else 1


if __name__ == "__main__":
    sys.exit(main_guard(main))

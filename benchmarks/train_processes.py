"""Starts the processes of benchmarks/train.py and puts what they told into figures."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert import ENVIRONMENT, HERE, Run, spread


def part(options: argparse.Namespace, name: str, ranks: int = 1, **settings: Any) -> dict[str, Any]:
    """Runs a part of train_contenders.py on `ranks` processes and returns what rank 0 told."""
    size = {"encoder": options.encoder, "crop_px": options.crop_px, "batch": options.batch, "rounds": options.rounds} | settings
    command = [sys.executable, str(HERE / "train_contenders.py"), name, "--ranks", str(ranks)]
    for key, value in size.items():
        command += [f"--{key.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    with tempfile.TemporaryDirectory(prefix="cromss-bench-") as folder:
        command += ["--meet", str(Path(folder) / "meet")]
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as stderr:
                of_rank = [*command, "--rank", str(rank)]
                processes.append(subprocess.Popen(of_rank, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, text=True))
        told = [process.communicate()[0] for process in processes]
        for process, log in zip(processes, logs, strict=True):
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    result: dict[str, Any] = json.loads(told[0].splitlines()[-1])
    return result


def median(runs: Sequence[Run], clock: str) -> float:
    """Of one process' runs."""
    return statistics.median(run[clock] for run in runs)


def ratios(told: Sequence[dict[str, Any]], way: str, against: str, clock: str = "cpu_s") -> list[float]:
    """How many times as long, turn by turn: the median of each process."""
    pairs = [zip(one["runs"][way], one["runs"][against], strict=True) for one in told]
    return [statistics.median(mine[clock] / theirs[clock] for mine, theirs in turns) for turns in pairs]


def milliseconds(told: Sequence[dict[str, Any]], way: str, clock: str) -> str:
    """The median of each process."""
    return spread([1e3 * median(one["runs"][way], clock) for one in told], 1)


def more_milliseconds(told: Sequence[dict[str, Any]], way: str, than: str) -> str:
    """CPU time beyond another way's, turn by turn: the median of each process."""
    pairs = [zip(one["runs"][way], one["runs"][than], strict=True) for one in told]
    return spread([1e3 * statistics.median(mine["cpu_s"] - theirs["cpu_s"] for mine, theirs in turns) for turns in pairs], 1)


def percent(values: Sequence[float]) -> str:
    """A ratio as what it adds to 1."""
    return spread([100 * (value - 1) for value in values], 1) + " %"

"""What recording costs a training step, beside direct calls of MLflow, and whether a store that is away slows the steps.

    python benchmarks/tracking.py [--steps 300] [--out benchmarks/results/tracking.json]

Cost: each step records its figures in three ways in turn, in one process, while our shipper sends: `Record`, one
`MlflowClient.log_metric` a figure, and one `MlflowClient.log_batch`. Steps: blocks of steps of a fixed piece of work, each
with a `Record`: of a store that answers, of one that refuses the connection, and of none; in this order and back.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.store import connect, initialise_store
from cromss_dist.train.run.record import Record

FIGURES = 30  # that a step of CromSS logs, about
PRODUCTS = 40  # of matrices, a step of the second part: about 50 ms
NOBODY = "http://127.0.0.1:9"  # the discard port: the connection is refused


def figures(step: int) -> dict[str, float]:
    """What a step records."""
    return {f"train/figure_{number}": step / (number + 1) for number in range(FIGURES)}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile of seconds, in ms."""
    return {name: float(np.percentile(seconds, q)) * 1e3 for name, q in (("median_ms", 50), ("p99_ms", 99))}


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cost_of_recording(folder: Path, uri: str, steps: int, pause_s: float) -> dict[str, Any]:
    """Time that one step's figures take, in each way."""
    from mlflow.entities import Metric

    client = connect(uri)
    experiment = client.create_experiment("direct")
    single, batch = (client.create_run(experiment).info.run_id for _ in range(2))
    took: dict[str, list[float]] = {"Record": [], "log_metric, one call a figure": [], "log_batch": []}
    run_dir = folder / "cost"
    run_dir.mkdir()

    def log_each(step: int) -> None:
        for key, value in figures(step).items():
            client.log_metric(single, key, value, step=step)

    def log_batch(step: int) -> None:
        now_ms = int(time.time() * 1000)
        client.log_batch(batch, metrics=[Metric(key, value, now_ms, step) for key, value in figures(step).items()])

    with Record(run_dir, uri) as record:
        record.begin("cost", "benchmark", {}, 0)
        ways: dict[str, Callable[[int], object]] = {
            "Record": lambda step: record.metrics(figures(step), step, step),
            "log_metric, one call a figure": log_each,
            "log_batch": log_batch,
        }
        for step in range(1, steps + 1):
            for name, way in ways.items():
                took[name].append(timed(lambda way=way, step=step: way(step)))  # type: ignore[misc]
            time.sleep(pause_s)
        delivery = record.finish(600)
    stored = sum(len(client.get_metric_history(str(delivery.run_id), key)) for key in figures(1))
    assert stored == FIGURES * steps, f"{stored} of {FIGURES * steps} points arrived"
    return {name: summary(seconds) for name, seconds in took.items()}


def cost_of_absence(folder: Path, uri: str, steps: int) -> dict[str, Any]:
    """Time of a step whose store answers, refuses, or is not asked at all."""
    matrix = np.random.default_rng(0).standard_normal((384, 384), dtype=np.float32)
    took: dict[str, list[float]] = {"up": [], "down": [], "no store": []}
    order = ["up", "down", "no store", "no store", "down", "up"]
    for number, state in enumerate(order):
        run_dir = folder / f"{number}-{state.replace(' ', '-')}"
        run_dir.mkdir()
        with Record(run_dir, {"up": uri, "down": NOBODY, "no store": None}[state]) as record:
            record.begin(run_dir.name, "benchmark", {}, 0)
            time.sleep(2.0)  # the shipper's first look is over
            for step in range(1, steps + 1):
                start = time.perf_counter()
                for _ in range(PRODUCTS):
                    matrix @ matrix
                record.metrics(figures(step), step, step)
                took[state].append(time.perf_counter() - start)
            record.finish(600 if state == "up" else 0)
        if state == "down":
            deliver(run_dir, uri)
    return {name: summary(seconds) for name, seconds in took.items()}


def main() -> None:
    """Prints the figures, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pause", type=float, default=0.02, metavar="SECONDS", help="between steps of the first part")
    parser.add_argument("--tracking_uri", metavar="URI", help="an empty store (default: SQLite in a temporary folder)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        uri = options.tracking_uri or f"sqlite:///{folder / 'mlflow.db'}"
        initialise_store(uri)
        results = {
            "store": uri.partition(":")[0],
            "cpus": os.cpu_count(),
            "figures a step": FIGURES,
            "steps": options.steps,
            "cost of recording": cost_of_recording(folder, uri, options.steps, options.pause),
            "step time": cost_of_absence(folder, uri, options.steps),
        }
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Runs without training, and what an MLflow store must have of them."""

import math
from pathlib import Path
from typing import Any

from cromss_dist.tracking.run.replica import RUN_TAG
from cromss_dist.tracking.run.spool import Spool, read_events, run_id_of
from cromss_dist.tracking.store import connect

Points = list[tuple[str, int, float | None]]  # key, step, value (None: not finite)


def write_attempt(run_dir: Path, steps: range, number: int = 1, scale: float = 1.0) -> None:
    """What rank 0 writes of one start that is cut after some steps."""
    with Spool(run_dir) as spool:
        spool.begin(run_dir.name, "cromss")
        spool.append("attempt", number=number, step=steps.start - 1)
        for step in steps:
            metrics = {"train/loss/total": scale / step, "train/lr": 0.1}
            spool.append("progress", step=step, samples=4 * step, metrics=metrics)


def end(run_dir: Path, status: str = "FINISHED") -> None:
    with Spool(run_dir) as spool:
        spool.append("end", status=status, error=None)


def expected_points(run_dir: Path) -> Points:
    """What a store must have of a spool: the first value of each key and step."""
    first: dict[tuple[str, int], float] = {}
    for event in read_events(run_dir):
        if event["event"] in ("progress", "validation"):
            samples = {"train/samples": float(event["samples"])} if event["event"] == "progress" else {}
            for key, value in (event["metrics"] | samples).items():
                first.setdefault((key, event["step"]), value)
    return sorted((key, step, value if math.isfinite(value) else None) for (key, step), value in first.items())


def stored_run(run_dir: Path, uri: str) -> Any:
    """The one run in a store that is of a run's folder."""
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{run_id_of(run_dir)}'")
    return run


def stored_points(run_dir: Path, uri: str) -> Points:
    """All rows that a store has of a run's curves."""
    client, run = connect(uri), stored_run(run_dir, uri)
    rows = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
    return sorted((row.key, row.step, row.value if math.isfinite(row.value) else None) for row in rows)

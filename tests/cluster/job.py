"""A driver on a cluster whose ranks note what they compute: `python -m tests.cluster.job RUN_DIR HOST:PORT NODES MIN_NODES`.

A note is a line of a rank in a folder of its attempt: `trace-3/steps-1.jsonl`. The file `pace` in the run's folder has the
seconds that each step takes longer, so that a test has time to break something in between.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cromss_dist.cluster import ClusterConfig
from cromss_dist.errors import main_guard
from cromss_dist.parse import CONFIG_FILE, parse_run
from cromss_dist.schema import Batch
from cromss_dist.train.run.folder import working_in
from launch import driver, worker
from tests.whole_runs import Trace, trace_of, trace_steps

PACE_FILE = "pace"


def noting_work(arguments: dict[str, Any]) -> None:
    """A rank, in place of launch.worker.work."""
    import torch
    import torch.distributed as dist

    from cromss_dist.data.loading.loader import TrainLoader

    run_dir = Path(arguments["run_dir"])
    number = torch.tensor([len(list(run_dir.glob("trace-*")))])
    dist.broadcast(number, 0)
    folder = run_dir / f"trace-{int(number)}"
    folder.mkdir(exist_ok=True)
    (folder / f"world-{dist.get_world_size()}").touch()
    trace_steps(folder, dist.get_rank())
    read = TrainLoader.__next__

    def next_batch(self: TrainLoader) -> Batch:
        time.sleep(float((run_dir / PACE_FILE).read_text()))
        return read(self)

    TrainLoader.__next__ = next_batch  # type: ignore[method-assign]
    worker.work(arguments)


@dataclass(frozen=True)
class Attempt:
    """What the workers computed from one start to the next."""

    world: int
    trace: Trace


def attempts_of(run_dir: Path) -> list[Attempt]:
    """Those of a run that computed a step, in order."""
    folders = sorted(run_dir.glob("trace-*"), key=lambda folder: int(folder.name.removeprefix("trace-")))
    found = [Attempt(int(next(folder.glob("world-*")).name.removeprefix("world-")), trace_of(folder)) for folder in folders]
    return [attempt for attempt in found if attempt.trace.losses]


def main() -> None:
    """The driver."""
    run_dir, address, nodes, min_nodes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    vars(driver)["work"] = noting_work
    config = parse_run([f"--config={run_dir / CONFIG_FILE}"]).config
    with working_in(run_dir, "python -m tests.cluster.job"):
        driver.drive(config, run_dir, ClusterConfig(kind="ray", nodes=nodes, min_nodes=min_nodes, wait_s=90), address)


if __name__ == "__main__":
    sys.exit(main_guard(main))

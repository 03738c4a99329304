"""Ranks that train nothing, in place of launch.worker.work: what a launcher does is seen without minutes of training."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import EngineConfig, FaultConfig, LaunchConfig, RunConfig
from cromss_dist.errors import CromssError, PreemptedError, main_guard
from cromss_dist.train.run.folder import RunSummary, working_in, write_summary
from cromss_dist.train.safety.failure import write_error
from cromss_dist.train.safety.hang import HangWatch
from cromss_dist.train.safety.stop import StopRequest
from launch import driver

ATTEMPTS_FILE = "attempts"


def rank(arguments: dict[str, Any]) -> None:
    """One rank. `name` of the config says which way each attempt goes: `die.ok` dies, then runs to the end."""
    run_dir, number = Path(arguments["run_dir"]), int(os.environ["RANK"])
    with (run_dir / f"{ATTEMPTS_FILE}-{number}").open("a+") as file:
        file.seek(0)
        attempt = len(file.readlines())
        file.write(f"{os.environ['WORLD_SIZE']}\n")
    how = arguments["config"]["name"].split(".")[attempt]
    try:
        with HangWatch(run_dir, number, arguments["config"]["faults"]["hang_timeout_s"]) as watch, StopRequest(run_dir) as stop:
            watch.beat("loop")
            while how == "wait" or (how == "die" and number == 0):
                watch.beat("loop")
                time.sleep(0.05)
                if stop.wanted:
                    raise PreemptedError("The run was asked to stop at step 7 and is saved.")
            match how:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(600)
    except CromssError as error:
        write_error(run_dir, number, error)
        raise
    if number == 0:
        finish(run_dir)


def finish(run_dir: Path) -> None:
    """Leaves what a run leaves that has ended."""
    write_summary(run_dir, RunSummary(str(run_dir), "0" * 32, "", 1, 1, 1, 1.0, {}, {}, {}, {}))


def main() -> None:
    """A launcher whose workers are these ranks: `stub RUN_DIR NAME [ADDRESS [WAIT_S]]`, 1 or 2 of them on a cluster."""
    vars(driver)["work"] = rank
    run_dir, name, *rest = sys.argv[1:]
    address = rest[0] if rest else None
    cluster = ClusterConfig(kind="ray", nodes=2, min_nodes=1, wait_s=float(rest[1])) if address else None
    config = RunConfig(
        name=name,
        launch=LaunchConfig(workers=2, min_workers=1 if address else None, max_restarts=name.count(".")),
        engine=EngineConfig(device="cpu"),
        faults=FaultConfig(hang_timeout_s=2),
    )
    with working_in(Path(run_dir), "python launch/pretrain.py"):
        driver.drive(config, Path(run_dir), cluster, address)


if __name__ == "__main__":
    sys.exit(main_guard(main))

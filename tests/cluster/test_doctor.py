"""launch/doctor.py on two hosts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.config import DataConfig, RunConfig, TrackingConfig
from cromss_dist.parse import write_yaml
from tests.cluster.conftest import Cluster
from tests.cluster.slurm_lab import SlurmLab
from tests.cluster.slurm_lab import lacking as slurm_lacking

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500


@pytest.fixture
def config(synthetic_shards: Path, store_uri: str, tmp_path: Path) -> Path:
    """The config of a run that every host can make."""
    run = RunConfig(data=DataConfig(shards=str(synthetic_shards), crop_px=32), tracking=TrackingConfig(uri=store_uri))
    write_yaml(run, tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def examine(cluster: Cluster, config: Path, output: str) -> tuple[int, dict[str, Any]]:
    """Examines the cluster from its second host; exit code, and level of each check that is not ok with its machines' names."""
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--json", "--config", str(config), "--output", output]
    command += ["--cluster.kind=ray", "--cluster.nodes=2", f"--cluster.ray.address={cluster.address}"]
    done = cluster.hosts[1].run(*command, env=cluster.environment, check=False, timeout_s=TIMEOUT_S)
    return done.returncode, levels_in(done.stdout)


def levels_in(printed: str) -> dict[str, Any]:
    return {
        f"{report['node'].split()[0]}: {finding['check']}": finding["level"]
        for report in json.loads(printed)["reports"]
        for finding in report["findings"]
        if finding["level"] == "fail" or finding["check"].endswith("across nodes")
    }


def across(names: list[str]) -> dict[str, str]:
    return {f"{name}: {what} across nodes": "ok" for name in names for what in ("locks", "create", "gloo")}


@pytest.mark.timeout(2 * TIMEOUT_S + 100)
def test_hosts_that_share_all_are_well_and_a_folder_of_each_is_found(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    names = [host.name for host in cluster.hosts]
    assert examine(cluster, config, str(tmp_path / "runs")) == (0, across(names))
    # Each host has a /dev/shm of its own. The first one has no such folder; the second waits for it in vain.
    assert examine(cluster, config, "/dev/shm/runs") == (
        1,
        {f"{name}: shared folder": "fail" for name in names},
    )


@pytest.mark.timeout(TIMEOUT_S + 100)
def test_nodes_of_slurm_are_examined_as_one_step(config: Path, tmp_path: Path) -> None:
    if why := slurm_lacking():
        pytest.skip(why)
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--json", "--config", str(config)]
    command += ["--output", str(tmp_path / "runs"), "--cluster.kind=slurm", "--cluster.nodes=2"]
    with SlurmLab() as lab:
        environment = lab.environment | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        names = [host.name for host in lab.hosts]
    assert (done.returncode, levels_in(done.stdout)) == (0, across(names)), done.stderr

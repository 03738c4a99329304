"""A closed Ray cluster on hosts of this machine, and a small run on it."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cromss_dist.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from tests.cluster.hosts import Host, Hosts, Process, lacking
from tests.cluster.job import PACE_FILE, Attempt, attempts_of
from tests.ranks import run_ranks
from tests.whole_runs import Trace, start_folder, trace_of, traced_run

TIMEOUT_S = 300.0  # for anything: a loaded machine is slow


def wait_for(what: str, happened: Callable[[], bool], running: Process | None = None, log: Path | None = None) -> float:
    """Waits until something happened, which a process brings about that writes a log; returns the seconds that it took."""
    started_s = time.monotonic()
    while not happened():
        if running is not None and running.poll() is not None:
            raise AssertionError(f"{what}: its process ended with {running.returncode}: {log and log.read_text()}")
        assert time.monotonic() < started_s + TIMEOUT_S, f"{what}: not within {TIMEOUT_S:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - started_s


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts."""
    if why := lacking():
        pytest.skip(why)
    with Hosts(2) as two:
        yield two


class Cluster:
    """A Ray cluster by launch.node: the first host is the head."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.token, self.announced = folder / "token", folder / "head"
        self.nodes: dict[str, Process] = {}
        folder.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver on it."""
        ours = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | ours

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        return self.announced.read_text().strip()

    def node(self, host: Host, *arguments: str) -> Process:
        """Starts launch.node on a host; what it writes is in `<host>.log`."""
        common = ["--address", host.address, "--token-file", str(self.token), "--cpus", "1"]
        common += ["--temp-dir", f"/tmp/ray/{host.name}"]  # the host's own, and gone with it
        with self.log(host).open("a") as log:
            command = [sys.executable, "-m", "launch.node", *common, *arguments]
            self.nodes[host.name] = host.popen(*command, env=self.environment, stdout=log, stderr=log)
        return self.nodes[host.name]

    def start_head(self, *arguments: str) -> None:
        """Starts the cluster and waits until it answers."""
        self.announced.unlink(missing_ok=True)
        node = self.node(self.hosts[0], "--head", "--announce", str(self.announced), *arguments)
        wait_for("the head", self.announced.exists, node, self.log(self.hosts[0]))

    def join(self, host: Host) -> None:
        """Adds a host and waits until it is a part."""
        before = self.said_by(host).count("Ray runs")
        node = self.node(host, "--join-announced", str(self.announced))
        wait_for(f"{host.name} joins", lambda: self.said_by(host).count("Ray runs") > before, node, self.log(host))

    def said_by(self, host: Host) -> str:
        """All that launch.node has written on a host."""
        return self.log(host).read_text() if self.log(host).exists() else ""

    def log(self, host: Host) -> Path:
        """Where launch.node writes on a host."""
        return self.folder / f"{host.name}.log"


@pytest.fixture
def cluster(hosts: Hosts, tmp_path: Path) -> Cluster:
    """Both hosts as one cluster."""
    made = Cluster(hosts, tmp_path / "cluster")
    made.start_head()
    made.join(hosts[1])
    return made


def config_of(shards: Path, store: Path, folder: Path) -> RunConfig:
    """Sixty steps of 4 samples, saved every third step, of networks that are as small as they can be."""
    shutil.copyfile(store, folder / "mlflow.db")
    epoch_steps = 9 / 4  # nine locations
    return RunConfig(
        data=DataConfig(shards=str(shards), crop_px=32, val_fraction=0.25, val_seasons=(0,)),
        model=ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8)),
        loss=LossConfig(ramp_epochs=10),
        train=TrainConfig(epochs=60 / epoch_steps, lr=1e-3, validate_every_epochs=1e6, log_every_steps=1, panel_samples=1),
        engine=EngineConfig(global_batch=4, device="cpu"),
        checkpoint=CheckpointConfig(every_epochs=3 / epoch_steps),
        tracking=TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}", register=False),
    )


class Job:
    """A run on a cluster, with a driver that can be killed and started again."""

    def __init__(self, cluster: Cluster, config: RunConfig, run_dir: Path, min_nodes: int) -> None:
        self.cluster, self.run_dir, self.min_nodes = cluster, run_dir, min_nodes
        self.log = run_dir / "driver.log"
        start_folder(run_dir, config)
        self.set_pace(0.3)
        self.driver: Process

    def set_pace(self, seconds: float) -> None:
        """How much longer each step takes."""
        staged = self.run_dir / ".pace"
        staged.write_text(str(seconds))
        staged.replace(self.run_dir / PACE_FILE)

    def start(self, host: Host) -> None:
        """Starts the driver on a host; by the same command each time."""
        command = [sys.executable, "-m", "tests.cluster.job", str(self.run_dir), self.cluster.address, "2", str(self.min_nodes)]
        with self.log.open("a") as log:
            self.driver = host.popen(*command, env=self.cluster.environment, stdout=log, stderr=log)

    @property
    def attempts(self) -> list[Attempt]:
        """What was computed so far."""
        return attempts_of(self.run_dir)

    def wait_for_steps(self, steps: int, attempt: int) -> float:
        """Waits until an attempt has computed so many; returns the seconds that it took."""

        def computed() -> bool:
            return len(self.attempts) > attempt and len(self.attempts[attempt].trace.losses) >= steps

        return wait_for(f"step {steps} of attempt {attempt}", computed, self.driver, self.log)

    def finish(self) -> None:
        """Waits until the driver has come to the end of the run."""
        self.set_pace(0)
        assert self.driver.wait(TIMEOUT_S) == 0, self.log.read_text()

    def accounted(self) -> Trace:
        """What the run's weights were computed from: of a step that was computed more than once, the last time.

        No attempt starts after a step that was lost.
        """
        losses: dict[int, float] = {}
        ids: dict[int, list[tuple[int, ...]]] = {}
        for attempt in self.attempts:
            first = min(attempt.trace.losses)
            assert first == 1 or first - 1 in losses, f"step {first - 1} is missing"
            kept = [step for step in losses if step < first]
            losses = {step: losses[step] for step in kept} | attempt.trace.losses
            ids = {step: ids[step] for step in kept} | attempt.trace.ids
        return Trace(losses, ids, sum(attempt.trace.num_computed for attempt in self.attempts))


StartJob = Callable[..., Job]


@pytest.fixture
def start_job(cluster: Cluster, synthetic_shards: Path, template_store: Path, tmp_path: Path) -> StartJob:
    """Starts a run on the cluster, with its driver on a host, and waits until it trains."""

    def start(host: Host, *, min_nodes: int) -> Job:
        job = Job(cluster, config_of(synthetic_shards, template_store, tmp_path), tmp_path / "run", min_nodes)
        job.start(host)
        job.wait_for_steps(5, attempt=0)
        return job

    return start


@pytest.fixture(scope="session")
def undisturbed(synthetic_shards: Path, template_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The same run by two ranks on this machine, without Ray, that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    content = start_folder(folder / "run", config_of(synthetic_shards, template_store, folder))
    assert run_ranks(traced_run, 2, folder / "run", content, timeout_s=600) == [0, 0]
    return trace_of(folder / "run")

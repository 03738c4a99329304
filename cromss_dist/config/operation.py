"""How a run is saved, guarded, recorded and started.

Layer 1.
"""

from dataclasses import dataclass
from typing import Literal

from cromss_dist.config.check import login_in, require
from cromss_dist.errors import ConfigError

OFFLINE = "offline"  # of `tracking.uri`


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, so that it can go on after a crash, on the same or another number of ranks.

    Args:
        every_epochs: Interval in epochs of training samples. The end is always saved.
        keep: Verified checkpoints that are kept, the newest ones.
        on_failure: What a saving that fails does, on a full disk, say: 'continue' trains on with the older ones and tells,
            'stop' ends the run.
    """

    every_epochs: float = 1.0
    keep: int = 2
    on_failure: Literal["continue", "stop"] = "continue"

    def __post_init__(self) -> None:
        require(self.every_epochs > 0, "checkpoint.every_epochs", self.every_epochs, "give more than 0")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "give at least 1")


@dataclass(frozen=True)
class FaultConfig:
    """What becomes of steps that go wrong, and of ranks that hang.

    Args:
        max_bad_steps: Steps in a row whose loss or gradient is not finite, after which the run ends; each of them is skipped
            on all ranks, and none is saved, so that it can go on from before them.
        spike: A loss above `spike_factor` times the median of the last `spike_window`: 'report' tells and counts, 'skip' also
            leaves the step out (two in a row at most, then that is the new level), 'off' does not look.
        spike_factor: See `spike`.
        spike_window: Steps.
        bundles: Bad steps of a run that are kept with their weights, for `cromss replay`.
        hang_timeout_s: Seconds without a sign of life, after which a rank dumps its stacks and the run ends. A step, a batch
            of validation, a wait for data or saving must not take as long.
    """

    max_bad_steps: int = 5
    spike: Literal["off", "report", "skip"] = "report"
    spike_factor: float = 10.0
    spike_window: int = 128
    bundles: int = 3
    hang_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        require(self.max_bad_steps >= 1, "faults.max_bad_steps", self.max_bad_steps, "give at least 1")
        require(self.spike_factor > 1, "faults.spike_factor", self.spike_factor, "give more than 1")
        require(self.spike_window >= 2, "faults.spike_window", self.spike_window, "give at least 2")
        require(self.bundles >= 0, "faults.bundles", self.bundles, "give 0 or more")
        require(1 <= self.hang_timeout_s <= 1e6, "faults.hang_timeout_s", self.hang_timeout_s, "give 1 to 1e6 seconds")


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is recorded and what its encoders are called.

    Args:
        uri: MLflow tracking URI, without a password, since the run records it; null is `sqlite:///<output>/mlflow.db`. `offline`
            sends nothing: `cromss track sync` does so later, from a machine that reaches a store.
        experiment: MLflow experiment.
        model_prefix: Encoders are registered as `<model_prefix>-<encoder>-<modality>`.
        alias: Alias that the new versions get.
        register: Whether encoders are registered at the end; their packages are written in any case.
        licence: SPDX licence of the encoders, for their cards.
        patience_s: Seconds that a run which has come to its end waits for the store; what it lacks then stays in the run's
            folder.
    """

    uri: str | None = None
    experiment: str = "cromss"
    model_prefix: str = "cromss"
    alias: str = "candidate"
    register: bool = True
    licence: str = "Apache-2.0"
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        require(self.patience_s >= 0, "tracking.patience_s", self.patience_s, "give seconds, 0 or more")
        if self.uri is not None and (mend := login_in(self.uri)):
            raise ConfigError(f"tracking.uri holds a login, which would be recorded with the run and its encoders; {mend}.")


@dataclass(frozen=True)
class LaunchConfig:
    """Which processes run it.

    Args:
        workers: Processes; null takes one a GPU, or one on a machine without GPU; on a cluster those of all its nodes.
        min_workers: Processes that are enough to go on when machines are lost or not there yet, as far as the global batch
            divides by them; more are taken as they come. null: all of `workers`, or those of `cluster.min_nodes`.
        cpus_per_worker: CPU cores of each worker: Ray reserves them, torch uses that many threads.
        ray: Whether Ray starts the workers. false runs one worker in this process, for debugging: same numbers.
        max_restarts: Times in a row that the workers are started again after one died or hung, without a new checkpoint in
            between; the run goes on from its last one. Machines that come or are taken back with a notice do not count.
    """

    workers: int | None = None
    min_workers: int | None = None
    cpus_per_worker: int = 1
    ray: bool = True
    max_restarts: int = 3

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, "launch.workers", self.workers, "give at least 1 or null")
        ok = self.min_workers is None or 1 <= self.min_workers <= (self.workers or self.min_workers)
        require(ok, "launch.min_workers", self.min_workers, "give 1 to launch.workers, or null")
        require(self.cpus_per_worker >= 1, "launch.cpus_per_worker", self.cpus_per_worker, "give at least 1")
        require(self.max_restarts >= 0, "launch.max_restarts", self.max_restarts, "give 0 or more")
        require(
            self.ray or self.workers in (None, 1), "launch.workers", self.workers, "launch.ray=false runs one worker; set it to 1"
        )

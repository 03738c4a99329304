"""Runs a pretraining on workers that Ray Train starts: here or on a cluster, again after a loss, more or fewer as machines come.

Layer 5.
"""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import RunConfig
from cromss_dist.errors import CromssError, HangError, PreemptedError, TrainingError
from cromss_dist.tracking.run.spool import tell
from cromss_dist.train.checkpoint.shelf import Shelf
from cromss_dist.train.run.conduct import CHECKPOINTS
from cromss_dist.train.run.folder import RunSummary, read_summary
from cromss_dist.train.safety.failure import forget_errors, read_error, set_aside_errors
from cromss_dist.train.safety.fence import new_ticket
from cromss_dist.train.safety.stop import holding_signals, passing_on_signals, stop_requested, take_resize
from cromss_dist.world import COLLECTIVE_TIMEOUT_S
from launch.elastic import Demand, Node, demand_of, resizing, wait_for_room
from launch.session import ROOT
from launch.session import cluster as ray_cluster
from launch.worker import quiet, work

LONGEST_PAUSE_S = 60.0  # before the workers start again
START_TIMEOUT_S = 30  # that Ray waits for the CPUs that it had just told to be free
HEALTH_INTERVAL_S = 0.5  # between two looks of Ray at the workers


def drive(
    config: RunConfig,
    run_dir: Path,
    cluster: ClusterConfig | None = None,
    address: str | None = None,
    *,
    profile: bool = False,
    allow_insecure: bool = False,
    code: Path = ROOT,
) -> RunSummary:
    """Runs a pretraining to its end on workers that Ray starts, and shows nothing: its events do.

    Workers that die or hang are started again from the last checkpoint, as many as the machines have room for and the batch
    divides by. Where machines come, or will be taken back with a notice, the run saves itself first, and nothing is lost.
    SIGTERM and SIGUSR1 to this process, and a file `stop` in the run's folder, make the workers save and stop.

    Args:
        config: The whole run, with absolute paths.
        run_dir: Its folder, made by `new_run_dir` and held with `working_in`; on a cluster, all machines see it.
        cluster: The machines; None is this one.
        address: `HOST:PORT` of a Ray cluster, of which this process's machine is a part; None: a private one is started on
            this machine.
        profile: Whether a few steps are traced.
        allow_insecure: Whether a cluster is joined that asks for no token.
        code: Folder of the packages that the workers of a cluster run; all machines see it.

    Returns:
        What the run left.

    Raises:
        CromssError: the error of a worker, with its own type and exit code.
        PreemptedError: the run was asked to stop and is saved.
        HangError: the workers hung, or died, once more in a row than `launch.max_restarts`, without a checkpoint in between.
        TrainingError: the same; the message has all causes, and names Ray's log folder.
        ClusterError: the cluster cannot be joined, or has had no room for the run for `cluster.wait_s` seconds.
        BatchError: see `demand_of`, as for ConfigError.
    """
    cluster = cluster or ClusterConfig()
    demand = demand_of(config, cluster)
    run = _Run(config, run_dir, demand, cluster.wait_s, address, profile)
    with passing_on_signals(run_dir), ExitStack() as joined:
        if address is not None:
            run.logs = _connect(joined, run, allow_insecure, code)
        while (cause := run.attempt()) is not None:
            run.recover(cause)
    summary = read_summary(run_dir)
    assert summary is not None, "rank 0 leaves it"
    return summary


class _EndedError(Exception):
    """Workers ended, and shall start again."""

    def __init__(self, cause: CromssError) -> None:
        self.cause = cause


@dataclass
class _Run:
    """The attempts of a run."""

    config: RunConfig
    run_dir: Path
    demand: Demand
    wait_s: float
    address: str | None
    profile: bool
    logs: str = ""
    causes: list[str] = field(default_factory=list)  # of losses without a checkpoint in between
    losses: int = 0  # in all
    saved_step: int = -1
    world: int = 0  # of the last attempt

    def attempt(self) -> CromssError | None:
        """Starts all workers once, and waits for them.

        Returns:
            What ended them where they shall start again; None where they came to the end of the run.

        Raises:
            CromssError: a worker's error, which a new start would not mend.
        """
        try:
            self._try()
        except _EndedError as ended:
            return ended.cause
        return None

    def _try(self) -> None:
        """As `attempt`; an end that is no error is raised, so that Ray's logs stay."""
        with ExitStack() as stack:
            if self.address is None:  # what is lost may be Ray's, so that each attempt here has one of its own
                self.logs = _connect(stack, self)
            places = wait_for_room(self.demand, self.wait_s, self.run_dir, is_first=self.world == 0)
            if self.world not in (0, len(places)):
                tell(self.run_dir, f"{len(places)} worker{'s' if len(places) > 1 else ''} in place of {self.world}.")
            self.world = len(places)
            try:
                with resizing(self.demand, places, self.run_dir, self.losses):
                    _run_workers(self, places)
            except Exception as error:
                new_ticket(self.run_dir)  # once it is there, nobody writes an error any more
                told = read_error(self.run_dir) or _error_by_ray(error)
                if told is None:
                    raise _EndedError(TrainingError(f"{_loss(error, places)} Ray's logs are in {self.logs}.")) from error
                resize = take_resize(self.run_dir)
                if isinstance(told, PreemptedError) and resize and not stop_requested(self.run_dir):
                    raise _EndedError(PreemptedError(f"{resize}. {told}")) from error
                if isinstance(told, HangError):
                    raise _EndedError(told) from error
                raise told from error
            finally:
                take_resize(self.run_dir)

    def recover(self, cause: Exception) -> None:
        """Gets ready for the next attempt, after a pause where workers were lost.

        Raises:
            PreemptedError: the run was asked to stop.
            TrainingError, HangError: workers were lost too often.
        """
        if isinstance(cause, PreemptedError):
            forget_errors(self.run_dir)
            tell(self.run_dir, f"{cause} The workers start again.")
            return
        if stop_requested(self.run_dir):
            raise PreemptedError(f"The run was asked to stop, and ended before it was saved again: {cause}") from cause
        saved_step = newest_step(self.run_dir)
        if saved_step > self.saved_step:
            self.causes.clear()
        self.saved_step = max(saved_step, self.saved_step)  # one that does not verify is no progress when it is made again
        self.losses += 1
        self.causes.append(str(cause))
        restarts_left = self.config.launch.max_restarts - len(self.causes) + 1
        if restarts_left <= 0:
            raise _summed_up(cause, self.causes) from cause
        folder = set_aside_errors(self.run_dir)
        left = f" What it left is in {folder}." if folder else ""
        tell(
            self.run_dir,
            f"{cause}{left} The workers start again; restarts that are left after this one, unless a checkpoint is saved: "
            f"{restarts_left - 1}.",
        )
        self._pause(min(LONGEST_PAUSE_S, 2.0 ** (len(self.causes) - 1)))

    def _pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not stop_requested(self.run_dir):
            time.sleep(0.2)


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint that was committed; -1 where there is none."""
    folder = run_dir / CHECKPOINTS
    return max(Shelf(folder).steps(), default=-1) if folder.is_dir() else -1


def _loss(error: Exception, places: Sequence[Node]) -> str:
    """What is known of an attempt whose workers left no error."""
    said = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if lost := [node.address for node in dict.fromkeys(places) if not node.answers()]:
        return f"{', '.join(lost)} answers no more. Ray says: {said}"
    return f"A worker died without a message of its own: {said}"


def _error_by_ray(error: Exception) -> CromssError | None:
    """The error of the lowest rank that raised one, as Ray hands it on: its file may not be seen here yet over NFS."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    raised = [getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())]
    return next((told for told in raised if isinstance(told, CromssError)), None)


def _summed_up(cause: Exception, causes: Sequence[str]) -> Exception:
    """The last cause, with those before it."""
    if len(causes) == 1:
        return cause
    before = "; ".join(f"{number}. {text}" for number, text in enumerate(causes[:-1], start=1))
    return type(cause)(f"{cause} So it went {len(causes)} times in a row without a new checkpoint; before: {before}")


def _connect(stack: ExitStack, run: _Run, allow_insecure: bool = False, code: Path = ROOT) -> str:
    """Ray until the stack closes, a private one or the cluster that is there; returns the folder of its logs."""
    with holding_signals():
        num_cpus = run.demand.worlds[0] * run.demand.cpus
        logs = stack.enter_context(ray_cluster(num_cpus, run.address, quiet, allow_insecure, code))
        stack.enter_context(passing_on_signals(run.run_dir))  # again: Ray has set a handler of its own
    return logs


def _run_workers(run: _Run, places: Sequence[Node]) -> None:
    """Starts a worker at each place once, and waits for them."""
    os.environ |= {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `resizing` looks for it: Ray would end the run at the deadline, unsaved
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_INTERVAL_S),
    }
    from ray.train import RunConfig as RayRunConfig
    from ray.train.v2.api.config import FailureConfig, ScalingConfig  # those of ray.train are typed as the old ones
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from launch.rendezvous import Rendezvous

    config, demand, ticket = run.config, run.demand, new_ticket(run.run_dir)
    trainer = DataParallelTrainer(
        work,
        train_loop_config={"config": config.to_dict(), "run_dir": str(run.run_dir), "profile": run.profile, "ticket": ticket},
        scaling_config=ScalingConfig(
            num_workers=len(places),
            use_gpu=demand.gpus > 0,
            resources_per_worker={"CPU": demand.cpus, "GPU": demand.gpus},
            label_selector=[{"ray.io/node-id": node.id} for node in places],
        ),
        # A rank that hangs must end by our watch, which says more, before the collectives of the others do.
        backend_config=Rendezvous(
            backend="nccl" if demand.gpus else "gloo",
            timeout_s=max(COLLECTIVE_TIMEOUT_S, 2 * config.faults.hang_timeout_s),
            loopback=run.address is None,
        ),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(run.run_dir),
            # Each loss is ours to mend: only we know which sizes may follow.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as stop:  # Ray's own handler of Ctrl-C aborts the workers and exits
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, handler)

"""Starts the workers of a run with Ray Train.

Layer 5.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from cromss_dist.config import RunConfig
from cromss_dist.errors import ConfigError, HangError, PreemptedError, TrainingError
from cromss_dist.train.run.events import tell
from cromss_dist.train.run.folder import RunSummary, read_summary
from cromss_dist.train.safety.failure import read_error, set_aside_errors
from cromss_dist.train.safety.stop import SIGNALS, passing_on_signals, stop_requested
from cromss_dist.world import COLLECTIVE_TIMEOUT_S, choose_device
from launch.session import cluster
from launch.worker import quiet, work

CONTROLLER_FAILURES = 5  # of Ray's, until an attempt is lost


def num_workers(config: RunConfig) -> int:
    """Workers of a run on this machine: the config's number, else one a GPU, else one.

    Raises:
        ConfigError: more workers than GPUs, for which Ray would wait for ever.
    """
    wish = config.launch.workers
    if choose_device(config.engine.device).type == "cpu":
        return wish or 1
    num_gpus = torch.cuda.device_count()
    if wish is not None and wish > num_gpus:
        raise ConfigError(
            f"launch.workers={wish} needs a GPU each, and this machine has {num_gpus}; set launch.workers to at most that, "
            "or engine.device to cpu."
        )
    return wish or num_gpus


def run_on_ray(config: RunConfig, run_dir: Path, *, profile: bool = False) -> RunSummary:
    """Runs a pretraining on workers that Ray starts on this machine.

    Workers that die or hang are started again up to `launch.max_restarts` times, and the run goes on from its last
    checkpoint; the run's events say why. SIGTERM and SIGUSR1 make the workers save and stop.

    Args:
        config: The whole run.
        run_dir: Its folder, made by `new_run_dir`.
        profile: Whether a few steps are traced.

    Raises:
        CromssError: the error of a worker, with its own type and exit code.
        PreemptedError: the run was asked to stop and is saved.
        HangError: the workers hung once more than they may be restarted.
        TrainingError: a worker died without saying why once more than that; the message names Ray's log folder.
    """
    arguments = {"config": config.to_dict(), "run_dir": str(run_dir), "profile": profile}
    with passing_on_signals(run_dir):
        for restarts_left in range(config.launch.max_restarts, -1, -1):
            lost = _attempt(config, arguments)
            if lost is None:
                break
            if stop_requested(run_dir):
                raise PreemptedError(f"The run was asked to stop, and ended before it was saved again: {lost}") from lost
            if not restarts_left:
                raise lost
            folder = set_aside_errors(run_dir)
            left = f" What it left is in {folder}." if folder else ""
            tell(run_dir, f"{lost}{left} The workers start again; restarts that are left after this one: {restarts_left - 1}.")
    summary = read_summary(run_dir)
    assert summary is not None, "rank 0 leaves it"
    return summary


def _attempt(config: RunConfig, arguments: dict[str, Any]) -> HangError | TrainingError | None:
    """Starts Ray and all workers once, and waits for them.

    Each attempt has a Ray of its own: what is lost may be Ray's, and one that lost workers has kept their CPUs for itself.

    Returns:
        How workers were lost, None where they came to the end of the run.

    Raises:
        CromssError: a worker's error, which a new start would not mend.
    """
    run_dir = Path(arguments["run_dir"])
    cpus = num_workers(config) * config.launch.cpus_per_worker
    with ExitStack() as stack:
        with _signals_held():
            logs = stack.enter_context(cluster(cpus, setup_hook=quiet))
            stack.enter_context(passing_on_signals(run_dir))  # again: Ray has set a handler of its own
        try:
            _run_workers(config, arguments)
        except Exception as error:
            told = read_error(run_dir)
            if told is None:
                return TrainingError(
                    f"A worker died without a message of its own: {str(error).strip().splitlines()[-1]} Ray's logs are in {logs}."
                )
            if isinstance(told, HangError):
                return told
            raise told from error
    return None


def _run_workers(config: RunConfig, arguments: dict[str, Any]) -> None:
    """Starts all workers once and waits for them."""
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig  # that of ray.train is typed as the old one

    on_gpu = choose_device(config.engine.device).type == "cuda"
    # Ray waits a minute for the CPUs of all workers, and would try for ever.
    failures = FailureConfig(max_failures=0, controller_failure_limit=CONTROLLER_FAILURES)
    trainer = TorchTrainer(
        work,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=num_workers(config),
            use_gpu=on_gpu,
            resources_per_worker={"CPU": config.launch.cpus_per_worker, "GPU": int(on_gpu)},
        ),
        # A rank that hangs must end by our watch, which says more, before the collectives of the others do.
        torch_config=TorchConfig(
            backend="nccl" if on_gpu else "gloo", timeout_s=int(max(COLLECTIVE_TIMEOUT_S, 2 * config.faults.hang_timeout_s))
        ),
        run_config=RayRunConfig(name="ray", storage_path=arguments["run_dir"], failure_config=failures),
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as stop:  # Ray's own handler of Ctrl-C aborts the workers and exits
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that stop a run wait for the end of the block; processes that it starts never get them.

    A scheduler sends them to every process of a job, and Ray's would end at once.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)

"""Starts the workers of a run with Ray Train.

Layer 5.
"""

import json
import signal
from pathlib import Path

import torch

from cromss_dist import errors
from cromss_dist.config import RunConfig
from cromss_dist.errors import ConfigError, CromssError, TrainingError
from cromss_dist.pretrain import SUMMARY_FILE, RunSummary
from cromss_dist.world import COLLECTIVE_TIMEOUT_S, choose_device
from launch.parallel import cluster
from launch.worker import ERROR_FILE, quiet, work


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


def run_on_ray(config: RunConfig, run_dir: Path) -> RunSummary:
    """Runs a pretraining on workers that Ray starts on this machine.

    Args:
        config: The whole run.
        run_dir: Its folder, made by `new_run_dir`.

    Raises:
        CromssError: the error of a worker, with its own type and exit code.
        TrainingError: a worker died without saying why; the message names Ray's log folder.
    """
    workers, cpus = num_workers(config), config.launch.cpus_per_worker
    on_gpu = choose_device(config.engine.device).type == "cuda"
    with cluster(workers * cpus, setup_hook=quiet) as logs:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            work,
            train_loop_config={"config": config.to_dict(), "run_dir": str(run_dir)},
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=on_gpu, resources_per_worker={"CPU": cpus, "GPU": int(on_gpu)}
            ),
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
            run_config=RayRunConfig(name="ray", storage_path=str(run_dir), failure_config=FailureConfig(max_failures=0)),
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except SystemExit as stop:  # Ray's own handler of Ctrl-C aborts the workers and exits
            raise KeyboardInterrupt from stop
        except Exception as error:
            raise _error_of_worker(run_dir) or TrainingError(
                f"A worker failed without a message of its own: {str(error).strip().splitlines()[-1]} Ray's logs are in {logs}."
            ) from error
        finally:
            signal.signal(signal.SIGINT, handler)
    return RunSummary(**json.loads((run_dir / SUMMARY_FILE).read_text()))


def _error_of_worker(run_dir: Path) -> CromssError | None:
    """The first error that a worker left, as the type it had."""
    for path in sorted(run_dir.glob(ERROR_FILE.format(rank="*"))):
        content = json.loads(path.read_text())
        kind = getattr(errors, content["type"], None)
        if isinstance(kind, type) and issubclass(kind, CromssError):
            return kind(content["message"])
    return None

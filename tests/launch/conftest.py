"""A run that is small enough for a test, as a user would type it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

SMALL = (
    *("--config", str(ROOT / "configs" / "pretrain" / "demo.yaml")),
    *("--data.crop_px", "32"),
    *("--train.epochs", "12"),
    *("--train.validate_every_epochs", "6"),
    *("--train.warmup_epochs", "0.5"),
    *("--train.log_every_steps", "1"),
    *("--loss.ramp_epochs", "5"),
)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def launch(synthetic_shards: Path) -> Run:
    """Runs launch/pretrain.py on the synthetic shards with further arguments; `output` is the folder of runs."""

    def run(output: Path, *arguments: str, timeout_s: float = 300) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *SMALL]
        command += ["--output", str(output), "--data.shards", str(synthetic_shards), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout_s, check=False)

    return run

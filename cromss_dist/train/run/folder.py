"""The folder of a run: how it is made, who works in it, what a finished run leaves.

Layer 3.
"""

import fcntl
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from cromss_dist.config import BaseRunConfig
from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import CheckpointError, ConfigError, OutputExistsError
from cromss_dist.parse import CONFIG_FILE, to_yaml, write_yaml
from cromss_dist.train.safety.failure import set_aside, set_aside_errors
from cromss_dist.train.safety.fence import RANKS_FILE, new_ticket
from cromss_dist.train.safety.stop import forget_stop

SUMMARY_FILE = "summary.json"
WEIGHTS_FILE = "model.safetensors"
_LOCK_FILE = ".lock"


@dataclass(frozen=True)
class RunSummary:
    """What a finished run leaves; also written as `summary.json` into its folder."""

    run_dir: str
    run_id: str | None  # in MLflow; None where that has not all of the run yet
    tracking_uri: str | None  # None where nothing is sent
    num_train: int
    num_val: int
    samples: int
    samples_per_s: float
    before: dict[str, float]  # validation metrics before the first step
    after: dict[str, float]  # and after the last
    registered: dict[str, int]  # model name -> version of what the registry has
    packages: dict[str, str]  # modality -> folder
    refused: dict[str, str] = field(default_factory=dict)  # model name -> error, of what the registry cannot have


def write_summary(run_dir: Path, summary: RunSummary) -> None:
    """Marks a run as finished."""
    write_atomically(run_dir / SUMMARY_FILE, (json.dumps(asdict(summary), indent=2) + "\n").encode())


def read_summary(run_dir: Path) -> RunSummary | None:
    """What a finished run left; None where it is not finished.

    Raises:
        CheckpointError: the file was damaged.
    """
    path = run_dir / SUMMARY_FILE
    try:
        return RunSummary(**json.loads(path.read_text())) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} was damaged ({error}). Remove it, and go on with the run: it has its checkpoints, and ends once more."
        ) from error


def write_weights(run_dir: Path, weights: Mapping[str, Tensor], network: str = "") -> None:
    """Writes the networks of a run that has come to its end as `model.safetensors`, whole or not at all.

    Args:
        run_dir: Folder of the run.
        weights: On the CPU.
        network: What they are of, for who builds it again; it is put into the file's header.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(run_dir / WEIGHTS_FILE, save(dict(weights), {"network": network} if network else None))


def mark_as_begun(run_dir: Path, config: BaseRunConfig) -> None:
    """What a run's folder says once the run goes on: this is its config from now on, and it is not finished."""
    (run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of before it was made longer
    write_atomically(run_dir / CONFIG_FILE, to_yaml(config).encode())


def new_run_dir(config: BaseRunConfig) -> Path:
    """Creates the run's folder `<output>/<name>-<time>` with the resolved config in it."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        run_dir = Path(config.output).absolute() / f"{config.name}-{stamp}{suffix}"
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        write_yaml(config, run_dir / CONFIG_FILE)
        return run_dir
    raise OutputExistsError(f"{run_dir} and 99 like it exist; set name or output to something else.")


@contextmanager
def holding(run_dir: Path) -> Iterator[bool]:
    """Holds a run's folder while the block runs, if nobody else does; says whether it does."""
    lock = os.open(run_dir / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


@contextmanager
def working_in(run_dir: Path, command: str, fresh: bool = False) -> Iterator[None]:
    """Holds a run's folder, clears what ended an earlier attempt, and says after an error how the run goes on.

    Args:
        run_dir: Folder of the run.
        command: What `--resume` is an argument of: `cromss pretrain`.
        fresh: Whether the run starts over: all that it has left goes to a folder `before-<n>` in it.

    Raises:
        OutputExistsError: another launcher works in it, or workers of an earlier one that do not end.
    """
    with holding(run_dir) as held:
        if not held:
            raise OutputExistsError(
                f"Another process runs {run_dir}, and two in one folder would spoil its checkpoints; let it end, or ask it to "
                f"stop with: touch {shlex.quote(str(run_dir / 'stop'))}"
            )
        new_ticket(run_dir)
        forget_stop(run_dir)
        set_aside_errors(run_dir)
        if fresh:
            _start_over(run_dir)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (ConfigError, CheckpointError)):  # these say what has to change before
                error.add_note(f"It goes on with: {command} --resume {shlex.quote(str(run_dir))}")
            raise


def _start_over(run_dir: Path) -> None:
    """Leaves nothing but the config: no checkpoint to go on from, no figures to go on with."""
    stay = re.compile(rf"{CONFIG_FILE}|{_LOCK_FILE}|{RANKS_FILE}|before-[0-9]+")
    set_aside([path for path in sorted(run_dir.iterdir()) if not stay.fullmatch(path.name)], run_dir / "before")

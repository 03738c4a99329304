"""A run as its driver sees it, and the program of a job that is sent to a cluster: `python -m launch.job`.

Layer 5. The job's folder holds this code (`snapshot.py`) and, as files, all that it is told. Its command is the same for every
run, so that no value of a config is ever part of one.
"""

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from cromss_dist.cluster import CLUSTER_FILE
from cromss_dist.config import RunConfig
from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import ConfigError, CromssError, main_guard
from cromss_dist.parse import CONFIG_FILE, ParsedRun, parse_run, to_yaml, write_yaml
from cromss_dist.pretrain.task import Pretraining
from cromss_dist.tracking.run.dead import end_from_outside
from cromss_dist.tracking.run.shipper import Shipper
from cromss_dist.train.run.conduct import report
from cromss_dist.train.run.folder import RunSummary, working_in
from cromss_dist.train.run.record import PARTING_S, end_of
from cromss_dist.train.run.watch import watching
from launch.driver import drive
from launch.elastic import demand_of
from launch.kuberay.machines import ask_for_all
from launch.snapshot import Snapshot

JOB_FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """What a job on a cluster is told beside config and cluster. Every try of it is told the same.

    Args:
        name: Of the job; no other has it.
        run_dir: Folder of the run as the cluster sees it. The first try makes it, and the others go on in it.
        command: What `--resume` is an argument of, for messages.
        resume: Whether the run is one that goes on.
        fresh: Whether it starts over.
        profile: Whether a few steps are traced.
        allow_insecure: Whether its cluster may be one that asks for no token.
    """

    name: str
    run_dir: str
    command: str
    resume: bool
    fresh: bool
    profile: bool
    allow_insecure: bool

    @classmethod
    def of(cls, run: ParsedRun[RunConfig], command: str) -> "Job":
        """The job of a command line. A new run's folder has its name already, so that whoever sends the job can tell it."""
        token = secrets.token_hex(3)
        new = f"{run.config.name}-{datetime.now():%Y%m%d-%H%M%S}-{token}"
        run_dir = run.resume or Path(run.config.with_absolute_paths().output) / new
        name = f"{run_dir.name}-{token}" if run.resume else new
        return cls(
            name,
            str(run_dir),
            command,
            resume=run.resume is not None,
            fresh=run.fresh,
            profile=run.profile,
            allow_insecure=run.allow_insecure,
        )

    def files(self, run: ParsedRun[RunConfig]) -> dict[str, bytes]:
        """Name and content of the files that the job reads."""
        files = {
            JOB_FILE: json.dumps(asdict(self), indent=2),
            CONFIG_FILE: to_yaml(run.config.with_absolute_paths()),
            CLUSTER_FILE: to_yaml(run.cluster),
        }
        return {name: text.encode() for name, text in files.items()}

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """The job whose files are in a folder."""
        return cls(**json.loads((folder / JOB_FILE).read_text()))

    def prepare(self, folder: Path) -> ParsedRun[RunConfig]:
        """Looks at what the run needs, makes its folder unless the job or the run goes on, and says what runs.

        Args:
            folder: That of the job's files.

        Raises:
            ConfigError: the folder of a run that goes on is none.
            OutputExistsError: another process works in it.
            CromssError: see `check`.
        """
        run_dir = Path(self.run_dir)
        begun = (run_dir / CONFIG_FILE).is_file()
        if self.resume and not begun:
            raise ConfigError(f"--resume={run_dir} is no folder of a run, as the cluster sees it: it has no {CONFIG_FILE}.")
        run = parse_run([f"--config={folder / CONFIG_FILE}", f"--cluster={folder / CLUSTER_FILE}"], clusters=True)
        run = replace(run, profile=self.profile, allow_insecure=self.allow_insecure)
        check(run)
        told = (folder / JOB_FILE).read_bytes()
        record = run_dir / JOB_FILE
        if self.fresh and not (record.is_file() and record.read_bytes() == told):  # once, whatever number of tries
            with working_in(run_dir, self.command, fresh=True):
                write_atomically(record, told)
        if not begun:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_yaml(run.config, run_dir / CONFIG_FILE)
        write_atomically(record, told)
        return run


def check(run: ParsedRun[RunConfig]) -> Pretraining:
    """What is known about a run of the largest crew that it may have, on a machine that sees its data.

    Raises:
        CromssError: see `Pretraining.of` and `demand_of`.
    """
    world = demand_of(run.config, run.cluster).worlds[0]
    return Pretraining.of(run.config, world, trains_here=run.cluster.kind == "here")


def train(run: ParsedRun[RunConfig], run_dir: Path, console: Console, command: str, address: str | None = None) -> RunSummary:
    """Drives a run to its end in its folder, and shows its progress.

    Args:
        run: With absolute paths in its config.
        run_dir: Exists, with the config in it.
        console: Where progress goes.
        command: What `--resume` is an argument of.
        address: `HOST:PORT` of the Ray cluster that this machine is a part of; None starts a private one.

    Raises:
        OutputExistsError: another process works in the folder.
        CromssError: see `launch.driver.drive`.
    """
    with (
        working_in(run_dir, command, run.fresh),
        watching(run_dir, console),
        ending_the_run(run_dir, run.config.tracking_uri),
    ):
        code = record(run, run_dir)
        return drive(run.config, run_dir, run.cluster, address, profile=run.profile, allow_insecure=run.allow_insecure, code=code)


def record(run: ParsedRun[RunConfig], run_dir: Path) -> Path:
    """Leaves cluster and code in a run's folder; returns the folder of the code, for PYTHONPATH."""
    write_atomically(run_dir / CLUSTER_FILE, to_yaml(run.cluster).encode())
    return Snapshot.take().write(run_dir)


@contextmanager
def ending_the_run(run_dir: Path, uri: str | None) -> Iterator[None]:
    """Ends the run of workers that were stopped before they could: KILLED after a stop, FAILED after an error."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError, CromssError):  # must not hide the error that ended the run
            end_from_outside(run_dir, *end_of(error))
            if uri is not None:
                Shipper(run_dir, uri, tell=lambda text: None).close(PARTING_S)
        raise


def main() -> int:
    """The driver of a job: its files are in the folder that is given, or here."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".").absolute()
    console = Console()
    job = Job.read(folder)
    run = job.prepare(folder)
    run_dir = Path(job.run_dir)
    address = os.environ["RAY_ADDRESS"]  # that Ray sets for the driver of a job
    console.print(f"  run folder {run_dir}", highlight=False, soft_wrap=True)
    if run.cluster.kind == "kuberay":
        ask_for_all(run.config, run.cluster, address)
    summary = train(run, run_dir, console, job.command, address)
    report(summary, console)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))

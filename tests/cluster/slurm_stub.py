"""What stands in for launch.node and launch.job where only Slurm's part of a job is looked at.

The cluster is a socket: the head announces it and the others hold on to it. The driver waits until it may finish, or is asked
to stop.
"""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

JOB = "from tests.cluster.slurm_stub import drive\n\ndrive()\n"
NODE = "from tests.cluster.slurm_stub import serve\n\nserve()\n"


def drive() -> None:
    """The run's driver: `started-<n>` is there once it runs, and has the number of nodes; it ends when there is `finish`."""
    run_dir, start = Path(sys.argv[1]).parent, os.environ.get("SLURM_RESTART_COUNT", "0")
    (run_dir / "stop").unlink(missing_ok=True)
    (run_dir / f"started-{start}").write_text(os.environ["SLURM_JOB_NUM_NODES"])
    while not (run_dir / "finish").exists():
        if (run_dir / "stop").exists():
            print("PreemptedError: The run is saved.", file=sys.stderr)
            sys.exit(75)
        time.sleep(0.1)


def serve() -> None:
    """A node of the cluster."""
    options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    assert Path(options["token-file"]).stat().st_mode & 0o777 == 0o600
    if "head" in options:
        with socket.create_server((options["address"], 0)) as server:
            Path(options["announce"]).write_text(f"{options['address']}:{server.getsockname()[1]}\n")
            others = []
            with suppress(KeyboardInterrupt):
                while True:
                    others.append(server.accept())
            return
    announced = Path(options["join-announced"])
    while not announced.exists():
        time.sleep(0.1)
    host, port = announced.read_text().split(":")
    with socket.create_connection((host, int(port))) as head:
        (announced.parent / f"joined-{socket.gethostname()}").touch()
        with suppress(KeyboardInterrupt, ConnectionResetError):
            head.recv(1)  # until it is gone

"""`cromss noise` on Ray: `python launch/noise.py --ray-address HOST:PORT --run RUN_DIR --manifest DIR --out OUT`.

Layer 5. The machines of the cluster have this code and see the same folders: of the run, the dataset and the output.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cromss_dist.commands.noise import add_arguments
from cromss_dist.errors import ConfigError, main_guard
from launch.parallel import ray_runner
from launch.session import check_joinable

if TYPE_CHECKING:  # heavy
    from cromss_dist.data.conversion.convert import Runner


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python launch/noise.py",
        description="What `cromss noise` does, and its verbs, in the processes of a Ray cluster, on CPUs: give --workers as many "
        "as it has cores. Without --ray-address Ray is started on this machine.",
    )
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="cluster to join, before a verb (default: a private one here)")
    add_arguments(parser)
    parser.set_defaults(runner=_ray)
    options = parser.parse_args(argv)
    return main_guard(lambda: options.run(options))


def _ray(options: argparse.Namespace) -> "Runner":
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is not allowed; give 1 or more.")
    if getattr(options, "device", "cpu") == "cuda":
        raise ConfigError("--device cuda is for one process; leave it out, or use `cromss noise` on the machine with the GPU.")
    if options.ray_address is not None:
        check_joinable(options.ray_address)
    return ray_runner(options.workers, options.ray_address)


if __name__ == "__main__":
    sys.exit(main())

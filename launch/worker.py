"""What Ray runs in its processes. Each of them unpickles references to this module, so it imports nothing heavy.

Layer 5.
"""

import logging
import os
from pathlib import Path
from typing import Any


def work(arguments: dict[str, Any]) -> None:
    """One rank of a run; an error that a user can mend goes to the run's folder, for the launcher to raise again.

    Args:
        arguments: `config`, the resolved config as a dictionary, `run_dir`, `profile`, and the `ticket` of this start.
    """
    from cromss_dist.config import RunConfig
    from cromss_dist.errors import CromssError, StorageError
    from cromss_dist.parse import from_dict
    from cromss_dist.pretrain.run import pretrain
    from cromss_dist.train.safety.failure import write_error
    from cromss_dist.train.safety.fence import admitted

    run_dir = Path(arguments["run_dir"])
    with admitted(run_dir, arguments["ticket"]):
        try:
            pretrain(from_dict(arguments["config"], RunConfig), run_dir, arguments["profile"])
        except (CromssError, OSError) as error:
            told = StorageError.of(error) if isinstance(error, OSError) else error
            write_error(run_dir, os.environ["RANK"], told)
            raise told from error


def quiet() -> None:
    """Without a dashboard, Ray Train's cleaner of placement groups complains every second in each process."""
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)

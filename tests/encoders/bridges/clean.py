"""Python processes that know nothing of the test's: what a user of another library runs."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[3]
# CPU builds of torch lack operators that torchvision's import asks for (models/torchvision_ops.py); this imports nothing else.
TORCHVISION = "import cromss_dist.models\n"
SAVE = """
import sys, numpy, torch

def image():
    return torch.from_numpy(numpy.load(sys.argv[2]))

def save(maps):
    numpy.savez(sys.argv[3], **{f"{k:02}": map_.detach().numpy() for k, map_ in enumerate(maps)})
"""


@dataclass(frozen=True)
class Reference:
    """An image, the encoder's maps of it, and files of both for another process."""

    image: Tensor
    maps: list[Tensor]
    image_file: Path

    def equals(self, maps_file: Path) -> bool:
        """Whether the maps in an .npz, in the order of its names, are these to the bit."""
        with np.load(maps_file, allow_pickle=False) as maps:
            return len(maps) == len(self.maps) and all(
                np.array_equal(maps[name], ours.numpy()) for name, ours in zip(sorted(maps), self.maps, strict=True)
            )


def run_clean(code: str, *arguments: object, cwd: Path = REPOSITORY) -> str:
    """Runs `code` with `sys.argv[1:]` = `arguments`, without network or threads; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CROMSS", "MLFLOW", "PYTEST"))}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",  # a package of TerraTorch's asks the network for its newest version
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout

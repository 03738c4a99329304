import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"


class Golden:
    """Numbers of the published implementation."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(value) for key, value in arrays.items()}

    def table(self, name: str) -> dict[str, Any]:
        table: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
        return table


@pytest.fixture(scope="session")
def golden() -> Golden:
    if not GOLDEN.is_dir():
        pytest.skip(f"the golden numbers are not at {GOLDEN}")
    return Golden()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Random logits, labels with ignored pixels and without class 7, and a prior: 4 samples of 12 x 10 px."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 9, 12, 10, generator=generator) * 2
    label = torch.randint(0, 9, (4, 12, 10), generator=generator)
    label[label == 7] = 2
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    prior = torch.rand(4, 9, 12, 10, generator=generator)
    return {"logits_s1": logits[0], "logits_s2": logits[1], "label": label, "prior": prior / prior.sum(1, keepdim=True)}

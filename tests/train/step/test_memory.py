"""What a forward pass keeps for its backward pass, counted by hand."""

import pytest
import torch
from torch import Tensor, nn

from cromss_dist.train.step.memory import saved_bytes


class Products(nn.Module):
    """Saves its two inputs and, once, both images again as the inputs of a sum of squares; and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        constant = (self.weight * 2).exp()  # keeps its result, 4000 bytes, whatever the batch
        scaled = s1 * constant[0]  # keeps s1
        return scaled.exp(), s2 * self.weight[0]  # keeps its result; keeps s2


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 64])
def test_bytes_kept_are_counted_once_without_weights_and_grow_by_the_sample(samples: int) -> None:
    s1, s2 = torch.rand(samples, 2, 8, 8), torch.rand(samples, 4, 8, 8)
    image = 4 * 8 * 8
    assert saved_bytes(Products(), s1, s2) == 4000 + samples * (2 * image + 2 * image + 4 * image)

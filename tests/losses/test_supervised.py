"""The loss on hard labels: torch's and smp's, on ranks and micro batches as on one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss  # type: ignore[import-untyped]
from torch import Tensor

from cromss_dist.losses.selection import ReduceSum
from cromss_dist.losses.supervised import SupervisedLoss, SupervisedOutput, Term
from tests.losses.test_ranks import Exchange

C = 5


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(4, C, 12, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def label() -> Tensor:
    label = torch.randint(0, C - 1, (4, 12, 10), generator=torch.Generator().manual_seed(1))  # class 4 is in no label
    label[:, :3] = 255
    label[3] = 255
    return label


def test_terms_are_those_of_the_published_code(logits: Tensor, label: Tensor) -> None:
    out = SupervisedLoss(("ce", "dice", "focal"), C)(logits, label)
    expected = {
        "ce": F.cross_entropy(logits, label, ignore_index=255),
        "dice": DiceLoss("multiclass", from_logits=True, ignore_index=255)(logits, label),
        "focal": FocalLoss("multiclass", gamma=2.0, ignore_index=255)(logits, label),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out.parts[name], value)
    torch.testing.assert_close(out.total, sum(out.parts.values(), torch.zeros(())))
    labelled = label != 255
    right = (logits.argmax(1) == label) & labelled
    assert out.counts.tolist() == [labelled.sum(), right.sum()]


def test_ignored_pixels_and_samples_that_only_fill_the_batch_have_no_gradient(logits: Tensor, label: Tensor) -> None:
    logits.requires_grad_()
    out = SupervisedLoss(("ce", "dice"), C)(logits, label, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    (slope,) = torch.autograd.grad(out.total, logits)
    assert not slope[1].any()
    assert not slope.movedim(1, -1)[label == 255].any()
    assert slope[0].any()


def test_a_batch_without_labels_has_loss_and_gradient_zero(logits: Tensor) -> None:
    logits.requires_grad_()
    out = SupervisedLoss(("ce", "dice", "focal"), C)(logits, torch.full((4, 12, 10), 255))
    (slope,) = torch.autograd.grad(out.total, logits)
    assert out.total == 0
    assert not slope.any()


def test_half_precision_logits_are_as_good_as_their_values(logits: Tensor, label: Tensor) -> None:
    rounded = logits.bfloat16()
    loss = SupervisedLoss(("ce", "dice"), C)
    assert loss(rounded, label).total == loss(rounded.float(), label).total


def test_ranks_have_the_loss_of_one_and_the_gradient_of_their_part(logits: Tensor, label: Tensor) -> None:
    terms: tuple[Term, ...] = ("ce", "dice", "focal")

    def step(reduce_sum: ReduceSum | None, world: int, rank: int) -> tuple[SupervisedOutput, Tensor]:
        rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
        mine = logits[rows].clone().requires_grad_()
        out = SupervisedLoss(terms, C, reduce_sum, world)(mine, label[rows])
        return out, torch.autograd.grad(out.total, mine)[0]

    one, slope = step(None, 1, 0)
    for world in (2, 4):
        exchange = Exchange(world)
        with ThreadPoolExecutor(world) as pool:
            ranks = [pool.submit(step, exchange.reduce_sum_of(rank), world, rank) for rank in range(world)]
            parts = [rank.result() for rank in ranks]
        for out, _ in parts:
            torch.testing.assert_close(out.total, one.total)
        torch.testing.assert_close(torch.cat([part for _, part in parts]) / world, slope, rtol=1e-5, atol=1e-8)
        assert torch.stack([out.counts for out, _ in parts]).sum(0).tolist() == one.counts.tolist()


def test_the_loss_of_a_set_is_that_of_its_batches_put_together(logits: Tensor, label: Tensor) -> None:
    loss = SupervisedLoss(("ce", "dice"), C)
    sums = sum(loss.validation_sums(logits[i : i + 1], label[i : i + 1]) for i in range(4))
    assert isinstance(sums, Tensor)
    whole = loss(logits, label)
    found = loss.validation_loss(sums)
    torch.testing.assert_close(found.pop("total").float(), whole.total)
    torch.testing.assert_close({name: value.float() for name, value in found.items()}, whole.parts)

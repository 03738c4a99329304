from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from cromss_dist.losses.consistency import consistency_sum
from cromss_dist.losses.segmentation import cross_entropy_sum, dice_loss, dice_sums, focal_sum, soft_label


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()


RTOL = 2e-6  # float32 against a float64 oracle
LABEL = torch.randint(0, 4, (2, 5, 6), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(2))


def test_soft_label_mixes_label_prior_and_uniform() -> None:
    prior = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(4)).softmax(1)
    target = soft_label(LABEL, prior, 4, 0.3, 0.2)
    onehot = F.one_hot(LABEL, 4).movedim(-1, 1)
    torch.testing.assert_close(target, 0.5 * onehot + 0.3 * prior + 0.05)
    torch.testing.assert_close(target.sum(1), torch.ones(2, 5, 6))
    assert torch.equal(soft_label(LABEL, None, 4, 0.3, 0.2), onehot.float())


def test_cross_entropy_is_torchs(logits: torch.Tensor) -> None:
    target = soft_label(LABEL, None, 4, 0.0, 0.0)
    ours = cross_entropy_sum(logits.log_softmax(1), target * WEIGHTS[:, None])
    expected = (F.cross_entropy(logits.double(), LABEL, reduction="none") * WEIGHTS).sum()
    torch.testing.assert_close(ours, expected, rtol=RTOL, atol=0)


def test_focal_is_its_formula(logits: torch.Tensor) -> None:
    onehot = F.one_hot(LABEL, 4).movedim(-1, 1).double()
    sigmoid = logits.double().sigmoid()
    right = onehot * sigmoid + (1 - onehot) * (1 - sigmoid)
    expected = (((1 - right) ** 2 * -right.log()).mean(1) * WEIGHTS).sum()
    torch.testing.assert_close(focal_sum(logits, onehot.float(), WEIGHTS), expected, rtol=RTOL, atol=0)


def test_dice_is_zero_when_right_and_one_when_wrong() -> None:
    onehot = F.one_hot(LABEL, 4).movedim(-1, 1).float()
    assert dice_loss(dice_sums(onehot, onehot * WEIGHTS[:, None], WEIGHTS)).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(dice_sums(onehot.roll(1, 1), onehot * WEIGHTS[:, None], WEIGHTS)).item() == pytest.approx(1, abs=1e-6)


def test_dice_of_a_class_without_labels_is_zero() -> None:
    sums = torch.tensor([[0.0, 0.0], [3.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    assert dice_loss(sums).item() == 0.5  # class 0: no label mass; class 1: no overlap; the mean is over both


def test_kl_is_torchs_and_has_the_gradient_of_cross_entropy(logits: torch.Tensor) -> None:
    log_probs = logits.log_softmax(1)
    other = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(5)).log_softmax(1)
    kinds: tuple[Literal["ce", "kl", "mse"], ...] = ("ce", "kl", "mse")
    sums = {kind: consistency_sum(kind, log_probs.exp(), log_probs, other.exp(), other, WEIGHTS) for kind in kinds}
    expected = (F.kl_div(log_probs.double(), other.double(), reduction="none", log_target=True).sum(1) * WEIGHTS).sum()
    torch.testing.assert_close(sums["kl"], expected, rtol=RTOL, atol=0)
    gradients = {kind: torch.autograd.grad(value, logits, retain_graph=True)[0] for kind, value in sums.items()}
    assert torch.equal(gradients["kl"], gradients["ce"])
    expected = (((log_probs.double().exp() - other.double().exp()) ** 2).sum(1) * WEIGHTS).sum()
    torch.testing.assert_close(sums["mse"], expected, rtol=RTOL, atol=0)

"""How far a branch may pull the other. The oracle counts pixel by pixel."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cromss_dist.config import LossConfig
from cromss_dist.errors import ConfigError
from cromss_dist.losses import CromssLoss, LossOutput
from cromss_dist.losses.confidence import predicted_class
from cromss_dist.losses.reliability import DOUBT_PX, Reliability, reliability
from cromss_dist.losses.selection import ReduceSum
from cromss_dist.schema import CLASS_NAMES

Batch = dict[str, Tensor]
C = 4
GRASS, SHRUB, WATER, BARE = range(C)
PUBLISHED = LossConfig(segmentation=("ce", "dice"))
AGREEMENT = dataclasses.replace(PUBLISHED, consistency_reliability="agreement")
PROGRESS = 60.0


def alone(x: Tensor) -> Tensor:
    return x


def of_pixels(*rows: tuple[int, int, int, int], reduce_sum: ReduceSum = alone) -> Reliability:
    """Reliability on a line of pixels: how many, label, S1's class, S2's class."""
    label, first, second = (torch.tensor([row[i] for row in rows for _ in range(row[0])])[None, None] for i in (1, 2, 3))
    return reliability((first.int(), second.int()), label, C, reduce_sum)


def loss_of(batch: Batch, config: LossConfig, **kwargs: Any) -> tuple[LossOutput, Tensor]:
    """The loss, and its gradients at both logits."""
    logits = torch.stack((batch["logits_s1"], batch["logits_s2"])).detach().clone().requires_grad_()
    output = CromssLoss(config)(logits[0], logits[1], batch["label"], batch["prior"], PROGRESS, **kwargs)
    (gradient,) = torch.autograd.grad(output.total, logits)
    return output, gradient


def test_weights_and_figures_are_those_of_a_count_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randint(0, C, (2, 30, 40), generator=generator, dtype=torch.int32) for _ in range(2))
    classes = torch.randint(0, C + 1, (2, 30, 40), generator=generator)  # C: no label
    found = reliability((a, b), classes, C, alone)
    expected = torch.zeros(2, 2, 30, 40)
    for first in range(C):
        for second in range(C):
            pair = (a == first) & (b == second)
            right = [float((pair & (classes == claimed)).sum()) for claimed in (first, second)]
            for m in range(2):
                expected[m][pair] = right[m] / (max(right) + DOUBT_PX)
    torch.testing.assert_close(found.weights, expected)
    labelled = classes < C
    for m, claimed in enumerate((a, b)):
        for c in range(C):
            torch.testing.assert_close(found.of_class[m, c], expected[m][labelled & (claimed == c)].mean())


def test_a_branch_that_cannot_see_a_class_does_not_take_it_from_one_that_can() -> None:
    found = of_pixels((5000, SHRUB, GRASS, SHRUB), (500, GRASS, GRASS, SHRUB), (5000, GRASS, GRASS, GRASS))
    s1_says_grass_s2_says_shrub = found.weights[:, 0, 0, 0]
    torch.testing.assert_close(s1_says_grass_s2_says_shrub, torch.tensor([500 / 5032, 5000 / 5032]))
    both_say_grass = found.weights[:, 0, 0, -1]
    torch.testing.assert_close(both_say_grass, torch.tensor([5000 / 5032, 5000 / 5032]))


def test_nothing_is_pulled_to_a_class_that_is_always_predicted_wrongly_or_never() -> None:
    found = of_pixels((1000, GRASS, WATER, GRASS), (1000, SHRUB, WATER, BARE), (1000, SHRUB, WATER, WATER))
    assert not found.weights[0].any()
    assert found.of_class[0].tolist() == [0, 0, 0, 0]
    assert found.of_class[1, GRASS] > 0.9
    assert found.of_class[1, [SHRUB, WATER, BARE]].tolist() == [0, 0, 0]


def test_branches_that_are_right_equally_often_pull_as_published_but_for_what_was_hardly_seen() -> None:
    found = of_pixels((3200, GRASS, GRASS, SHRUB), (3200, SHRUB, GRASS, SHRUB), (1, WATER, WATER, WATER))
    torch.testing.assert_close(found.weights[:, 0, 0, 0], torch.full((2,), 3200 / 3232))
    torch.testing.assert_close(found.weights[:, 0, 0, -1], torch.full((2,), 1 / 33))


def test_pixels_without_a_label_are_weighted_but_do_not_vote() -> None:
    labelled = of_pixels((100, SHRUB, GRASS, SHRUB), (50, GRASS, GRASS, SHRUB))
    more = of_pixels((100, SHRUB, GRASS, SHRUB), (50, GRASS, GRASS, SHRUB), (700, C, GRASS, SHRUB))
    assert torch.equal(more.weights[..., :150], labelled.weights)
    assert torch.equal(more.weights[..., 150:], labelled.weights[..., :1].expand(2, 1, 1, 700))
    assert torch.equal(more.of_class, labelled.of_class)
    assert not of_pixels((100, C, GRASS, SHRUB)).weights.any()


def test_ranks_exchange_whole_numbers_of_pixels_for_each_pair_and_label() -> None:
    sent: list[Tensor] = []

    def reduce_sum(x: Tensor) -> Tensor:
        sent.append(x)
        return x

    of_pixels((7, BARE, GRASS, SHRUB), (5, C, WATER, WATER), reduce_sum=reduce_sum)
    assert [(x.dtype, x.shape) for x in sent] == [(torch.float64, (C * C * (C + 1),))]
    table = sent[0].view(C, C, C + 1)
    assert [int(n) for n in (table[GRASS, SHRUB, BARE], table[WATER, WATER, C], table.sum())] == [7, 5, 12]


def test_the_predicted_class_is_that_of_argmax_in_any_memory_format() -> None:
    probs = torch.randn(3, 9, 16, 11, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert torch.equal(predicted_class(probs), probs.argmax(1).int())
    assert torch.equal(predicted_class(probs.contiguous(memory_format=torch.channels_last)), probs.argmax(1).int())
    nearly_equal = torch.full((1, 9, 1, 1), 1 / 9)
    assert predicted_class(nearly_equal).item() == 8
    nearly_equal[0, 3] *= 1 + 2**-18
    assert predicted_class(nearly_equal).item() == 3
    assert 0 <= predicted_class(torch.full((1, 9, 1, 1), torch.nan)).item() < 9


def test_logits_that_are_not_finite_make_a_loss_that_is_not_finite_and_no_error(batch: Batch) -> None:
    broken = batch["logits_s2"].clone()
    broken[1, :, 3:] = torch.nan
    assert loss_of(batch | {"logits_s2": broken}, AGREEMENT)[0].total.isnan()


def test_only_the_consistency_changes_and_only_by_its_weights(batch: Batch) -> None:
    published, _ = loss_of(batch, PUBLISHED)
    output, _ = loss_of(batch, AGREEMENT)
    figures = {name for name in output.parts if name.startswith("reliability")}
    assert output.parts.keys() - published.parts.keys() == figures
    assert figures == {f"reliability_{m}/{name}" for m in ("s1", "s2") for name in CLASS_NAMES}
    for name, value in published.parts.items():
        if not name.startswith("consistency"):
            assert torch.equal(output.parts[name], value)
    assert torch.equal(output.selection_s1, published.selection_s1)

    kind = dataclasses.replace(AGREEMENT, select=False)
    probs = batch["logits_s1"].softmax(1), batch["logits_s2"].softmax(1)
    predicted = probs[0].argmax(1).int(), probs[1].argmax(1).int()
    weights = reliability(predicted, batch["label"].where(batch["label"] != 255, 9), 9, alone).weights
    into_s1 = (weights[1] * -(probs[1] * probs[0].log()).sum(1)).mean()
    torch.testing.assert_close(loss_of(batch, kind)[0].parts["consistency_s1"], into_s1)


def test_a_branch_that_is_wrong_all_over_leaves_the_other_one_to_its_labels(batch: Batch) -> None:
    label = batch["label"].where(batch["label"] != 255, 0)
    wrong = {"label": label, "logits_s1": 9 * F.one_hot((label + 1) % 9, 9).movedim(-1, 1).float()}
    _, gradient = loss_of(batch | wrong, AGREEMENT)
    _, without = loss_of(batch | wrong, dataclasses.replace(PUBLISHED, consistency="none"))
    torch.testing.assert_close(gradient[1], without[1])
    assert (loss_of(batch | wrong, PUBLISHED)[1][1] - without[1]).abs().max() > 0.1 * without[1].abs().max()


def test_swapping_the_modalities_swaps_what_is_told_of_them(batch: Batch) -> None:
    output, gradient = loss_of(batch, AGREEMENT)
    swapped, swapped_gradient = loss_of(batch | {"logits_s1": batch["logits_s2"], "logits_s2": batch["logits_s1"]}, AGREEMENT)
    torch.testing.assert_close(gradient, swapped_gradient.flip(0))
    for name in ("reliability_{}/water", "reliability_{}/crops", "consistency_{}"):
        torch.testing.assert_close(output.parts[name.format("s1")], swapped.parts[name.format("s2")])


@pytest.mark.parametrize("consistency", ["ce", "kl", "mse"])
def test_loss_and_gradients_are_finite(batch: Batch, consistency: Any) -> None:
    config = dataclasses.replace(AGREEMENT, consistency=consistency)
    none_labelled = {"label": torch.full_like(batch["label"], 255)}
    for change in ({}, none_labelled):
        for scale in (0.0, 1.0, 1e28):
            logits = {m: batch[m] * scale for m in ("logits_s1", "logits_s2")}
            output, gradient = loss_of(batch | logits | change, config)
            assert all(part.isfinite() for part in output.parts.values())
            assert gradient.isfinite().all()
            assert not (change and output.parts["consistency_s1"])


def test_a_sample_of_weight_zero_is_as_if_left_out(batch: Batch) -> None:
    output, gradient = loss_of(batch, AGREEMENT, sample_weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    kept = [0, 2, 3]
    without, without_gradient = loss_of({key: value[kept] for key, value in batch.items()}, AGREEMENT)
    torch.testing.assert_close(output.parts, without.parts)
    torch.testing.assert_close(gradient[:, kept], without_gradient)


def test_nothing_waits_for_the_device(batch: Batch) -> None:
    # A fake tensor has no values: reading one on the host raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = CromssLoss(AGREEMENT)(**{key: mode.from_tensor(value) for key, value in batch.items()}, progress=PROGRESS)
    assert output.total.shape == ()


def test_reliability_without_consistency_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.consistency_reliability='agreement'.*loss\.consistency is none"):
        LossConfig(consistency="none", consistency_reliability="agreement")

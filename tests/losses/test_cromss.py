import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cromss_dist.losses import CromssLoss, LossConfig, LossOutput

Batch = dict[str, Tensor]
ALL_TERMS = LossConfig(segmentation=("ce", "dice", "focal"))
PROGRESS = 40.0


def run(batch: dict[str, Any], config: LossConfig = ALL_TERMS, progress: float = PROGRESS) -> tuple[LossOutput, Tensor, Tensor]:
    """The loss and its two gradients."""
    leaves = [batch[f"logits_{m}"].detach().clone().requires_grad_() for m in ("s1", "s2")]
    rest = {key: value for key, value in batch.items() if not key.startswith("logits")}
    output = CromssLoss(config)(leaves[0], leaves[1], progress=progress, **rest)
    output.total.backward()  # type: ignore[no-untyped-call]
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return output, grads[0], grads[1]


def assert_same(one: LossOutput, two: LossOutput) -> None:
    torch.testing.assert_close(one.total, two.total)
    torch.testing.assert_close(one.parts, two.parts)


def test_total_is_the_sum_of_its_parts(batch: Batch) -> None:
    output, *_ = run(batch, dataclasses.replace(ALL_TERMS, consistency_weight=0.7))
    parts = output.parts
    for m in ("s1", "s2"):
        torch.testing.assert_close(parts[f"segmentation_{m}"], parts[f"ce_{m}"] + parts[f"dice_{m}"] + parts[f"focal_{m}"])
    tie = parts["consistency_s1"] + parts["consistency_s2"]
    torch.testing.assert_close(output.total.detach(), parts["segmentation_s1"] + parts["segmentation_s2"] + 0.7 * tie)
    assert output.total.dtype == torch.float32
    assert not any(part.requires_grad for part in parts.values())
    labelled = batch["label"] != 255
    torch.testing.assert_close(parts["kept_s1"], output.selection_s1[labelled].mean())


def test_order_of_samples_and_pixels_does_not_matter(batch: Batch) -> None:
    output, grad, _ = run(batch)
    turned, turned_grad, _ = run({key: value.flip(0).flip(-1).mT for key, value in batch.items()})
    assert_same(output, turned)
    torch.testing.assert_close(grad.flip(0).flip(-1).mT, turned_grad)


def test_swapping_the_modalities_swaps_the_parts(batch: Batch) -> None:
    output, grad, _ = run(batch)
    swapped, _, swapped_grad = run(batch | {"logits_s1": batch["logits_s2"], "logits_s2": batch["logits_s1"]})
    torch.testing.assert_close(output.total, swapped.total)
    torch.testing.assert_close(output.parts["segmentation_s1"], swapped.parts["segmentation_s2"])
    torch.testing.assert_close(output.parts["consistency_s1"], swapped.parts["consistency_s2"])
    torch.testing.assert_close(grad, swapped_grad)


def test_renaming_the_classes_does_not_matter(batch: Batch) -> None:
    new_name = torch.tensor([3, 1, 8, 0, 2, 7, 4, 6, 5])
    label = torch.where(batch["label"] == 255, 255, new_name[batch["label"].clamp_max(8)])
    renamed = {key: torch.empty_like(value).index_copy_(1, new_name, value) for key, value in batch.items() if key != "label"}
    assert_same(run(batch)[0], run(renamed | {"label": label})[0])


def test_ignored_pixels_have_no_part_in_segmentation_and_selection(batch: Batch) -> None:
    config = dataclasses.replace(ALL_TERMS, consistency="none")
    ignored = (batch["label"] == 255)[:, None]
    output, grad, _ = run(batch, config)
    assert not grad.masked_select(ignored).any()
    noisy = {m: torch.where(ignored, -9.0, batch[m]) for m in ("logits_s1", "logits_s2")}
    assert_same(output, run(batch | noisy, config)[0])
    assert not output.selection_s1[ignored[:, 0]].any()
    with_tie = run(batch)[1]
    assert with_tie.masked_select(ignored).abs().min() > 0


def test_a_sample_of_weight_zero_is_as_if_left_out(batch: Batch) -> None:
    output, grad, _ = run(batch | {"sample_weights": torch.tensor([1.0, 0.0, 1.0, 1.0])})
    kept = [0, 2, 3]
    without, without_grad, _ = run({key: value[kept] for key, value in batch.items()})
    assert_same(output, without)
    torch.testing.assert_close(grad[kept], without_grad)
    assert not grad[1].any()


def test_no_prior_means_hard_labels(batch: Batch) -> None:
    hard = dataclasses.replace(ALL_TERMS, prior_weight=0.0, uniform_weight=0.0)
    assert_same(run(batch | {"prior": None})[0], run(batch, hard)[0])


@pytest.mark.parametrize(
    ("keep_share", "consistency", "confidence"),
    [  # each pair of two values at least once
        (0.0, "ce", "entropy"), (0.5, "ce", "gini"), (1.0, "ce", "gini"),
        (0.0, "kl", "gini"), (0.5, "kl", "entropy"), (1.0, "kl", "entropy"),
        (0.0, "mse", "entropy"), (0.5, "mse", "gini"), (1.0, "mse", "gini"),
        (0.0, "none", "gini"), (0.5, "none", "entropy"), (1.0, "none", "entropy"),
    ],
)  # fmt: skip
def test_loss_and_gradients_are_finite(batch: Batch, keep_share: float, consistency: Any, confidence: Any) -> None:
    config = LossConfig(("ce", "dice", "focal"), consistency, confidence=confidence, keep_share=keep_share)
    none_labelled = {"label": torch.full_like(batch["label"], 255)}
    one_class = {"label": torch.zeros_like(batch["label"])}
    for change in ({}, none_labelled, one_class, {"sample_weights": torch.zeros(4)}):
        for scale in (0.0, 1.0, 1e4, 1e28):
            logits = {m: batch[m] * scale for m in ("logits_s1", "logits_s2")}
            for progress in (0.0, 40.0, 80.0, 200.0):
                output, grad_s1, grad_s2 = run(batch | logits | change, config, progress)
                assert output.total.isfinite()
                assert all(part.isfinite() for part in output.parts.values())
                assert grad_s1.isfinite().all()
                assert grad_s2.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32_even_under_autocast(batch: Batch, dtype: torch.dtype) -> None:
    low = {m: batch[m].to(dtype) for m in ("logits_s1", "logits_s2")}
    expected, grad, _ = run(batch | {m: x.float() for m, x in low.items()})
    with torch.autocast("cpu", torch.bfloat16):
        output, low_grad, _ = run(batch | low)
    assert_same(output, expected)
    assert torch.equal(low_grad, grad.to(dtype))


def test_memory_layout_of_the_logits_does_not_matter(batch: Batch) -> None:
    channels_last = {m: batch[m].contiguous(memory_format=torch.channels_last) for m in ("logits_s1", "logits_s2")}
    assert_same(run(batch)[0], run(batch | channels_last)[0])


@pytest.mark.parametrize("consistency", ["ce", "kl", "mse"])
def test_nothing_waits_for_the_device(batch: Batch, consistency: Any) -> None:
    # A fake tensor has no values: reading one on the host raises.
    config = dataclasses.replace(ALL_TERMS, consistency=consistency)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) for key, value in batch.items()}
        output, *_ = run(fake | {"sample_weights": mode.from_tensor(torch.ones(4))}, config)
    assert output.total.shape == ()


def test_validation_loss_is_the_training_loss_with_hard_labels_and_all_weights_one(batch: Batch) -> None:
    loss = CromssLoss(dataclasses.replace(ALL_TERMS, select=False))
    validated = loss.validation_loss(loss.validation_sums(batch["logits_s1"], batch["logits_s2"], batch["label"]))
    trained, *_ = run(batch | {"prior": None}, dataclasses.replace(ALL_TERMS, select=False))
    torch.testing.assert_close(validated["total"].float(), trained.total.detach())
    for name in set(trained.parts) - {"kept_s1", "kept_s2"}:
        torch.testing.assert_close(validated[name].float(), trained.parts[name])


def test_any_partition_of_the_validation_set_gives_the_same_loss(batch: Batch) -> None:
    loss = CromssLoss(ALL_TERMS)
    data = (batch["logits_s1"], batch["logits_s2"], batch["label"])
    whole = loss.validation_loss(loss.validation_sums(*data))
    logits_s1, logits_s2, label = (x[[3, 3]] for x in data)  # the last batch is filled up
    sums = loss.validation_sums(logits_s1, logits_s2, label, torch.tensor([1.0, 0.0]))
    for part in (slice(0, 1), slice(1, 3)):
        logits_s1, logits_s2, label = (x[part] for x in data)
        sums = sums + loss.validation_sums(logits_s1, logits_s2, label)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(loss.validation_loss(sums), whole, rtol=1e-12, atol=1e-12)

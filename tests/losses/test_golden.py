"""Every golden number: the published implementation is the oracle."""

from typing import Any

import pytest
import torch

from cromss_dist.losses import CromssLoss, LossConfig, confidence
from cromss_dist.losses.segmentation import soft_label
from cromss_dist.losses.selection import consistency_weights, ramp

ATOL = 1e-5
EPOCHS = (0, 1, 20, 40, 80, 81, 199)
SHORT = {"c": "ce", "d": "dice", "f": "focal"}
CASES = (
    "cromss_cd_ce",
    "cromss_c_ce",
    "cromss_d_ce",
    "cromss_cd_kl",
    "cromss_cd_mse",
    "cromss_cd_none",
    "cromss_cd_ce_gini",
    "cromss_cd_ce_prop03_linear",
    "cromss_cd_ce_nosmooth",
    "cromss_cd_ce_weight05",
    "noselect_cd_ce",
    "noselect_cd_ce_nosmooth",
    "noselect_cd_none_nosmooth",
    "noselect_cdf_ce_nosmooth",
)
PARTS = {
    "tr_segloss_1": "segmentation_s1",
    "tr_segloss_2": "segmentation_s2",
    "tr_conloss_2t": "consistency_s1",
    "tr_conloss_2i": "consistency_s2",
}


def config_of(case: str) -> LossConfig:
    select, terms, consistency, *options = case.split("_")
    settings: dict[str, Any] = {"confidence": "gini"} if "gini" in options else {}
    if "prop03" in options:
        settings |= {"keep_share": 0.3, "ramp": "linear", "ramp_epochs": 50.0}
    if "weight05" in options:
        settings |= {"consistency_weight": 0.5}
    segmentation: Any = tuple(SHORT[term] for term in terms)
    return LossConfig(select=select == "cromss", segmentation=segmentation, consistency=consistency, **settings)  # type: ignore[arg-type]


def test_every_golden_case_is_in_the_list(golden: Any) -> None:
    assert {key.split("/")[0] for key in golden.table("losses")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_loss_parts_and_gradients_are_the_published_ones(golden: Any, case: str) -> None:
    inputs, gradients, losses = golden.tensors("inputs"), golden.tensors("gradients"), golden.table("losses")
    prior = None if "nosmooth" in case else golden.tensors("smoothing")["prior_ts"]
    loss = CromssLoss(config_of(case))
    for epoch in EPOCHS:
        logits = {m: inputs[f"logits_{m}"].clone().requires_grad_() for m in ("s1", "s2")}
        output = loss(logits["s1"], logits["s2"], inputs["target"], prior, float(epoch))
        output.total.backward()  # type: ignore[no-untyped-call]
        expected = losses[f"{case}/epoch{epoch}"]
        assert output.total.item() == pytest.approx(expected["total"], abs=ATOL)
        for theirs, ours in PARTS.items():
            if theirs in expected:
                assert output.parts[ours].item() == pytest.approx(expected[theirs], abs=ATOL), (epoch, ours)
        for modality, leaf in logits.items():
            gradient = gradients.get(f"{case}__epoch{epoch}__grad_{modality}")
            if gradient is not None:
                # Relative to the largest entry: gradients of a mean over 3,072 pixels are all below 1e-3.
                torch.testing.assert_close(leaf.grad / gradient.abs().max(), gradient / gradient.abs().max(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ["entropy", "gini"])
def test_confidences_are_the_published_ones(golden: Any, kind: Any) -> None:
    inputs, expected = golden.tensors("inputs"), golden.tensors("confidence")
    log_probs = [inputs[f"logits_{m}"].log_softmax(1) for m in ("s1", "s2")]
    prediction = torch.stack([confidence.prediction_confidence(x.exp(), x, kind) for x in log_probs])
    label = torch.stack([confidence.label_confidence(x.exp(), inputs["target"]) for x in log_probs])
    for name, values in ((f"pred_{kind}", prediction), ("label", label)):
        for i, modality in enumerate(("s1", "s2")):
            torch.testing.assert_close(values[i], expected[f"{name}_{modality}"], rtol=0, atol=ATOL)
            torch.testing.assert_close(confidence.refine(values)[i], expected[f"{name}_enhanced_{modality}"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ["exp", "linear"])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_weights_are_the_published_ones(golden: Any, kind: Any, epoch: int) -> None:
    inputs, expected = golden.tensors("inputs"), golden.tensors("selection")
    output = CromssLoss(LossConfig(ramp=kind))(inputs["logits_s1"], inputs["logits_s2"], inputs["target"], None, float(epoch))
    torch.testing.assert_close(output.selection_s1, expected[f"label_weight_{kind}_epoch{epoch}_s1"], rtol=0, atol=ATOL)
    torch.testing.assert_close(output.selection_s2, expected[f"label_weight_{kind}_epoch{epoch}_s2"], rtol=0, atol=ATOL)
    log_probs = [inputs[f"logits_{m}"].log_softmax(1) for m in ("s1", "s2")]
    refined = confidence.refine(torch.stack([confidence.prediction_confidence(x.exp(), x) for x in log_probs]))
    weights = consistency_weights(refined, ramp(epoch, kind, 80.0))
    for i, modality in enumerate(("s1", "s2")):
        torch.testing.assert_close(weights[i], expected[f"consistency_weight_{kind}_epoch{epoch}_{modality}"], rtol=0, atol=ATOL)


def test_ramp_is_the_published_one(golden: Any) -> None:
    for kind, by_length in golden.table("rampup").items():
        for length, by_epoch in by_length.items():
            for epoch, value in by_epoch.items():
                assert ramp(float(epoch), kind, float(length)) == pytest.approx(value, abs=1e-12), (kind, length, epoch)


def test_smoothed_label_is_the_published_one(golden: Any) -> None:
    inputs, expected = golden.tensors("inputs"), golden.tensors("smoothing")
    smoothed = soft_label(inputs["target"], expected["prior_ts"], 9, 0.15, 0.05)
    torch.testing.assert_close(smoothed, expected["smoothed_ts_015_005"], rtol=0, atol=ATOL)

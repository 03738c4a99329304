"""The published training step in plain torch, written from the method: what benchmarks/train.py measures ours against.

    python benchmarks/published_step.py --golden ../shared/golden        holds it against the published numbers

Label priors are made by SciPy on the CPU, one sample, season and class at a time, on the whole patch, and are then cropped
and flipped. Selection takes the classes one by one and waits for the device at each. Selection, Dice and batch norms see one
device's batch. Mixed precision is fp16 with a GradScaler on a GPU; on a CPU all is fp32. Nothing of `cromss_dist` runs here
but the settings' definition.

Shapes: B batch, T seasons, C classes, H x W patch, h x w crop.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from cromss_dist.config import LossConfig
from cromss_dist.schema import NUM_CLASSES

SIGMA_PX = 3
ATOL = 1e-5
TERMS = {"c": "ce", "d": "dice", "f": "focal"}  # as the golden numbers' cases are named


def label_prior(labels: npt.NDArray[np.uint8], season: int) -> npt.NDArray[np.float32]:
    """The prior 'ts' of one sample: labels (T, H, W) to class shares (C, H, W).

    Reference: CromSS, section III-B.
    """
    onehot = np.stack([labels == value for value in range(NUM_CLASSES)], axis=1).astype(np.float32)
    shares = []
    for mass in (onehot.mean(0), onehot[season]):
        smooth = np.stack([gaussian_filter(of_class, sigma=SIGMA_PX) for of_class in mass])
        shares.append(smooth / smooth.sum(0, keepdims=True))
    prior: npt.NDArray[np.float32] = (shares[0] + shares[1]) / 2
    return prior


def batch_prior(labels: Tensor, seasons: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The priors of a batch, sample by sample: labels uint8 (B, T, H, W) to float32 (B, C, h, w), all on the host.

    `rows` (B, h) and `cols` (B, w) say where the crop, flipped or not, comes from.
    """
    priors = []
    for of_sample, season, row, col in zip(labels.numpy(), seasons.tolist(), rows.numpy(), cols.numpy(), strict=True):
        priors.append(label_prior(of_sample, season)[:, row[:, None], col])
    return torch.from_numpy(np.stack(priors))


def smoothed_label(label: Tensor, prior: Tensor | None, config: LossConfig) -> Tensor:
    """Z': float32 (B, C, h, w)."""
    onehot = F.one_hot(label, NUM_CLASSES).permute(0, 3, 1, 2).float()
    if prior is None:
        return onehot
    a, b = config.prior_weight, config.uniform_weight
    return (1 - a - b) * onehot + a * prior + b / NUM_CLASSES


def label_weights(confidence: Tensor, label: Tensor, ratio: float) -> Tensor:
    """W_l of one modality, class by class with `topk`.

    Reference: CromSS, section III-C.
    """
    if ratio == 1:
        return torch.ones_like(confidence)
    if ratio == 0:
        return confidence
    weights = torch.zeros_like(confidence)
    for value in range(NUM_CLASSES):
        mask = label == value
        k = int(mask.sum().item() * ratio)
        if k == 0:
            continue
        of_class = confidence[mask]
        threshold = torch.topk(of_class, k).values[-1].item()
        weights[mask] = (of_class / threshold).clamp(0, 1) if threshold > 0 else torch.ones_like(of_class)
    return weights


def dice_loss(probs: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Soft Dice, class by class over the batch."""
    losses = []
    for value in range(NUM_CLASSES):
        q, z = probs[:, value], target[:, value]
        mass = (weights * z).sum()
        if mass.item() == 0:
            losses.append(torch.zeros_like(mass))
            continue
        overlap = (weights * q * z).sum()
        losses.append(1 - 2 * overlap / ((weights * q).sum() + mass).clamp_min(1e-7))
    return torch.stack(losses).mean()


def focal_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Focal loss of one class against the rest, gamma 2, mean over classes."""
    binary = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (((1 - torch.exp(-binary)) ** 2 * binary).mean(1) * weights).sum() / weights.sum()


class PublishedLoss:
    """CromSS on one device's batch.

    Args:
        config: Terms, ramp, weights; the scope has no meaning here.

    Reference: CromSS, section III.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def ramp(self, epoch: float) -> float:
        """How far selection has set in."""
        length = self.config.ramp_epochs
        if self.config.ramp == "none" or epoch > length:
            return 1.0
        share = epoch / length
        return share if self.config.ramp == "linear" else math.exp(-5 * (1 - share) ** 2)

    def __call__(self, logits: tuple[Tensor, Tensor], label: Tensor, prior: Tensor | None, epoch: float) -> dict[str, Tensor]:
        """The loss.

        Args:
            logits: float32 (B, C, h, w) of both branches.
            label: int64 (B, h, w), classes 0..C-1.
            prior: float32 (B, C, h, w), or None for hard labels.
            epoch: Epochs trained.

        Returns:
            `total`, and what it adds up: `segmentation` and weighted `consistency` of both branches.
        """
        config = self.config
        probs = [F.softmax(of_branch, 1) for of_branch in logits]
        fixed = [of_branch.detach() for of_branch in probs]
        target = smoothed_label(label, prior, config)
        selection, consistency = self._weights(fixed, label, epoch)
        parts = {}
        for i, name in enumerate(("s1", "s2")):
            weight = selection[i]
            log_probs = F.log_softmax(logits[i], 1)
            terms = []
            if "ce" in config.segmentation:
                terms.append((weight * -(target * log_probs).sum(1)).sum() / weight.sum())
            if "dice" in config.segmentation:
                terms.append(dice_loss(probs[i], target, weight))
            if "focal" in config.segmentation:
                terms.append(focal_loss(logits[i], target, weight))
            parts[f"segmentation_{name}"] = torch.stack(terms).sum()
            if config.consistency != "none":
                other_weight = consistency[1 - i]
                distance = self._distance(log_probs, probs[i], fixed[1 - i])
                parts[f"consistency_{name}"] = config.consistency_weight * (other_weight * distance).sum() / other_weight.sum()
        return {"total": torch.stack(list(parts.values())).sum(), **parts}

    def _distance(self, log_probs: Tensor, probs: Tensor, other: Tensor) -> Tensor:
        match self.config.consistency:
            case "mse":
                return (probs - other).square().sum(1)
            case "kl":
                return F.kl_div(log_probs, other, reduction="none").sum(1)
            case _:
                return -(other * log_probs).sum(1)

    @torch.no_grad()
    def _weights(self, probs: list[Tensor], label: Tensor, epoch: float) -> tuple[list[Tensor], list[Tensor]]:
        config, ramp = self.config, self.ramp(epoch)
        if not config.select:
            ones = [torch.ones_like(label, dtype=torch.float32)] * 2
            return ones, ones
        of_label = [of_branch.gather(1, label[:, None])[:, 0] for of_branch in probs]
        if config.confidence == "gini":
            sure = [of_branch.square().sum(1) for of_branch in probs]
        else:
            sure = [1 + (of_branch * torch.log(of_branch + 1e-12)).sum(1) / math.log(NUM_CLASSES) for of_branch in probs]
        sure = [of_branch.clamp(0, 1) for of_branch in sure]
        of_label = [(of_branch + of_label[0] * of_label[1]) / 2 for of_branch in of_label]
        sure = [(of_branch + sure[0] * sure[1]) / 2 for of_branch in sure]
        ratio = 1 - ramp * (1 - config.keep_share) if epoch <= config.ramp_epochs else config.keep_share
        return [label_weights(of_branch, label, ratio) for of_branch in of_label], [(1 - ramp) + ramp * c for c in sure]


class PublishedStep:
    """One optimiser step: forward, loss, backward, Adam.

    Args:
        model: The two branches, on their device.
        config: The loss.
        lr: Adam's learning rate.
        weight_decay: Its L2 penalty.

    Reference: CromSS, section IV-A.
    """

    def __init__(self, model: nn.Module, config: LossConfig, lr: float, weight_decay: float) -> None:
        self.model, self.loss = model, PublishedLoss(config)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
        self.mixed = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mixed)

    def __call__(self, s1: Tensor, s2: Tensor, label: Tensor, prior: Tensor, epoch: float) -> dict[str, float]:
        """Trains on a batch and returns the parts of its loss, read every step as the published loop does for its log."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.float16, enabled=self.mixed):
            logits = self.model(s1, s2)
        parts = self.loss((logits[0].float(), logits[1].float()), label, prior.to(self.device), epoch)
        self.scaler.scale(parts["total"]).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: value.item() for name, value in parts.items()}


def config_of(case: str) -> LossConfig:
    """The settings of a golden case by its name."""
    select, terms, consistency, *options = case.split("_")
    settings: dict[str, object] = {
        "select": select == "cromss",
        "segmentation": tuple(TERMS[term] for term in terms),
        "consistency": consistency,
        "confidence": "gini" if "gini" in options else "entropy",
        "consistency_weight": 0.5 if "weight05" in options else 1.0,
    }
    if "prop03" in options:
        settings |= {"keep_share": 0.3, "ramp": "linear", "ramp_epochs": 50.0}
    return LossConfig(**settings)  # type: ignore[arg-type]


def largest_deviation(golden: Path) -> float:
    """The largest difference to the published numbers: priors, losses, gradients (relative to their largest entry)."""

    def arrays(name: str) -> dict[str, Tensor]:
        with np.load(golden / f"{name}.npz", allow_pickle=False) as stored:
            return {key: torch.from_numpy(stored[key]) for key in stored}

    inputs, smoothing, gradients = arrays("inputs"), arrays("smoothing"), arrays("gradients")
    labels = inputs["labels"]
    whole = torch.arange(labels.shape[-1]).expand(len(labels), -1)
    prior = batch_prior(labels, inputs["seasons"], whole, whole)
    deviations = [float((prior - smoothing["prior_ts"]).abs().max())]
    for name, expected in json.loads((golden / "losses.json").read_text()).items():
        case, _, epoch = name.partition("/epoch")
        logits = (inputs["logits_s1"].clone().requires_grad_(), inputs["logits_s2"].clone().requires_grad_())
        found = PublishedLoss(config_of(case))(logits, inputs["target"], None if "nosmooth" in case else prior, float(epoch))
        found["total"].backward()  # type: ignore[no-untyped-call]
        deviations.append(abs(found["total"].item() - expected["total"]))
        for leaf, modality in zip(logits, ("s1", "s2"), strict=True):
            gradient = gradients.get(f"{case}__epoch{epoch}__grad_{modality}")
            if gradient is not None and leaf.grad is not None:
                deviations.append(float((leaf.grad - gradient).abs().max() / gradient.abs().max()))
    return max(deviations)


def main() -> int:
    """Compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True, metavar="FOLDER", help="of the published numbers")
    largest = largest_deviation(parser.parse_args().golden)
    print(f"largest difference to the published numbers: {largest:.1e} ({'not ' if largest > ATOL else ''}within {ATOL:.0e})")
    return int(largest > ATOL)


if __name__ == "__main__":
    raise SystemExit(main())

"""The CromSS loss: segmentation of both branches on selected pixels, and consistency between them.

Everything is first a sum over pixels, then summed over ranks, then divided: one device, many, and a whole validation set
give the same number. Shapes: B batch, C classes, H x W px; index 0 is S1, 1 is S2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cromss_dist.config import LossConfig
from cromss_dist.losses import confidence, segmentation
from cromss_dist.losses.consistency import consistency_sum
from cromss_dist.losses.counts import Counts, count
from cromss_dist.losses.reliability import reliability
from cromss_dist.losses.selection import ReduceSum, consistency_weights, keep_ratio, ramp, selection_weights
from cromss_dist.schema import CLASS_NAMES, IGNORE, MODALITIES

# Keeps 1 / sum(w) finite in float32, and still so under fp16 loss scaling; smaller sums of weights mean no data.
_WEIGHT_EPS = 1e-30

# Entries of a branch's sums, before the 3 x C of Dice.
_NUM_SCALARS = 6


@dataclass(frozen=True)
class LossOutput:
    """The loss of what one call sees: a micro batch, or all of a step (`train/step/accumulation.py`).

    `parts` are detached float32 scalars: `segmentation_s1`, `ce_s1`, `dice_s1`, `focal_s1` (those configured), `consistency_s1`
    (into S1, unless 'none'), `kept_s1` (mean selection weight of the labelled pixels, in [0, 1]), and the same for s2. With
    `consistency_reliability` also `reliability_s1/<class>`, how far S1 may pull S2 to that class, in [0, 1].
    """

    total: Tensor  # float32 scalar; its gradient is scaled by the world size, see CromssLoss
    parts: dict[str, Tensor]
    selection_s1: Tensor  # float32 (B, H, W) in [0, 1], weights of the segmentation loss
    selection_s2: Tensor
    counts: Counts  # of this rank's pixels, not summed over ranks


@dataclass(frozen=True)
class _Branch:
    """A branch's logits, log Q and Q: float32 (B, C, H, W), with gradient."""

    logits: Tensor
    log_probs: Tensor
    probs: Tensor


@dataclass(frozen=True)
class _Weights:
    """Pixel weights, detached: float32 (2, B, H, W), and bool (B, H, W): labelled pixels, and those of samples that count.

    `pull` is `consistency` times reliability. It is the sum of `consistency` that the tie is divided by: a branch that is
    unreliable all over pulls less, which its own sum would cancel.
    """

    segmentation: Tensor
    consistency: Tensor
    pull: Tensor
    labelled: Tensor
    valid: Tensor


class CromssLoss:
    """L = L_s(S1) + L_s(S2) + lambda (L_c into S1 + L_c into S2), on selected pixels.

    Computed in float32, whatever the logits' type, under autocast too (it has no product of matrices); finite for logits up
    to 1e30 in size. With `reduce_sum`, selection, Dice and every quotient see all ranks' pixels: `total` is the loss of the
    global batch, the same on every rank. Its gradient is this rank's exact part times `world_size`, because gradient engines
    average over ranks.

    Args:
        config: The loss section of the run. Its scope: 'global' and 'micro' see the pixels of a call on all ranks, and differ
            in what one call is given, all micro batches of a step or one; 'local' sets `reduce_sum` and `world_size` aside.
        class_names: Of the C classes.
        reduce_sum: Sum of a detached tensor (int64 or float64) over ranks; None in one process. Called the same number of
            times on every rank.
        world_size: Number of ranks that `reduce_sum` sums over.

    Reference: CromSS, section III.
    Departs: the published loss sees one device's batch, so it changes with their number; scope 'local' is that.
    """

    def __init__(
        self,
        config: LossConfig,
        class_names: Sequence[str] = CLASS_NAMES,
        reduce_sum: ReduceSum | None = None,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        alone = reduce_sum is None or config.scope == "local"
        self.reduce_sum: ReduceSum = (lambda x: x) if reduce_sum is None or alone else reduce_sum
        self.world_size = 1 if alone else world_size

    def __call__(
        self,
        logits_s1: Tensor,
        logits_s2: Tensor,
        label: Tensor,
        prior: Tensor | None,
        progress: float,
        sample_weights: Tensor | None = None,
    ) -> LossOutput:
        """The training loss.

        Args:
            logits_s1: float (B, C, H, W), any float type.
            logits_s2: float (B, C, H, W).
            label: int64 (B, H, W), noisy label, 255 = ignored: no part in segmentation and selection.
            prior: float32 (B, C, H, W), sums to 1 over C; None for hard labels.
            progress: Epochs trained, a real number (samples seen / samples of an epoch).
            sample_weights: float32 (B,), 1, or 0 for a sample without any part in the loss; None for all 1.

        Returns:
            The loss; `total` carries the gradient.
        """
        branches = self._branches(logits_s1, logits_s2)
        weights = self._uniform_weights(label, sample_weights)
        if self.config.select:
            weights = self._select(branches, label, weights, progress)
        with torch.no_grad():
            predicted = (confidence.predicted_class(branches[0].probs), confidence.predicted_class(branches[1].probs))
        classes = label.where(weights.labelled, self.num_classes)
        figures: dict[str, Tensor] = {}
        if self.config.consistency_reliability == "agreement":
            found = reliability(predicted, classes, self.num_classes, self.reduce_sum)
            weights, figures = replace(weights, pull=weights.consistency * found.weights), found.figures(self.class_names)
        local = self._sums(branches, label, prior, weights)
        # The value is the global sum, the gradient the local one: no collective in the backward pass.
        sums = local + (self.reduce_sum(local.detach()) - local.detach())
        total, parts = self._from_sums(sums)
        total = total + (self.world_size - 1) * (total - total.detach())
        return LossOutput(
            total=total.float(),
            parts={name: part.detach().float() for name, part in parts.items()} | figures,
            selection_s1=weights.segmentation[0],
            selection_s2=weights.segmentation[1],
            counts=count(predicted, classes, self.num_classes, weights.segmentation, weights.valid),
        )

    @torch.no_grad()
    def validation_sums(
        self, logits_s1: Tensor, logits_s2: Tensor, label: Tensor, sample_weights: Tensor | None = None
    ) -> Tensor:
        """A batch's part of the validation loss (hard labels, all weights 1), to be added up over batches and ranks.

        Args:
            logits_s1: float (B, C, H, W).
            logits_s2: float (B, C, H, W).
            label: int64 (B, H, W), 255 = ignored.
            sample_weights: float32 (B,), 1, or 0 for a sample that only fills the batch; None for all 1.

        Returns:
            float64 (2 * (6 + 3 C),), without gradient.
        """
        branches = self._branches(logits_s1, logits_s2)
        return self._sums(branches, label, None, self._uniform_weights(label, sample_weights)).flatten()

    def validation_loss(self, sums: Tensor) -> dict[str, Tensor]:
        """The validation loss from the sums over the whole set, however it was cut into batches and ranks.

        Args:
            sums: float64 (2 * (6 + 3 C),), sum of `validation_sums`.

        Returns:
            float64 scalars: `total` and the names of LossOutput.parts, without `kept`.
        """
        total, parts = self._from_sums(sums.view(2, -1))
        return {"total": total} | {name: part for name, part in parts.items() if not name.startswith("kept")}

    def _branches(self, *logits: Tensor) -> tuple[_Branch, _Branch]:
        # Cast here, once: the gradients of all terms add up in float32 before they are rounded to the logits' type.
        float_logits = [x.float() for x in logits]
        log_probs = [F.log_softmax(x, 1) for x in float_logits]
        first, second = (_Branch(x, log_p, log_p.exp()) for x, log_p in zip(float_logits, log_probs, strict=True))
        return first, second

    def _uniform_weights(self, label: Tensor, sample_weights: Tensor | None) -> _Weights:
        ones = torch.ones(label.shape, device=label.device)
        if sample_weights is not None:
            ones = ones * sample_weights.float()[:, None, None]
        valid = ones > 0
        labelled = (label != IGNORE) & valid
        consistency = ones.expand(2, *label.shape)
        return _Weights((ones * labelled).expand(2, *label.shape), consistency, consistency, labelled, valid)

    @torch.no_grad()
    def _select(self, branches: tuple[_Branch, _Branch], label: Tensor, uniform: _Weights, progress: float) -> _Weights:
        config = self.config
        progress_ramp = ramp(progress, config.ramp, config.ramp_epochs)
        ratio = keep_ratio(progress, progress_ramp, config.keep_share, config.ramp_epochs)
        known = label.where(uniform.labelled, 0)
        of_label = torch.stack([confidence.label_confidence(b.probs, known) for b in branches])
        of_prediction = torch.stack([confidence.prediction_confidence(b.probs, b.log_probs, config.confidence) for b in branches])
        classes = label.where(uniform.labelled, self.num_classes)
        selected = selection_weights(confidence.refine(of_label), classes, self.num_classes, ratio, self.reduce_sum)
        consistency = uniform.consistency * consistency_weights(confidence.refine(of_prediction), progress_ramp)
        return _Weights(uniform.segmentation * selected, consistency, consistency, uniform.labelled, uniform.valid)

    def _sums(self, branches: tuple[_Branch, _Branch], label: Tensor, prior: Tensor | None, weights: _Weights) -> Tensor:
        """All sums over this rank's pixels, float64 (2, 6 + 3 C): what `_from_sums` takes apart."""
        config, terms = self.config, self.config.segmentation
        target = segmentation.soft_label(
            label.where(weights.labelled, 0), prior, self.num_classes, config.prior_weight, config.uniform_weight
        )
        zero = torch.zeros((), dtype=torch.float64, device=label.device)
        labelled = segmentation.pixel_sum(weights.labelled.float())
        rows = []
        for i, branch in enumerate(branches):
            other, weight, other_weight = branches[1 - i], weights.segmentation[i], weights.consistency[1 - i]
            weighted_target = target * weight[:, None]
            ce = segmentation.cross_entropy_sum(branch.log_probs, weighted_target) if "ce" in terms else zero
            dice = (
                segmentation.dice_sums(branch.probs, weighted_target, weight)
                if "dice" in terms
                else zero.expand(3, self.num_classes)
            )
            focal = segmentation.focal_sum(branch.logits, target, weight) if "focal" in terms else zero
            tie = zero
            if config.consistency != "none":
                tie = consistency_sum(
                    config.consistency,
                    branch.probs,
                    branch.log_probs,
                    other.probs.detach(),
                    other.log_probs.detach(),
                    weights.pull[1 - i],
                )
            scalars = (segmentation.pixel_sum(weight), labelled, ce, focal, segmentation.pixel_sum(other_weight), tie)
            rows.append(torch.cat((torch.stack(scalars), dice.flatten())))
        return torch.stack(rows)

    def _from_sums(self, sums: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weight, labelled, ce, focal, other_weight, tie = sums[:, :_NUM_SCALARS].unbind(1)
        per_term: dict[str, Tensor] = {
            "ce": ce / weight.clamp_min(_WEIGHT_EPS),
            "dice": segmentation.dice_loss(sums[:, _NUM_SCALARS:].view(2, 3, self.num_classes)),
            "focal": focal / weight.clamp_min(_WEIGHT_EPS),
        }
        terms: dict[str, Tensor] = {name: per_term[name] for name in self.config.segmentation}
        terms["segmentation"] = torch.stack(list(terms.values())).sum(0)
        total = terms["segmentation"].sum()
        if self.config.consistency != "none":
            terms["consistency"] = tie / other_weight.clamp_min(_WEIGHT_EPS)
            total = total + self.config.consistency_weight * terms["consistency"].sum()
        terms["kept"] = weight / labelled.clamp_min(1)
        return total, {f"{name}_{modality}": term[i] for name, term in terms.items() for i, modality in enumerate(MODALITIES)}

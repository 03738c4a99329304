"""CromSS as the training loop calls it, and what its counts say.

Layer 4.
"""

from collections.abc import Sequence

from torch import Tensor

from cromss_dist.losses import Counts, CromssLoss
from cromss_dist.schema import CLASS_NAMES, MODALITIES, Example
from cromss_dist.train.step.accumulation import Scope, StepLoss


class BranchLoss:
    """CromSS as the training loop calls it.

    Args:
        cromss: The loss of the run.
    """

    def __init__(self, cromss: CromssLoss) -> None:
        self._cromss = cromss

    @property
    def scope(self) -> Scope:
        """What one call sees."""
        return self._cromss.config.scope

    def __call__(self, logits: Sequence[Tensor], example: Example, progress: float) -> StepLoss:
        """See `Loss`; `logits` are those of S1 and S2."""
        logits_s1, logits_s2 = logits
        out = self._cromss(logits_s1, logits_s2, example.label, example.prior, progress, example.weights)
        parts = {name: part for name, part in out.parts.items() if not name.startswith("kept")}  # as counted
        return StepLoss(out.total, parts, out.counts.sums)

    def figures(self, counts: Tensor) -> dict[str, float]:
        """Agreement of the branches, and what is kept of the pixels of each class and modality."""
        sums = Counts(counts)
        values = {}
        if sums.valid:
            values["train/agreement"] = float(sums.agreed / sums.valid)
        labelled = sums.labelled.tolist()
        for modality, weights, kept in zip(MODALITIES, sums.weight.tolist(), sums.kept.tolist(), strict=True):
            if any(labelled):
                values[f"train/kept_{modality}"] = sum(weights) / sum(labelled)
            for name, weight, number_kept, number in zip(CLASS_NAMES, weights, kept, labelled, strict=True):
                if number:
                    values[f"train/kept_{modality}/{name}"] = weight / number
                    values[f"train/selected_share_{modality}/{name}"] = number_kept / number
        return values

    def validation_sums(self, logits: Sequence[Tensor], example: Example) -> Tensor:
        """See `TaskLoss`: hard labels, all weights 1."""
        return self._cromss.validation_sums(logits[0], logits[1], example.label, example.weights)

    def validation_loss(self, sums: Tensor) -> dict[str, Tensor]:
        """See `TaskLoss`."""
        return self._cromss.validation_loss(sums)

    def selection(self, logits: Sequence[Tensor], example: Example, progress: float) -> tuple[Tensor, Tensor]:
        """Weights of each branch's segmentation loss, float32 (B, h, w); a collective call where the loss sees other ranks."""
        out = self._cromss(logits[0], logits[1], example.label, None, progress, example.weights)
        return out.selection_s1, out.selection_s2

"""Scores on the held-out locations, once over all ranks, with a panel of predictions to look at.

Layer 4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cromss_dist.config import BatchPlan, RunConfig
from cromss_dist.data.loading.augment import eval_geometry, prepare
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.pretrain.loss import BranchLoss
from cromss_dist.schema import MODALITIES, REFERENCE_ARRAY, Batch, Example, Modality
from cromss_dist.tracking.panels import PanelSample, draw_panels
from cromss_dist.train.figures.metrics import ConfusionMatrix
from cromss_dist.train.figures.scores import Scores
from cromss_dist.train.step.engine import Engine
from cromss_dist.train.task import GoesOn
from cromss_dist.world import World


@dataclass(frozen=True)
class Validation:
    """Scores on the held-out locations, the same on every rank.

    `noisy` is against the noisy labels, `reference` against reference labels where the archive has them; both by modality.
    """

    losses: dict[str, float]
    noisy: dict[str, Scores]
    reference: dict[str, Scores] | None
    panel: tuple[PanelSample, ...]  # of this rank's first batches
    bands: dict[Modality, tuple[str, ...]]  # of the panel's images
    title: str

    @property
    def loss(self) -> float:
        """The whole loss, hard labels."""
        return self.losses["total"]

    def metrics(self) -> dict[str, float]:
        """Under the names that MLflow shows. A class that neither label nor prediction has gets no figure."""
        values = {f"val/loss/{name}": value for name, value in self.losses.items()}
        for truth, scores_of in (("", self.noisy), ("reference_", self.reference or {})):
            for modality, scores in scores_of.items():
                values[f"val/{truth}miou_{modality}"] = scores.mean_iou
                values[f"val/{truth}accuracy_{modality}"] = scores.overall_accuracy
                for name, iou in scores.iou.items():
                    values[f"val/{truth}iou_{modality}/{name}"] = iou
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def draw(self) -> Figure:
        """The prediction panel."""
        return draw_panels(list(self.panel), self.bands["s1"], self.bands["s2"], self.title)


class Validator:
    """Validates one network; every rank scores its share.

    Args:
        config: Of the run.
        data: What it holds out.
        plan: Batch arithmetic.
        world: This process among the others.
        engine: The networks.
        loss: CromSS.
    """

    def __init__(self, config: RunConfig, data: RunData, plan: BatchPlan, world: World, engine: Engine, loss: BranchLoss) -> None:
        self._config, self._data, self._plan = config, data, plan
        self._world, self._engine, self._loss = world, engine, loss
        self._patch_px = data.dataset.patch_px
        side = 2**self._config.model.encoder_depth
        self._crop_px = self._patch_px // side * side

    @torch.no_grad()
    def run(self, progress_epochs: float, goes_on: GoesOn) -> Validation | None:
        """Scores every held-out (location, season) once; a collective call.

        Args:
            progress_epochs: Epochs trained, for the panel.
            goes_on: See there.

        Returns:
            The scores; None where it was given up.
        """
        data, device = self._config.data, self._world.device
        has_reference = REFERENCE_ARRAY in self._data.dataset.arrays
        matrices = {m: ConfusionMatrix(device) for m in MODALITIES}
        reference_matrices = {m: ConfusionMatrix(device) for m in MODALITIES}
        sums: Tensor | None = None
        panel: list[PanelSample] = []
        # Counted, not measured by what was found: the panel's loss is a collective call.
        wanted, micro_batch = self._config.train.panel_samples, self._plan.micro_batch
        num_panel_batches = math.ceil(wanted * len(data.val_seasons) / micro_batch)
        self._engine.average_running_statistics()
        self._engine.train(False)
        try:
            batches = self._data.eval_loader(self._plan, self._world.rank, device.type == "cuda")
            with batches as loader:
                for number, batch in enumerate(loader):
                    if not goes_on(f"batch {number} of validation"):
                        return None
                    geometry = eval_geometry(len(batch.keys), self._patch_px, self._crop_px)
                    example = prepare(batch, geometry, data.s1_bands, data.s2_bands, "none", device)
                    branches = self._engine.forward(*example.images.values())
                    part = self._loss.validation_sums(branches, example)
                    sums = part if sums is None else sums + part
                    predictions = {
                        modality: of_modality.argmax(1) for modality, of_modality in zip(MODALITIES, branches, strict=True)
                    }
                    for modality, prediction in predictions.items():
                        matrices[modality].add(example.label, prediction, example.weights)
                        if example.reference is not None:
                            reference_matrices[modality].add(example.reference, prediction, example.weights)
                    if number < num_panel_batches:
                        panel += self._panel(batch, example, branches, predictions, progress_epochs)
        finally:
            self._engine.train(True)
        assert sums is not None, "a loader without a batch refuses to be made"
        losses = {name: float(value) for name, value in self._loss.validation_loss(self._world.reduce_sum(sums)).items()}
        return Validation(
            losses,
            {m: matrix.scores(self._world.reduce_sum) for m, matrix in matrices.items()},
            {m: matrix.scores(self._world.reduce_sum) for m, matrix in reference_matrices.items()} if has_reference else None,
            tuple(panel[:wanted]),
            data.bands,
            f"{self._config.name}, after {progress_epochs:.4g} epochs",
        )

    def _panel(
        self,
        batch: Batch,
        example: Example,
        branches: Sequence[Tensor],
        predictions: Mapping[Modality, Tensor],
        progress_epochs: float,
    ) -> list[PanelSample]:
        """Rows of the prediction panel, one season a location if there are enough; a collective call where the loss is global."""
        seasons, held_out = self._config.data.val_seasons, self._data.validation.ids
        one_season_each = len(held_out) >= self._config.train.panel_samples
        places = np.searchsorted(held_out, batch.sample_ids.numpy())
        weights_s1, weights_s2 = self._loss.selection(branches, example, progress_epochs)

        def array(values: Tensor, sample: int) -> np.ndarray:
            return values[sample].float().cpu().numpy()

        return [
            PanelSample(
                key=key,
                season=int(batch.seasons[i]),
                s1=array(example.images["s1"], i),
                s2=array(example.images["s2"], i),
                label=array(example.label, i).astype(np.uint8),
                prediction_s1=array(predictions["s1"], i).astype(np.uint8),
                prediction_s2=array(predictions["s2"], i).astype(np.uint8),
                weights_s1=array(weights_s1, i),
                weights_s2=array(weights_s2, i),
                reference=None if example.reference is None else array(example.reference, i).astype(np.uint8),
            )
            for i, key in enumerate(batch.keys)
            if batch.weights[i] > 0 and (not one_season_each or batch.seasons[i] == seasons[places[i] % len(seasons)])
        ]

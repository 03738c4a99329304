"""The pretraining loop: batches, steps, validation; every length is in samples.

Layer 3. Runs alike on every rank; only rank 0 holds a Record.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cromss_dist.config import BatchPlan, RunConfig
from cromss_dist.data.loading.augment import eval_geometry, prepare, train_geometry
from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.loader import EvalLoader, TrainLoader
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.errors import TrainingError
from cromss_dist.losses import CromssLoss
from cromss_dist.schema import MODALITIES, REFERENCE_ARRAY, Batch, Example, Modality
from cromss_dist.tracking.panels import PanelSample, draw_panels
from cromss_dist.train.engine import Engine
from cromss_dist.train.meter import Meter
from cromss_dist.train.metrics import ConfusionMatrix, Scores
from cromss_dist.train.record import Record
from cromss_dist.train.schedule import Plateau, Timeline, lr_factor
from cromss_dist.world import World


@dataclass(frozen=True)
class Validation:
    """Scores on the held-out locations, the same on every rank.

    `noisy` is against the noisy labels, `reference` against reference labels where the archive has them; both by modality.
    """

    losses: dict[str, float]
    noisy: dict[str, Scores]
    reference: dict[str, Scores] | None

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


class Pretraining:
    """One run on this rank.

    Args:
        config: The whole run.
        plan: Batch arithmetic.
        timeline: Steps and intervals.
        world: This process among the others.
        data: What is trained on and what is held out.
        engine: Model and optimiser.
        loss: CromSS.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: BatchPlan,
        timeline: Timeline,
        world: World,
        data: RunData,
        engine: Engine,
        loss: CromssLoss,
    ) -> None:
        self.config, self.plan, self.timeline, self.world = config, plan, timeline, world
        self.data, self.engine, self.loss = data, engine, loss
        self.patch_px = data.dataset.patch_px
        self.plateau = Plateau(config.train)
        side = 2**config.model.encoder_depth
        self.samples_per_s = 0.0  # of the last interval that was logged; the run's throughput once warmed up
        self.val_crop_px = self.patch_px // side * side

    def run(self, record: Record | None) -> tuple[Validation, Validation]:
        """Trains to the end.

        Args:
            record: On rank 0, where figures and pictures go.

        Returns:
            The validation before the first and after the last step.

        Raises:
            TrainingError: the loss is not finite.
        """
        train, timeline = self.config.train, self.timeline
        first = last = self.validate(0, record)
        meter = Meter(self.world.device, timeline.global_batch)
        with self._train_loader() as batches:
            for step in range(1, timeline.total_steps + 1):
                samples = (step - 1) * timeline.global_batch
                self.engine.lr = train.lr * lr_factor(train, timeline, samples) * self.plateau.factor
                for _ in range(self.plan.accumulation_steps):
                    with meter.phase("data"):
                        batch = next(batches)
                    self._micro_step(batch, timeline.epochs(samples), meter)
                with meter.phase("optimizer"):
                    result = self.engine.step()
                meter.step_done(result.grad_norm, result.applied)
                samples += timeline.global_batch
                if step % train.log_every_steps == 0 or step == timeline.total_steps:
                    self._log(meter, step, samples, len(batches.replaced), record)
                if timeline.validates_after(step):
                    with meter.phase("validation"):
                        last = self.validate(step, record)
                    self.plateau.update(last.losses["total"])
        return first, last

    def _train_loader(self) -> TrainLoader:
        reading = self.config.data.reading
        return TrainLoader(
            plan=self.data.train_plan(self.plan, self.world.rank),
            threads=reading.threads,
            workers=reading.workers,
            prefetch=reading.prefetch_batches,
            lookahead=reading.lookahead_batches,
            timeout_s=reading.timeout_s,
            on_corrupt=reading.on_corrupt,
            pin_memory=self.world.device.type == "cuda",
        )

    def _eval_loader(self) -> EvalLoader:
        reading = self.config.data.reading
        return EvalLoader(
            plan=self.data.eval_plan(self.plan, self.world.rank),
            threads=reading.threads,
            prefetch=reading.prefetch_batches,
            lookahead=reading.lookahead_batches,
            timeout_s=reading.timeout_s,
            pin_memory=self.world.device.type == "cuda",
        )

    def _micro_step(self, batch: Batch, progress_epochs: float, meter: Meter) -> None:
        example = self._example(batch)
        with meter.phase("forward"):
            logits = self.engine.forward(example.s1, example.s2)
        with meter.phase("loss"):
            out = self.loss(*logits, example.label, example.prior, progress_epochs, example.weights)
        with meter.phase("backward"):
            self.engine.backward(out.total)
        meter.add(out)

    def _example(self, batch: Batch) -> Example:
        data, loss = self.config.data, self.config.loss
        drawn = Draws(self.config.seed, batch.epochs.numpy(), batch.sample_ids.numpy())
        geometry = train_geometry(drawn, self.patch_px, data.crop_px, data.flip_p, data.rotate_p, data.rotate_max_deg)
        return prepare(batch, geometry, data.s1_bands, data.s2_bands, loss.prior, self.world.device)

    def _log(self, meter: Meter, step: int, samples: int, num_replaced: int, record: Record | None) -> None:
        replaces = self.config.data.reading.on_corrupt == "replace"
        values = meter.read(
            self.world, self.engine.lr, self.timeline.epochs(samples), num_replaced=num_replaced if replaces else None
        )
        _require_finite("training", values["train/loss/total"], step)
        self.samples_per_s = values["perf/samples_per_s"]
        if record:
            record.metrics(values, step, samples)

    @torch.no_grad()
    def validate(self, step: int, record: Record | None) -> Validation:
        """Scores every held-out (location, season) once; a collective call.

        Args:
            step: Optimiser step, for the record.
            record: On rank 0, where figures and pictures go.
        """
        data, device = self.config.data, self.world.device
        samples = step * self.timeline.global_batch
        has_reference = REFERENCE_ARRAY in self.data.dataset.arrays
        matrices = {m: ConfusionMatrix(device) for m in MODALITIES}
        reference_matrices = {m: ConfusionMatrix(device) for m in MODALITIES}
        sums: Tensor | None = None
        panels: list[PanelSample] = []
        # Counted, not measured by what was found: the loss below is a collective call.
        num_panel_batches = math.ceil(self.config.train.panel_samples * len(data.val_seasons) / self.plan.micro_batch)
        self.engine.average_running_statistics()
        self.engine.train(False)
        with self._eval_loader() as loader:
            for number, batch in enumerate(loader):
                geometry = eval_geometry(len(batch.keys), self.patch_px, self.val_crop_px)
                example = prepare(batch, geometry, data.s1_bands, data.s2_bands, "none", device)
                logits = dict(zip(MODALITIES, self.engine.forward(example.s1, example.s2), strict=True))
                part = self.loss.validation_sums(logits["s1"], logits["s2"], example.label, example.weights)
                sums = part if sums is None else sums + part
                predictions = {modality: of_modality.argmax(1) for modality, of_modality in logits.items()}
                for modality, prediction in predictions.items():
                    matrices[modality].add(example.label, prediction, example.weights)
                    if example.reference is not None:
                        reference_matrices[modality].add(example.reference, prediction, example.weights)
                if number < num_panel_batches:
                    panels += self._panels(batch, example, logits, predictions, self.timeline.epochs(samples))
        self.engine.train(True)
        assert sums is not None, "a loader without a batch refuses to be made"
        losses = {name: float(value) for name, value in self.loss.validation_loss(self.world.reduce_sum(sums)).items()}
        _require_finite("validation", losses["total"], step)
        validation = Validation(
            losses,
            {m: matrix.scores(self.world.reduce_sum) for m, matrix in matrices.items()},
            {m: matrix.scores(self.world.reduce_sum) for m, matrix in reference_matrices.items()} if has_reference else None,
        )
        if record:
            record.validation(validation.metrics(), step, samples)
            title = f"{self.config.name}, after {self.timeline.epochs(samples):.4g} epochs"
            picture = draw_panels(panels[: self.config.train.panel_samples], data.s1_bands, data.s2_bands, title)
            record.picture(f"panels/step_{step:07d}.png", picture)
        return validation

    def _panels(
        self,
        batch: Batch,
        example: Example,
        logits: Mapping[Modality, Tensor],
        predictions: Mapping[Modality, Tensor],
        progress_epochs: float,
    ) -> list[PanelSample]:
        """Rows of the prediction panel, one season a location if there are enough; a collective call where the loss is global."""
        seasons = self.config.data.val_seasons
        one_season_each = len(self.data.validation.ids) >= self.config.train.panel_samples
        places = np.searchsorted(self.data.validation.ids, batch.sample_ids.numpy())
        out = self.loss(logits["s1"], logits["s2"], example.label, None, progress_epochs, example.weights)

        def array(values: Tensor, sample: int) -> np.ndarray:
            return values[sample].float().cpu().numpy()

        return [
            PanelSample(
                key=key,
                season=int(batch.seasons[i]),
                s1=array(example.s1, i),
                s2=array(example.s2, i),
                label=array(example.label, i).astype(np.uint8),
                prediction_s1=array(predictions["s1"], i).astype(np.uint8),
                prediction_s2=array(predictions["s2"], i).astype(np.uint8),
                weights_s1=array(out.selection_s1, i),
                weights_s2=array(out.selection_s2, i),
                reference=None if example.reference is None else array(example.reference, i).astype(np.uint8),
            )
            for i, key in enumerate(batch.keys)
            if batch.weights[i] > 0 and (not one_season_each or batch.seasons[i] == seasons[places[i] % len(seasons)])
        ]


def _require_finite(name: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"The {name} loss is {loss} at step {step}; a smaller train.lr, engine.grad_clip or engine.precision=fp32 may help."
        )

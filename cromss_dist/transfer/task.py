"""A transfer run as the training loop sees it: what is known of it before it starts, and what follows its last step.

Layer 4.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cromss_dist.config import BatchPlan, ReadingConfig, plan_batches
from cromss_dist.config.transfer import TransferConfig
from cromss_dist.data.loading.augment import train_example
from cromss_dist.data.loading.plan import Source, TrainPlan
from cromss_dist.data.loading.selection import Selection
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.open import open_dataset
from cromss_dist.data.store.remote.cache import ShardCache
from cromss_dist.errors import BatchError, ConfigError
from cromss_dist.losses.supervised import SupervisedLoss
from cromss_dist.models.downstream import DownstreamNetwork, input_multiple
from cromss_dist.parse import to_yaml
from cromss_dist.schema import Batch, Example, Modality
from cromss_dist.train.run.folder import RunSummary
from cromss_dist.train.step.accumulation import Scope, StepLoss
from cromss_dist.train.step.engine import Engine, resolve_precision
from cromss_dist.train.step.schedule import Timeline
from cromss_dist.train.task import Trained
from cromss_dist.transfer.deliver import deliver
from cromss_dist.transfer.evaluate import ScoredTiles, evaluate, select_tiles
from cromss_dist.transfer.labels import choose_labels
from cromss_dist.transfer.network import TransferredEncoder, build_network, check_contract, load_encoders
from cromss_dist.transfer.pixels import MAX_TILES, PIXELS_PER_CLASS
from cromss_dist.transfer.results import LabelsUsed, Tiles, TransferResult
from cromss_dist.transfer.trained import NetworkOfRun, write_network
from cromss_dist.world import World, choose_device


class LabelLoss:
    """The loss of one network on hard labels, as the training loop calls it.

    Args:
        supervised: The loss of the run.
    """

    scope: Scope = "global"

    def __init__(self, supervised: SupervisedLoss) -> None:
        self._supervised = supervised

    def __call__(self, logits: Sequence[Tensor], example: Example, progress: float) -> StepLoss:
        """See `Loss`; there is one network's."""
        out = self._supervised(logits[0], example.label, example.weights)
        return StepLoss(out.total, out.parts, out.counts)

    def validation_sums(self, logits: Sequence[Tensor], example: Example) -> Tensor:
        """See `TaskLoss`."""
        return self._supervised.validation_sums(logits[0], example.label, example.weights)

    def validation_loss(self, sums: Tensor) -> dict[str, Tensor]:
        """See `TaskLoss`."""
        return self._supervised.validation_loss(sums)

    def figures(self, counts: Tensor) -> dict[str, float]:
        """Share of the labelled training pixels that were predicted right."""
        labelled, right = counts.tolist()
        return {"train/accuracy": right / labelled} if labelled else {}


@dataclass(frozen=True, eq=False)
class Transfer:
    """A transfer run; in mode 'frozen' or 'finetuned' a `Task`.

    Args:
        config: The whole run.
        plan: Batch arithmetic.
        timeline: Lengths in steps.
        encoders: By modality, S1 first.
        train: The training set.
        chosen: Of its tiles, those with labels.
        labels: The same, as results tell of it.
        test: What is scored.
        opened: When, by `time.monotonic`.
    """

    config: TransferConfig
    plan: BatchPlan
    timeline: Timeline
    encoders: Mapping[Modality, TransferredEncoder]
    train: Dataset
    chosen: Selection
    labels: LabelsUsed
    test: ScoredTiles
    opened: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, config: TransferConfig, world_size: int, trains_here: bool = True) -> "Transfer":
        """Loads the encoders, opens both datasets, chooses the labels and does the arithmetic; starts nothing.

        Args:
            config: The whole run, its references pinned (`network.pin_encoders`).
            world_size: Its ranks.
            trains_here: Whether they have devices of this machine, which are looked at then.

        Raises:
            ConfigError: the datasets are not of one task, the crop does not fit them or the network, the batch norms would have
                nothing to normalise by, the labels leave nothing; the device, its precision or a decoder does not exist.
            BandError: the datasets lack bands of the encoders, or are not scaled as these were trained.
            BatchError: the batch does not divide over the ranks.
            ShardError, DownloadError: a dataset is missing or damaged, or cannot be fetched.
            PackageError, RegistryError: an encoder is not whole, or not in the registry.
        """
        plan = plan_batches(config.engine, world_size)
        if trains_here:
            resolve_precision(config.engine, choose_device(config.engine.device))
        encoders = load_encoders(config)
        data, reading = config.data, config.data.reading
        cache = ShardCache(Path(reading.cache), reading.cache_gib) if reading.cache else ShardCache(limit_gib=reading.cache_gib)
        train, test = (open_dataset(location, cache, reading.kind) for location in (data.train, data.test))
        for dataset, where in ((train, f"data.train={data.train}"), (test, f"data.test={data.test}")):
            check_contract(dataset, where, encoders)
        if train.class_names != test.class_names:
            raise ConfigError(
                f"data.train={data.train} has the classes {', '.join(train.class_names)}, data.test={data.test} has "
                f"{', '.join(test.class_names)}; give two datasets of one task."
            )
        multiple = max(input_multiple(config.decoder, encoder.spec.depth) for encoder in encoders.values())
        if not config.quick_look:
            _check_sizes(config, plan, train.patch_px, multiple)
        if config.evidence:
            _check_evidence(encoders)
        chosen, labels = choose_labels(train, data.seasons, config.labels)
        bands = {modality: encoder.bands for modality, encoder in encoders.items()}
        scored = ScoredTiles(test, select_tiles(test, data.seasons, config.protocol, config.task), bands, multiple)
        order = _train_plan(config, train, chosen, bands, plan).order
        return cls(config, plan, Timeline.of(config, order.epoch_samples), encoders, train, chosen, labels, scored)

    @property
    def datasets(self) -> dict[str, str]:
        """Location and digest of the training set."""
        return {self.config.data.train: self.train.digest}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the C classes."""
        return self.train.class_names

    def describe(self) -> str:
        """What `--dry-run` prints: config, encoders, data, and what is trained: batch arithmetic, steps, parameter counts."""
        data = self.config.data
        told = [to_yaml(self.config).rstrip(), "---", f"config digest       {self.config.digest}"]
        for modality, encoder in self.encoders.items():
            used = encoder.used
            told.append(
                f"encoder {modality}          {used.version or used.ref}: {used.encoder}, {used.init}, {len(used.bands)} bands, "
                f"{self.config.mode}"
            )
        told += [
            f"train               {data.train}: {self.labels.tiles} of {len(self.train.locations)} tiles of "
            f"{self.train.patch_px} px, digest {self.train.digest[:12]}",
            f"test                {data.test}: {len(self.test.keys)} of {len(self.test.dataset.locations)} tiles of "
            f"{self.test.dataset.patch_px} px, digest {self.test.dataset.digest[:12]}",
            f"classes             {', '.join(self.class_names)}",
        ]
        return "\n".join([*told, *self._describe_training()])

    def _describe_training(self) -> list[str]:
        if self.config.quick_look:
            return [f"learns from         {PIXELS_PER_CLASS:,} pixels of each class at most, of {MAX_TILES} tiles at most"]
        plan, time_ = self.plan, self.timeline
        counts = ", ".join(f"{name} {number:,}" for name, number in self.build_model().parameter_counts().items())
        return [
            f"batch               {plan.global_batch} = micro batch {plan.micro_batch} x accumulation "
            f"{plan.accumulation_steps} x world {plan.world_size}",
            f"steps per epoch     {time_.steps_per_epoch:.2f}",
            f"steps               {time_.total_steps} ({time_.total_samples} samples, {self.config.train.epochs:g} epochs)",
            f"parameters          {counts} ({self.config.decoder})",
        ]

    def build_model(self) -> DownstreamNetwork:
        """The network, what is random in it drawn from the run's seed."""
        return build_network(self.config, self.encoders, len(self.class_names))

    @property
    def reading(self) -> ReadingConfig:
        """How tiles get from files into batches."""
        return self.config.data.reading

    def train_plan(self, plan: BatchPlan, rank: int = 0) -> TrainPlan:
        """What a rank trains on, and when."""
        return _train_plan(self.config, self.train, self.chosen, self.test.bands, plan, rank)

    def example(self, batch: Batch, device: torch.device) -> Example:
        """What network and loss see of a training batch."""
        bands = self.test.bands
        return train_example(batch, self.config.data, bands.get("s1", ()), bands.get("s2", ()), "none", self.config.seed, device)

    def loss(self, world: World) -> LabelLoss:
        """The loss over the ranks."""
        reduce_sum = world.reduce_sum if world.size > 1 else None
        return LabelLoss(SupervisedLoss(self.config.segmentation, len(self.class_names), reduce_sum, world.size))

    def validator(self, world: World, engine: Engine) -> None:
        """None: nothing is held out, as published; the test set is scored once, at the end, and nothing is chosen by it."""
        return

    def finish(self, trained: Trained) -> RunSummary | None:
        """Scores the test tiles, and leaves the network and what `deliver` does: scores, evidence and a panel."""
        trained.engine.average_running_statistics()
        num_panels = self.config.train.panel_samples
        tiles, panels = evaluate(trained.engine, self.test, self.plan, trained.world, self.reading, num_panels, trained.beat)
        trained.beat("writing network and scores")
        weights = trained.engine.state_dict()
        if trained.record is None:
            return None
        write_network(trained.run_dir, weights, NetworkOfRun.of(self.config, self.encoders, self.class_names))
        result = self.result(tiles, trained.run_dir, self.timeline.total_steps, trained.samples)
        return deliver(self.config, result, tiles, panels, trained.samples_per_s, trained.record)

    def result(self, tiles: Tiles, run_dir: Path, steps: int, samples: int) -> TransferResult:
        """What the run was and how it scored.

        Args:
            tiles: The test set.
            run_dir: Folder of the run.
            steps: That were taken.
            samples: That were seen in them.
        """
        config = self.config
        return TransferResult(
            task=config.task,
            mode=config.mode,
            protocol=config.protocol,
            seed=config.seed,
            encoders={modality: encoder.used for modality, encoder in self.encoders.items()},
            labels=self.labels,
            train_digest=self.train.digest,
            test_digest=self.test.dataset.digest,
            class_names=self.class_names,
            confusion=tiles.total,
            tiles=len(tiles.keys),
            decoder="" if config.quick_look else config.decoder,
            variant=config.variant,
            replicate=config.replicate,
            steps=steps,
            samples=samples,
            seconds=round(time.monotonic() - self.opened, 3),
            config_digest=config.digest,
            run_dir=run_dir,
        )


def _train_plan(
    config: TransferConfig,
    dataset: Dataset,
    chosen: Selection,
    bands: Mapping[Modality, Sequence[str]],
    plan: BatchPlan,
    rank: int = 0,
) -> TrainPlan:
    return TrainPlan(
        sources=(Source(dataset, chosen),),
        seed=config.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=rank,
        world_size=plan.world_size,
        window=config.data.window,
        tail="drop" if config.protocol == "paper" else "carry",
        bands=bands,
    )


def _check_sizes(config: TransferConfig, plan: BatchPlan, patch_px: int, multiple: int) -> None:
    crop_px = config.data.crop_px
    if crop_px % multiple or crop_px > patch_px:
        raise ConfigError(
            f"data.crop_px={crop_px} is not allowed with tiles of {patch_px} px and decoder {config.decoder!r}; give a multiple "
            f"of {multiple} up to {patch_px // multiple * multiple}."
        )
    seen = plan.micro_batch * (plan.world_size if config.engine.batch_norm == "global" else 1)
    if config.decoder == "deeplabv3plus" and seen == 1:
        raise BatchError(
            "decoder='deeplabv3plus' has a batch norm over one pixel a tile, which one tile gives nothing to normalise by; set "
            "engine.micro_batch to 2 or more."
        )


def _check_evidence(encoders: Mapping[Modality, TransferredEncoder]) -> None:
    used = [encoder.used for encoder in encoders.values()]
    if len(used) != 1 or used[0].init != "pretrained" or not used[0].version:
        told = " and ".join(f"{one.ref} ({one.init}{'' if one.version else ', not registered'})" for one in used)
        raise ConfigError(f"evidence=True is of one pretrained encoder in the registry, and the run has {told}; set it to false.")

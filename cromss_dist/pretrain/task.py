"""Pretraining as the training loop sees it: what is known about a run before it starts.

Layer 4.
"""

from dataclasses import dataclass

import torch

from cromss_dist.config import BatchPlan, DataConfig, ReadingConfig, RunConfig, plan_batches
from cromss_dist.data.loading.augment import train_example
from cromss_dist.data.loading.plan import TrainPlan
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import BandError, ConfigError
from cromss_dist.losses import CromssLoss
from cromss_dist.models.encoder import check_encoder_name
from cromss_dist.models.two_branch import ParameterCounts, TwoBranchUNet
from cromss_dist.parse import to_yaml
from cromss_dist.pretrain.export import export
from cromss_dist.pretrain.loss import BranchLoss
from cromss_dist.pretrain.validation import Validator
from cromss_dist.schema import CLASS_NAMES, MODALITIES, NUM_CLASSES, Batch, Example, Modality
from cromss_dist.tracking.registry.entry import check_alias, check_name
from cromss_dist.train.run.folder import RunSummary
from cromss_dist.train.step.engine import Engine, resolve_precision
from cromss_dist.train.step.schedule import Timeline
from cromss_dist.train.task import Trained
from cromss_dist.world import World, choose_device


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run; a `Task`."""

    config: RunConfig
    data: RunData
    plan: BatchPlan
    timeline: Timeline

    @classmethod
    def of(cls, config: RunConfig, world_size: int, trains_here: bool = True) -> "Pretraining":
        """Opens the datasets, splits them and does the arithmetic; starts nothing.

        Args:
            config: The whole run.
            world_size: Its ranks.
            trains_here: Whether they have devices of this machine, which are looked at then.

        Raises:
            ShardError: a dataset is missing or damaged.
            DownloadError: a remote one cannot be fetched.
            BatchError: the batch does not divide over the ranks.
            BandError: the datasets have not all the bands that are asked for.
            ConfigError: the crop is larger than a patch, the classes are not Dynamic World's, a validation season is not
                there, the filters leave too little; the device, its precision or the encoder does not exist.
            RegistryError: the encoders of the run could not be registered under their names or alias.
        """
        plan = plan_batches(config.engine, world_size)
        if trains_here:
            resolve_precision(config.engine, choose_device(config.engine.device))
        check_encoder_name(config.model.encoder)
        if config.tracking.register:
            check_alias(config.tracking.alias)
            for modality in MODALITIES:
                check_name(_model_name(config, modality))
        data = RunData.open(config.data, config.seed)
        _check_data(config.data, data.dataset)
        if config.data.crop_px > data.dataset.patch_px:
            raise ConfigError(
                f"data.crop_px={config.data.crop_px} is larger than the {data.dataset.patch_px} px patches of "
                f"{_named(config.data)}; set data.crop_px to a multiple of {2**config.model.encoder_depth} up to "
                f"{data.dataset.patch_px}."
            )
        data.eval_plan(plan)
        return cls(config, data, plan, Timeline.of(config, data.train_plan(plan).order.epoch_samples))

    @property
    def datasets(self) -> dict[str, str]:
        """Location and digest of each."""
        digests = [source.dataset.digest for source in self.data.train]
        return dict(zip(self.config.data.weights, digests, strict=True))

    def model_name(self, modality: Modality) -> str:
        """Name of an encoder in the registry: `<prefix>-<encoder>-<modality>`."""
        return _model_name(self.config, modality)

    def build_model(self) -> TwoBranchUNet:
        """The networks, with weights drawn from the run's seed."""
        torch.manual_seed(self.config.seed)
        data = self.config.data
        return TwoBranchUNet(self.config.model, len(data.s1_bands), len(data.s2_bands))

    @property
    def reading(self) -> ReadingConfig:
        """How samples get from files into batches."""
        return self.config.data.reading

    def train_plan(self, plan: BatchPlan, rank: int = 0) -> TrainPlan:
        """What a rank trains on, and when."""
        return self.data.train_plan(plan, rank)

    def example(self, batch: Batch, device: torch.device) -> Example:
        """What networks and loss see of a training batch."""
        data = self.config.data
        return train_example(batch, data, data.s1_bands, data.s2_bands, self.config.loss.prior, self.config.seed, device)

    def loss(self, world: World) -> BranchLoss:
        """CromSS over the ranks."""
        reduce_sum = world.reduce_sum if world.size > 1 else None
        return BranchLoss(CromssLoss(self.config.loss, reduce_sum=reduce_sum, world_size=world.size))

    def validator(self, world: World, engine: Engine) -> Validator:
        """What scores both branches on the held-out locations."""
        return Validator(self.config, self.data, self.plan, world, engine, self.loss(world))

    def finish(self, trained: Trained) -> RunSummary | None:
        """Writes weights, encoder packages and the summary, and has the encoders registered."""
        trained.beat("exporting the encoders")
        weights = trained.engine.state_dict()
        if trained.record is None:
            return None
        return export(weights, self.config, self.data, self.model_name, trained, trained.record)

    def parameter_counts(self) -> ParameterCounts:
        """Sizes of the networks."""
        return self.build_model().parameter_counts()

    def describe(self) -> str:
        """What `--dry-run` prints: config, data, batch arithmetic, steps, parameter counts."""
        plan, time, counts = self.plan, self.timeline, self.parameter_counts()
        return "\n".join(
            [
                to_yaml(self.config).rstrip(),
                "---",
                f"config digest       {self.config.digest}",
                *(self._describe_source(number) for number in range(len(self.data.train))),
                f"split               {self.data.num_train} locations to train on, {len(self.data.validation.ids)} held out: "
                f"{len(self.data.eval_plan(plan).pairs)} seasons to validate on",
                f"batch               {plan.global_batch} = micro batch {plan.micro_batch} x accumulation "
                f"{plan.accumulation_steps} x world {plan.world_size}",
                f"steps per epoch     {time.steps_per_epoch:.2f}",
                f"steps               {time.total_steps} ({time.total_samples} samples, {self.config.train.epochs:g} epochs)",
                f"validation          every {time.validate_every_steps} steps",
                f"parameters          {counts.total:,}: encoder S1 {counts.encoder_s1:,}, encoder S2 {counts.encoder_s2:,}, "
                f"decoder and head {counts.decoder:,} ({self.config.model.fusion} fusion)",
            ]
        )

    def _describe_source(self, number: int) -> str:
        location, source = list(self.config.data.weights)[number], self.data.train[number]
        dataset = source.dataset
        share = f", weight {source.weight:g}" if len(self.data.train) > 1 else ""
        return (
            f"data                {location}: {len(dataset.locations)} locations, {dataset.patch_px} px, digest "
            f"{dataset.digest[:12]}{share}"
        )


def _model_name(config: RunConfig, modality: Modality) -> str:
    return f"{config.tracking.model_prefix}-{config.model.encoder}-{modality}"


def _named(data: DataConfig) -> str:
    """The datasets, as messages name them."""
    return ", ".join(data.weights)


def _check_data(data: DataConfig, dataset: Dataset) -> None:
    """Whether the datasets have the bands, seasons and classes that the run needs."""
    for modality, bands in data.bands.items():
        found = [band for spec in dataset.images if spec.modality == modality for band in spec.bands]
        if missing := [band for band in bands if band not in found]:
            raise BandError(
                f"data.{modality}_bands asks for {', '.join(missing)}, which {_named(data)} does not have; it has "
                f"{', '.join(found) or f'no {modality} band'}. Set data.{modality}_bands to some of these."
            )
    if dataset.class_names != CLASS_NAMES:
        raise ConfigError(
            f"{_named(data)} has the label classes {', '.join(dataset.class_names)}; pretraining takes the {NUM_CLASSES} classes "
            "of Dynamic World. Map the labels to them in the archive's description and shard it again."
        )
    if late := [season for season in data.val_seasons if season >= dataset.num_seasons]:
        raise ConfigError(
            f"data.val_seasons names season {late[0]}, and {_named(data)} has {dataset.num_seasons}, counted from 0; set "
            f"data.val_seasons to some of {list(range(dataset.num_seasons))}."
        )

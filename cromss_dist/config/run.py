"""The whole run: what every run has, and a pretraining.

Layer 1.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from cromss_dist.config.check import require
from cromss_dist.config.data import DataConfig
from cromss_dist.config.engine import EngineConfig
from cromss_dist.config.operation import OFFLINE, CheckpointConfig, FaultConfig, LaunchConfig, TrackingConfig
from cromss_dist.config.recipe import LossConfig, ModelConfig, TrainConfig

# Keys that came later: at these values a run is what it was without them, and its digest stays.
_ADDED: dict[str, dict[str, Any]] = {"train": {"decay_epochs": None}, "loss": {"consistency_reliability": "none"}}


@dataclass(frozen=True)
class BaseRunConfig:
    """What every training run has; a kind of run adds its data, networks and loss.

    Args:
        name: Name of the run: its folder under `output` and its MLflow run.
        output: Folder of runs; the MLflow store lies here by default.
        seed: Seeds weights, data order, season and augmentation draws, and splits.
        train: Length, learning rate, validation.
        engine: How a step is computed.
        checkpoint: When the run is saved.
        faults: What becomes of bad steps and hanging ranks.
        tracking: MLflow run and registry.
        launch: Processes.
    """

    # Keys, or groups of them with a dot behind, that make another run where they change; and those among them that do not.
    FIXED: ClassVar[tuple[str, ...]] = ("seed", "engine.global_batch", "engine.batch_norm")
    FREE: ClassVar[tuple[str, ...]] = ()

    name: str = "run"
    output: str = "runs"
    seed: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        require(ok, "name", self.name, "use letters, digits, '.', '_' and '-', starting with a letter or digit")

    def with_absolute_paths(self) -> Self:
        """The same config with paths that hold in every worker, whatever its working directory."""
        tracking, sqlite = self.tracking, "sqlite:///"
        if tracking.uri is not None and tracking.uri.startswith(sqlite):
            tracking = replace(tracking, uri=f"{sqlite}{Path(tracking.uri.removeprefix(sqlite)).absolute()}")
        return replace(self, tracking=tracking, output=str(Path(self.output).absolute()))

    @property
    def tracking_uri(self) -> str | None:
        """The MLflow store of the run: the config's, or SQLite in the folder of runs; None where nothing is sent."""
        if self.tracking.uri == OFFLINE:
            return None
        return self.tracking.uri or f"sqlite:///{Path(self.output).absolute() / 'mlflow.db'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def params(self) -> dict[str, Any]:
        """The same for MLflow, which takes few signs in the name of a parameter."""
        return self.to_dict()

    @property
    def digest(self) -> str:
        """sha256 (hex) of the resolved config."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        """What the digest is of."""
        content = self.to_dict()
        for group, added in _ADDED.items():
            if group in content:
                content[group] = {key: value for key, value in content[group].items() if key not in added or value != added[key]}
        return content


@dataclass(frozen=True)
class RunConfig(BaseRunConfig):
    """A pretraining run.

    Args:
        name: Name of the run: its folder under `output` and its MLflow run.
        data: What is read.
        model: The networks.
        loss: CromSS.
    """

    FIXED: ClassVar[tuple[str, ...]] = (*BaseRunConfig.FIXED, "data.", "model.", "loss.")
    # The loader compares the datasets themselves, wherever they lie.
    FREE: ClassVar[tuple[str, ...]] = ("data.shards", "data.reading.", "data.filter.quality")

    name: str = "pretrain"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        side = 2**self.model.encoder_depth
        require(
            self.data.crop_px % side == 0,
            "data.crop_px",
            self.data.crop_px,
            f"give a multiple of {side} = 2 ** model.encoder_depth",
        )

    def with_absolute_paths(self) -> Self:
        """The same config with paths that hold in every worker, whatever its working directory."""
        return replace(super().with_absolute_paths(), data=self.data.with_absolute_paths())

    def params(self) -> dict[str, Any]:
        """The same for MLflow, which takes few signs in the name of a parameter, and a place may have any."""
        content = self.to_dict()
        if isinstance(self.data.shards, dict):
            content["data"]["shards"] = list(self.data.shards.items())
        return content

    def _content(self) -> dict[str, Any]:
        content = super()._content()
        content["data"]["shards"] = list(self.data.weights.items())  # in order: it numbers the samples of a mixture
        return content

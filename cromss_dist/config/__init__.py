"""The whole run as frozen, typed dataclasses; they are the schema.

Layer 1. YAML files in `configs/` state only what differs from the defaults here, which are the published recipe
(CromSS, section IV-A). Dotted overrides come last: `--engine.global_batch 64`.
"""

from cromss_dist.config.data import DataConfig, FilterConfig, ReadingConfig, ViewConfig
from cromss_dist.config.engine import BatchPlan, EngineConfig, plan_batches, valid_worlds
from cromss_dist.config.operation import CheckpointConfig, FaultConfig, LaunchConfig, TrackingConfig
from cromss_dist.config.recipe import LossConfig, ModelConfig, TrainConfig
from cromss_dist.config.run import BaseRunConfig, RunConfig

__all__ = [
    "BaseRunConfig",
    "BatchPlan",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "FaultConfig",
    "FilterConfig",
    "LaunchConfig",
    "LossConfig",
    "ModelConfig",
    "ReadingConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "ViewConfig",
    "plan_batches",
    "valid_worlds",
]

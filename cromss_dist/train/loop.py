"""The pretraining loop: batches, steps, validation; all lengths in samples.

Layer 3. Runs alike on every rank; only rank 0 holds a Record.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cromss_dist.config import BatchPlan, RunConfig
from cromss_dist.data.augment import eval_geometry, prepare, train_geometry
from cromss_dist.data.index import ShardIndex
from cromss_dist.data.loader import EvalLoader, TrainLoader
from cromss_dist.errors import TrainingError
from cromss_dist.losses import CromssLoss
from cromss_dist.schema import MODALITIES, Batch, Example
from cromss_dist.tracking.panels import PanelRow
from cromss_dist.train.engine import Engine
from cromss_dist.train.metrics import ConfusionMatrix, Scores
from cromss_dist.train.record import Record
from cromss_dist.train.schedule import Plateau, Timeline, lr_factor
from cromss_dist.world import World

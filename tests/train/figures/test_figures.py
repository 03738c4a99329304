"""The table of figures in docs/operations.md is that of the code."""

import itertools
import re
from pathlib import Path

import numpy as np
import torch

from cromss_dist.config import FaultConfig, LossConfig
from cromss_dist.losses import CromssLoss
from cromss_dist.pretrain.loss import BranchLoss
from cromss_dist.pretrain.validation import Validation
from cromss_dist.schema import CLASS_NAMES, MODALITIES, NUM_CLASSES, Example
from cromss_dist.train.figures.meter import PAUSES, STEP_PHASES, Meter
from cromss_dist.train.figures.scores import Scores
from cromss_dist.train.safety.guard import Guard
from cromss_dist.world import World

ALONE = World(0, 1, torch.device("cpu"))
OF_THE_RECORD = {"train/samples"}


def documented() -> set[str]:
    section = (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text().split("## What to watch")[1]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| .+ \|$", section.split("\n## ")[0], re.MULTILINE)
    patterns = [name for names, _ in rows for name in re.findall(r"`([^`]+)`", names)]
    assert len(patterns) == len(set(patterns))
    everything = itertools.product(patterns, MODALITIES, CLASS_NAMES)
    return {pattern.replace("{m}", modality).replace("{class}", name) for pattern, modality, name in everything}


def test_every_figure_is_in_the_table_and_no_other() -> None:
    loss = BranchLoss(
        CromssLoss(LossConfig(segmentation=("ce", "dice", "focal"), consistency_reliability="agreement", prior="none"))
    )
    logits, label = torch.zeros(2, 1, NUM_CLASSES, 8, 8).unbind(), torch.arange(64).view(1, 8, 8) % NUM_CLASSES
    example = Example({}, label, None, None, torch.ones(1))
    meter = Meter(ALONE.device, 1, loss.figures)
    for phase in (*STEP_PHASES, *PAUSES):
        with meter.phase(phase):
            torch.ones(1)
    meter.add(loss(logits, example, 0.0))
    meter.step_done(1.0)
    trained = meter.read(ALONE, 0.1, 1.0, 1.0, num_replaced=0, counters=Guard(FaultConfig(), ALONE).counters)

    losses = {name: 0.0 for name in loss.validation_loss(loss.validation_sums(logits, example))}
    scores: dict[str, Scores] = {modality: Scores.of(np.ones((NUM_CLASSES, NUM_CLASSES)), CLASS_NAMES) for modality in MODALITIES}
    validated = Validation(losses, scores, scores, (), {}, "").metrics()
    assert {*trained, *validated, *OF_THE_RECORD} == documented()

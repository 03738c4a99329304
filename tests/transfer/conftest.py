"""A registry with one encoder, and the smallest transfer run there is."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.parse import parse_run_of
from tests.tracking.registry.conftest import template_registry

__all__ = ["template_registry"]

MakeTransfer = Callable[..., TransferConfig]


def smallest_run(train: Path, test: Path, output: Path, *arguments: str) -> TransferConfig:
    """Steps of four tiles under a decoder of eight channels, as the command line's keys say it; two epochs, saved after each."""
    keys = (
        f"--data.train {train} --data.test {test} --data.crop_px 32 --decoder light --decoder_channels [8] --train.epochs 2 "
        "--train.decay_epochs 1.5 --train.log_every_steps 1 --train.panel_samples 1 --engine.global_batch 4 --engine.device cpu "
        f"--checkpoint.every_epochs 1 --tracking.uri offline --output {output}"
    )
    return parse_run_of(TransferConfig, [*keys.split(), *arguments]).config


@pytest.fixture
def make_transfer(synthetic_shards: Path, encoder_package: Path, tmp_path: Path) -> MakeTransfer:
    """The config of six such steps on the synthetic set with a packaged encoder, frozen."""

    def make(*arguments: str, encoder: Sequence[str] = ("--encoder.s2", str(encoder_package))) -> TransferConfig:
        return smallest_run(synthetic_shards, synthetic_shards, tmp_path, *encoder, *arguments)

    return make

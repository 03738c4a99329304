"""A registry with one encoder, and the smallest transfer run of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.parse import parse_run_of
from tests.tracking.registry.conftest import template_registry

__all__ = ["template_registry"]

MakeTransfer = Callable[..., TransferConfig]


@pytest.fixture
def make_transfer(synthetic_shards: Path, encoder_package: Path, tmp_path: Path) -> MakeTransfer:
    """The config of a run on the synthetic set, by the command line's keys: six steps of the encoder package, frozen."""

    def make(*arguments: str, encoder: Sequence[str] = ("--encoder.s2", str(encoder_package))) -> TransferConfig:
        smallest = (
            f"--data.train {synthetic_shards} --data.test {synthetic_shards} --data.crop_px 32 --decoder light "
            "--decoder_channels [8] --engine.global_batch 4 --engine.device cpu --train.epochs 2 --train.decay_epochs 1.5 "
            "--train.log_every_steps 1 --train.panel_samples 1 --checkpoint.every_epochs 1 "
            f"--tracking.uri offline --output {tmp_path}"
        )
        return parse_run_of(TransferConfig, [*smallest.split(), *encoder, *arguments]).config

    return make

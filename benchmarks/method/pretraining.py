"""One pretraining of the proof, as `cromss pretrain` runs it."""

from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.method.data import dataset
from benchmarks.method.plan import VARIANTS, Pretraining, Size
from cromss_dist.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from cromss_dist.config.operation import OFFLINE
from cromss_dist.parse import CONFIG_FILE, ParsedRun, write_yaml
from cromss_dist.pretrain.run import run_in_process

RAMP_SHARE = 0.4  # of the run, until selection and consistency weights are wholly on


def config_of(work: Path, size: Size, run: Pretraining) -> RunConfig:
    """What differs between runs of a seed is the loss, the labels, and nothing else."""
    places = size.control_places if run.archive in ("uniform", "image-only") else size.places
    epochs = size.steps * size.batch / places
    return RunConfig(
        name=run.name,
        output=str(work / "pretraining"),
        seed=run.seed,
        data=DataConfig(shards=str(dataset(work, run.archive)), crop_px=size.crop_px, val_fraction=0.02),
        model=ModelConfig(encoder=size.encoder, encoder_depth=len(size.decoder_channels), decoder_channels=size.decoder_channels),
        loss=LossConfig(ramp_epochs=RAMP_SHARE * epochs, **VARIANTS[run.variant]),
        train=TrainConfig(
            epochs=epochs, lr=size.lr, schedule="cosine", validate_every_epochs=epochs, log_every_steps=max(1, size.steps // 50)
        ),
        engine=EngineConfig(global_batch=size.batch, device=size.device, channels_last=True),
        checkpoint=CheckpointConfig(every_epochs=epochs / 4, keep=1),
        tracking=TrackingConfig(uri=OFFLINE, register=False),
    )


def run_dir_of(work: Path, name: str) -> Path:
    """Folder of a pretraining."""
    return work / "pretraining" / name


def pretrain(work: Path, size: Size, run: Pretraining, console: Console) -> dict[str, Any]:
    """Runs a pretraining, or goes on with it.

    Returns:
        Validation figures at its end (of few places: to see that it learnt, not to compare), and its speed.
    """
    config, run_dir = config_of(work, size, run), run_dir_of(work, run.name)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_yaml(config, run_dir / CONFIG_FILE)
    summary = run_in_process(ParsedRun(config, resume=run_dir), console)
    return {"samples": summary.samples, "samples_per_s": summary.samples_per_s, "validation": summary.after}


def encoder_of(work: Path, name: str, modality: str) -> Path:
    """The package of an encoder that a pretraining has left."""
    return run_dir_of(work, name) / "encoders" / modality

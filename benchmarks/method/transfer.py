"""One transfer of the proof, as `cromss transfer` runs it."""

from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.method.data import dataset
from benchmarks.method.plan import RANDOM, Size, Transfer, pretraining_of
from benchmarks.method.pretraining import encoder_of
from cromss_dist.config import CheckpointConfig, EngineConfig, TrackingConfig, TrainConfig
from cromss_dist.config.operation import OFFLINE
from cromss_dist.config.transfer import DownstreamConfig, EncoderConfig, LabelsConfig, TransferConfig
from cromss_dist.parse import CONFIG_FILE, ParsedRun, write_yaml
from cromss_dist.schema import BANDS
from cromss_dist.transfer.results import read_result
from cromss_dist.transfer.run import run_in_process


def config_of(work: Path, size: Size, run: Transfer) -> TransferConfig:
    """What differs between encoders of a setting, seed and choice of tiles is the encoder, and nothing else."""
    setting = run.setting
    epochs = size.transfer_steps * size.transfer_batch / setting.labels
    return TransferConfig(
        name=run.name.replace("/", "-"),
        output=str(work / "transfer"),
        seed=run.seed,
        task="synthetic",
        variant=run.variant,
        data=DownstreamConfig(
            train=str(dataset(work, "labelled-tiles")), test=str(dataset(work, "test-tiles")), crop_px=size.crop_px
        ),
        encoder=_encoder(work, size, run),
        decoder=setting.decoder,
        decoder_channels=size.decoder_channels if setting.decoder == "unet" else None,
        mode=setting.mode,
        labels=LabelsConfig(fraction=setting.labels / size.labelled_places, seed=run.subset),
        train=TrainConfig(
            epochs=epochs, lr=size.transfer_lr, schedule="cosine", log_every_steps=max(1, size.transfer_steps // 20)
        ),
        engine=EngineConfig(global_batch=size.transfer_batch, device=size.device, channels_last=True),
        checkpoint=CheckpointConfig(every_epochs=epochs, keep=1),
        tracking=TrackingConfig(uri=OFFLINE, register=False),
    )


def _encoder(work: Path, size: Size, run: Transfer) -> EncoderConfig:
    modality = run.setting.modality
    if run.variant == RANDOM:
        bands = BANDS[modality]
        s1_bands, s2_bands = (bands, None) if modality == "s1" else (None, bands)
        return EncoderConfig(
            init="random", name=size.encoder, depth=len(size.decoder_channels), s1_bands=s1_bands, s2_bands=s2_bands
        )
    ref = str(encoder_of(work, pretraining_of(run.variant, run.seed).name, modality))
    return EncoderConfig(s1=ref) if modality == "s1" else EncoderConfig(s2=ref)


def run_dir_of(work: Path, run: Transfer) -> Path:
    """Folder of a transfer."""
    return work / "transfer" / run.name


def transfer(work: Path, size: Size, run: Transfer, console: Console) -> dict[str, Any]:
    """Runs a transfer, or goes on with it.

    Returns:
        Its scores over all classes.
    """
    config, run_dir = config_of(work, size, run), run_dir_of(work, run)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_yaml(config, run_dir / CONFIG_FILE)
    run_in_process(ParsedRun(config, resume=run_dir), console)
    return read_result(run_dir).scores.figures()

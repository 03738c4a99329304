"""The encoders of a finished run as packages, in its folder and in the registry.

Layer 4. Only rank 0 exports.
"""

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cromss_dist import __version__
from cromss_dist.config import RunConfig
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.models.encoder import build_encoder, load_strictly, stage_channels
from cromss_dist.schema import MODALITIES, Modality
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import check_package
from cromss_dist.tracking.revision import git_revision
from cromss_dist.tracking.run.requests import flatten
from cromss_dist.train.run.folder import RunSummary, write_summary, write_weights
from cromss_dist.train.run.record import Record
from cromss_dist.train.task import Trained

_VERSIONED = ("torch", "segmentation-models-pytorch", "timm", "deepspeed")


def export(
    weights: dict[str, torch.Tensor],
    config: RunConfig,
    data: RunData,
    model_name: Callable[[Modality], str],
    trained: Trained,
    record: Record,
) -> RunSummary:
    """Writes the weights, the packages of both encoders and the summary of a run, and has the encoders registered.

    Args:
        weights: Of the networks, on the CPU.
        config: Of the run.
        data: That it learnt from.
        model_name: An encoder's name in the registry.
        trained: The run.
        record: Of the run.

    Raises:
        OSError: a file cannot be written.
    """
    run_dir = trained.run_dir
    record.event("stage", text="writing encoder packages")
    write_weights(run_dir, weights)
    packages = {m: _write_package(m, weights, config, data, trained, record) for m in MODALITIES}
    if config.tracking.register:
        for modality, folder in packages.items():
            record.register(folder, check_package(folder), model_name(modality), config.tracking.alias)
    delivery = record.finish(config.tracking.patience_s)
    summary = RunSummary(
        run_dir=str(run_dir),
        run_id=delivery.run_id,
        tracking_uri=config.tracking_uri,
        num_train=data.num_train,
        num_val=len(data.validation.ids),
        samples=trained.samples,
        samples_per_s=trained.samples_per_s,
        before=trained.before,
        after=trained.after,
        registered=delivery.registered,
        packages={m: str(folder) for m, folder in packages.items()},
        refused={model: f"{type(error).__name__}: {error}" for model, error in delivery.refused.items()},
    )
    write_summary(run_dir, summary)
    return summary


def _write_package(
    modality: Modality,
    weights: dict[str, torch.Tensor],
    config: RunConfig,
    data: RunData,
    trained: Trained,
    record: Record,
) -> Path:
    """The package of one encoder, in the run's folder."""
    bands = config.data.bands[modality]
    # Anew: the networks may be on a GPU, or on several.
    encoder = build_encoder(config.model.encoder, config.model.encoder_depth, len(bands))
    channels, strides = stage_channels(encoder)
    prefix = f"encoders.{modality}."
    card = EncoderCard(
        modality=modality,
        bands=bands,
        normalisation=data.dataset.normalisation(modality).select(bands),
        encoder=config.model.encoder,
        depth=config.model.encoder_depth,
        in_channels=len(bands),
        out_channels=channels,
        strides=strides,
        method="cromss",
        fusion=config.model.fusion,
        dataset=" + ".join(location.rstrip("/").rpartition("/")[2] or location for location in config.data.weights),
        patch_px=config.data.crop_px,
        config_digest=config.digest,
        manifest_digest=data.dataset.digest,
        run_id=record.run_id,
        git_revision=git_revision(),
        versions={"cromss_dist": __version__} | {name: version(name) for name in _VERSIONED},
        recipe=flatten(_recipe(config)),
        metrics={name: value for name, value in trained.after.items() if f"_{modality}" in name},
        licence=config.tracking.licence,
        archive=flatten(data.dataset.archives),
    )
    folder = trained.run_dir / "encoders" / modality
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was cut, or before the run was made longer
    load_strictly(encoder, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    package_encoder(folder, encoder, card)
    return folder


def _recipe(config: RunConfig) -> dict[str, Any]:
    """What of a config made the weights: no folders, no tracking, no processes."""
    content = {
        key: value for key, value in config.to_dict().items() if key in ("seed", "data", "model", "loss", "train", "engine")
    }
    content["data"]["weights"] = list(config.data.weights.values())
    for name in ("shards", "reading"):
        del content["data"][name]
    del content["data"]["filter"]["quality"]
    return content

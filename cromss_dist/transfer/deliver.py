"""What a transfer run leaves when it has been scored: files in its folder, figures in MLflow, evidence in the registry.

Layer 4. Only rank 0 delivers.
"""

from collections.abc import Sequence

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.data.staging import write_atomically
from cromss_dist.errors import RegistryError
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.train.run.folder import RunSummary, write_summary
from cromss_dist.train.run.record import Record
from cromss_dist.transfer.network import registry_uri
from cromss_dist.transfer.panels import TilePanel, draw_tiles
from cromss_dist.transfer.results import SCORES_FILE, TILES_FILE, Tiles, TransferResult, write_result
from cromss_dist.transfer.statistics import evidence_of

EVIDENCE_FILE = "evidence.json"
PANEL_FILE = "panels/test.png"


def deliver(
    config: TransferConfig,
    result: TransferResult,
    tiles: Tiles,
    panels: Sequence[TilePanel],
    samples_per_s: float,
    record: Record,
) -> RunSummary:
    """Writes the result, tells of it, and ends the run.

    Args:
        config: Of the run.
        result: What it was and how it scored.
        tiles: The same, tile by tile.
        panels: Tiles to look at.
        samples_per_s: Of training; 0 where nothing was trained.
        record: Of the run.

    Raises:
        StorageError: a file cannot be written.
        RegistryError: all is written, and the registry does not take the evidence.
    """
    run_dir, scores = result.run_dir, result.scores
    write_result(run_dir, result, tiles)
    figures = {f"test/{name}": value for name, value in scores.figures().items()}
    record.validation(figures, result.steps, result.samples)
    if panels:
        bands = {modality: used.bands for modality, used in result.encoders.items()}
        title = f"{config.name}: {result.task}, {result.mode}, {result.labels.amount} of the labels"
        record.picture(PANEL_FILE, draw_tiles(panels, bands, result.class_names, title))
    record.artifact(SCORES_FILE)
    record.artifact(TILES_FILE)
    measured = _evidence(result, tiles, record)
    if measured is not None:
        write_atomically(run_dir / EVIDENCE_FILE, measured.to_json().encode())
        record.artifact(EVIDENCE_FILE)
    interval = f" ({100 * measured.low:.2f} to {100 * measured.high:.2f})" if measured else ""
    record.tell(
        f"{result.tiles} test tiles: mIoU {100 * scores.mean_iou:.2f} %{interval}, overall accuracy "
        f"{100 * scores.overall_accuracy:.2f} %"
    )
    refused = _register(config, result, measured, record) if config.evidence and measured is not None else None
    delivery = record.finish(config.tracking.patience_s)
    summary = RunSummary(
        run_dir=str(run_dir),
        run_id=delivery.run_id,
        tracking_uri=config.tracking_uri,
        num_train=result.labels.tiles,
        num_val=0,
        samples=result.samples,
        samples_per_s=samples_per_s,
        before={},
        after=figures,
        registered={},
        packages={},
    )
    write_summary(run_dir, summary)
    if refused is not None:
        raise refused
    return summary


def _evidence(result: TransferResult, tiles: Tiles, record: Record) -> Evidence | None:
    """The mean IoU with its interval, where the run is evidence of an encoder."""
    used = list(result.encoders.values())
    if len(used) != 1 or used[0].init != "pretrained" or result.mode == "knn":
        return None
    if result.tiles < 2:
        record.tell(f"no {EVIDENCE_FILE}: an interval takes two test tiles or more, and there is {result.tiles}")
        return None
    return evidence_of([result], [tiles], source=record.run_id)


def _register(config: TransferConfig, result: TransferResult, measured: Evidence, record: Record) -> RegistryError | None:
    """Adds the evidence to the encoder's version, and tells; else what hindered it."""
    (used,) = result.encoders.values()
    try:
        Registry(registry_uri(config)).add_evidence(used.version, measured)
    except RegistryError as error:
        return RegistryError(
            f"{error} The run is whole in its folder; when that is mended: cromss registry evidence {used.version} "
            f"{result.run_dir / EVIDENCE_FILE}"
        )
    record.tell(f"evidence {measured.key} added to {used.version}")
    return None

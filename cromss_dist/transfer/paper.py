"""The published figures, to stand beside our own.

Layer 4: definitions only. Every number was read in a source, which it names; what could not be read is not here.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cromss_dist.schema import Modality
from cromss_dist.train.figures.scores import Metric

PAPER = "Liu et al., CromSS, IEEE TGRS 2025, arXiv:2405.01217"
PublishedMode: TypeAlias = Literal["frozen", "finetuned"]


@dataclass(frozen=True)
class Published:
    """One published figure, in percent.

    Args:
        task: Task, by our name.
        modality: Input.
        bands: Number of input bands.
        mode: Encoder kept or trained.
        method: How the encoder was pretrained, by the paper's name.
        metric: The figure.
        value: Its mean over repeated runs.
        std: Its standard deviation over them; None = not known here.
        encoder: Architecture.
        decoder: Ours for the one it was trained with.
        source: Publication, and what the figure is of.
    """

    task: str
    modality: Modality
    bands: int
    mode: PublishedMode
    method: str
    metric: Metric
    value: float
    std: float | None
    encoder: str
    decoder: str
    source: str


def _dw(
    modality: Modality, bands: int, method: str, frozen: float, finetuned: float, std: tuple[float, float] | None = None
) -> tuple[Published, Published]:
    """Both modes of a row of the results on SSL4EO-S12@DW."""
    source = f"{PAPER}: mIoU on SSL4EO-S12@DW, DeepLabv3+ on ResNet-50"

    def one(mode: PublishedMode, value: float, spread: float | None) -> Published:
        return Published("dw", modality, bands, mode, method, "miou", value, spread, "resnet50", "deeplabv3plus", source)

    spreads = std or (None, None)
    return one("frozen", frozen, spreads[0]), one("finetuned", finetuned, spreads[1])


# OSM, DFC2020 and the figures other than mIoU are published too and not here: their tables could not be read. The README of the
# published code numbers the tables 1 (DFC2020), 2 (@DW) and 3 (@OSM).
PUBLISHED: tuple[Published, ...] = (
    *_dw("s2", 9, "random", 48.22, 56.51),
    *_dw("s2", 9, "CromSS, late fusion", 60.93, 62.05, std=(0.60, 0.24)),
    *_dw("s2", 13, "CromSS, late fusion", 60.50, 61.10),
    *_dw("s2", 13, "MoCo", 59.52, 58.82),
    *_dw("s1", 2, "random", 29.85, 39.80),
    *_dw("s1", 2, "CromSS", 39.63, 44.00),
    *_dw("s1", 2, "DeCUR", 45.53, 44.72),
)


def published(task: str, modality: str, mode: str) -> tuple[Published, ...]:
    """The published figures of a setting, as they were printed; none where the paper has none, or none that is here.

    Args:
        task: 'dw', 'osm', 'dfc2020'.
        modality: 's1' or 's2'.
        mode: 'frozen' or 'finetuned'.
    """
    return tuple(one for one in PUBLISHED if (one.task, one.modality, one.mode) == (task, modality, mode))

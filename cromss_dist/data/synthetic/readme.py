"""The README.md that goes with each synthetic archive."""

from dataclasses import asdict

from cromss_dist.data.synthetic.report import Report
from cromss_dist.data.synthetic.settings import PLACES, SyntheticConfig
from cromss_dist.schema import CLASS_NAMES, NOISE_KINDS


def readme(config: SyntheticConfig, report: Report) -> str:
    """Markdown: what the archive is, how to read it, its parameters and main figures."""
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(config).items())
    classes = "\n".join(
        f"| {value} | {name} | {report.class_shares[name]:.3f} | {_share(report.noise_by_class[name])} |"
        for value, name in enumerate(CLASS_NAMES)
    )
    kinds = "\n".join(f"| {value} | {name} | {_kind_share(report, name)} |" for value, name in enumerate(NOISE_KINDS))
    return f"""# Synthetic archive in the layout of SSL4EO-S12 and NoLDO-S12

Simulated from random landscapes: no pixel was measured. {report.num_locations} locations x 4 seasons.
Places cycle through {", ".join(PLACES)}; the location's id is its number. What is simulated, and from which sources, is
described in docs/synthetic.md of the generator's repository.

    s1/<id>/<scene>/VV.tif VH.tif metadata.json              float32 dB
    s2c/<id>/<scene>/B1.tif .. B12.tif B8A.tif metadata.json uint16, reflectance x 10000, native resolution
    dw_noisy_labels/<id>/<S2 scene>/label.tif                uint8, the noisy label
    reference_labels/<id>/<S2 scene>/label.tif               uint8, the truth of that season
    noise_kinds/<id>/<S2 scene>/kind.tif                     uint8, why the noisy label is wrong
    dw_complete_ids.csv                                      ids and S2 scenes in order of date
    report.json                                              config and figures

S1 scene names do not sort by date (S1A and S1B mix): pair seasons by the acquisition time in the names.

| parameter | value |
|--|--|
{settings}

Wrong labels: {report.noise_rate:.3f} of all season pixels.

| value | class | share of pixels | wrong labels |
|--|--|--|--|
{classes}

| value | kind | share of pixels |
|--|--|--|
{kinds}
"""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _kind_share(report: Report, name: str) -> str:
    return f"{report.noise_by_kind.get(name, 1 - report.noise_rate):.3f}"

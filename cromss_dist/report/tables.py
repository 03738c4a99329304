"""What the report says of runs in words and numbers, as tables.

Layer 4. Scores are in percent.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite

from cromss_dist.report.charts import split_metric
from cromss_dist.report.run_record import RunRecord
from cromss_dist.schema import MODALITIES

NONE = "\N{EN DASH}"  # where there is no figure
_NUMBER = re.compile(NONE + r"|([+-]?[\d,]+(\.\d+)?( ± [\d.]+)?)?( ?\[.*\])?")
_MOST_INCIDENTS = 50
_TRUTHS = {"val/iou": "labels", "val/reference_iou": "reference"}


@dataclass(frozen=True)
class Table:
    """Text cells; the first of each row is its heading.

    Args:
        caption: What it shows, with the unit.
        header: One a column.
        rows: As long as the header.
        note: Below it.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns are numbers, and so are set flush right."""
        return tuple(place > 0 and all(_NUMBER.fullmatch(row[place]) for row in self.rows) for place in range(len(self.header)))


def overview(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """A row a run: how far it came and where it stands."""
    metrics = {f"val/{kind}_{m}": f"mIoU {m.upper()}, {truth}" for kind, truth in _MIOU.items() for m in MODALITIES}
    metrics["test/miou"] = "mIoU, test tiles"
    shown = {metric: title for metric, title in metrics.items() if any(metric in run.series for run in runs)}
    rows = []
    for run, name in zip(runs, names, strict=True):
        loss, speed = run.last("train/loss/total"), run.last("perf/samples_per_s")
        rows.append(
            (
                name,
                run.state,
                f"{run.steps:,}",
                _done(run),
                NONE if run.began is None or run.ended is None else duration(run.ended - run.began),
                number(speed, 1),
                number(loss, 3),
                *(percent(run.last(metric)) for metric in shown),
            )
        )
    header = ("run", "state", "steps", "samples", "time", "samples/s", "training loss", *shown.values())
    return Table("Where each run stands; scores in %, as they were last", header, tuple(rows))


_MIOU = {"miou": "labels", "reference_miou": "reference"}


def _done(run: RunRecord) -> str:
    whole = run.total_samples is None or run.samples >= run.total_samples
    return f"{run.samples:,}" if whole else f"{run.samples:,} of {run.total_samples:,}"


def facts(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """What ran, where, when, on what: a column a run; facts that none has are left out."""
    found = [dict(_facts(run)) for run in runs]
    keys = dict.fromkeys(key for of_run in found for key in of_run)
    rows = tuple((key, *(of_run.get(key, NONE) for of_run in found)) for key in keys)
    return Table("Where, when and on what", ("", *names), rows)


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    yield "folder", str(run.folder)
    yield "state", run.state
    if run.error:
        yield "error", run.error
    if run.began is not None and run.ended is not None:
        yield "began", moment(run.began)
        yield "last sign of life", moment(run.ended)
        yield "starts", str(run.attempts)
    for key, title in _TAGS.items():
        if key in run.tags:
            yield title, run.tags[key]
    for name, digest, source in run.datasets:
        yield f"dataset {name}", source
        yield f"digest of {name}", digest


_TAGS = {
    "git_revision": "commit",
    "config_digest": "digest of the config",
    "world_size": "ranks",
    "device": "device",
    "precision": "precision",
}


def differences(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """The config keys whose values are not the same in all runs, of one kind; names and folders aside."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in ("name", "output"))
    rows = [(key, *(run.config.get(key, NONE) for run in runs)) for key in keys]
    different = tuple(row for row in rows if len(set(row[1:])) > 1)
    return Table("What differs in the configs", ("key", *names), different)


def config(run: RunRecord) -> Table:
    """All of a run's config."""
    return Table("Config", ("key", "value"), tuple(run.config.items()))


def incidents(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """What did not go as it should, the first of it."""
    rows = [(moment(i.time), name, i.text) for run, name in zip(runs, names, strict=True) for i in run.incidents]
    left = len(rows) - _MOST_INCIDENTS
    note = f"And {left:,} more." if left > 0 else ""
    return Table("Restarts, skipped steps and spikes", ("when", "run", "what"), tuple(rows[:_MOST_INCIDENTS]), note)


def class_tables(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Table]:
    """IoU of each class by run and modality, at the last validation: against the labels, and against the reference."""
    for base, truth in _TRUTHS.items():
        values: dict[tuple[int, str], dict[str, float]] = {}
        for place, run in enumerate(runs):
            for metric, series in run.series.items():
                found, modality, part = split_metric(metric)
                if found == base:
                    values.setdefault((place, modality), {})[part] = series.last
        if values:
            classes = dict.fromkeys(part for by_class in values.values() for part in by_class)
            rows = [(name.replace("_", " "), *(percent(by_class.get(name)) for by_class in values.values())) for name in classes]
            header = ("class", *(f"{names[place]} {modality.upper()}".strip() for place, modality in values))
            yield Table(f"IoU against the {truth} in %, of the last validation", header, tuple(rows))


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names, with the folder where two are the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({run.folder})" for name, run in zip(names, runs, strict=True)]


def percent(share: float | None) -> str:
    """A share in percent, without the sign."""
    return number(None if share is None else 100 * share, 1)


def number(value: float | None, digits: int) -> str:
    """A number; a dash where there is none."""
    return NONE if value is None or not isfinite(value) else f"{value:,.{digits}f}"


def moment(time_s: float) -> str:
    """Seconds since 1970 as date and time."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    told = [f"{count} {unit}" for count, unit in units if count][:2]
    return (" ".join(told) or "0 s").replace(" ", "\N{NO-BREAK SPACE}")

"""A run as its folder tells it: facts, figures over time, pictures. The spool is the source; nothing else need be there.

Layer 4. A folder may come from anywhere: what it says is data, and no file outside it is read.
"""

import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import copysign, inf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cromss_dist.errors import ArchiveMissingError, StorageError
from cromss_dist.tracking.run.spool import EVENTS_FILE, read_events
from cromss_dist.transfer.results import SCORES_FILE

PANELS = "panels"
_FIGURES = ("progress", "validation")
_INCIDENTS = {
    "resumed": "went on after step {step} from a checkpoint",
    "bad_step": "step {step} skipped: {reason}",
    "spike": "step {step}: {reason}",
    "stopping": "asked to stop after step {step}: {reason}",
}
_MOST_PIXELS = 50_000_000  # of a picture that is shown
_LATEST_S = 4e9  # a time of a run, seconds since 1970
_MOST_SAMPLES = 2**53
_LARGEST = 1e100  # of a figure; a larger one is infinite: axes cannot span float64


@dataclass(frozen=True)
class Series:
    """One figure over a run, in the order of steps."""

    samples: npt.NDArray[np.float64]  # (N,): training samples seen
    values: npt.NDArray[np.float64]  # (N,): NaN and infinite where the run noted that

    @property
    def last(self) -> float:
        """The figure at the end."""
        return float(self.values[-1])


@dataclass(frozen=True)
class Picture:
    """A PNG of a run's folder that decodes."""

    path: Path
    width: int  # px
    height: int


@dataclass(frozen=True)
class Incident:
    """Something that did not go as it should, or a start after the first."""

    time: float  # seconds since 1970
    text: str


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run says.

    Args:
        folder: Of the run.
        name: Of the run, as MLflow shows it.
        state: FINISHED, FAILED or KILLED; 'no end recorded' of one that runs, or whose process was killed.
        error: That ended it.
        began: First start, seconds since 1970; None where there is no spool.
        ended: Last line of the spool, likewise.
        attempts: Starts.
        steps: Optimiser steps.
        samples: Training samples.
        total_samples: That it was to take.
        tags: Of its last start: commit, digest of the config, device.
        config: With dotted keys, of its last start.
        datasets: What it learnt from: (name, digest of the manifest, place).
        series: Its figures by MLflow's names.
        incidents: In order.
        pictures: Validation panels, in the order of their names.
        unreadable: Names of pictures that cannot be shown.
    """

    folder: Path
    name: str
    state: str = "no end recorded"
    error: str | None = None
    began: float | None = None
    ended: float | None = None
    attempts: int = 0
    steps: int = 0
    samples: int = 0
    total_samples: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[tuple[str, str, str], ...] = ()
    series: Mapping[str, Series] = field(default_factory=dict)
    incidents: tuple[Incident, ...] = ()
    pictures: tuple[Picture, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def is_transfer(self) -> bool:
        """Whether it is of one task, so that its figures are not those of pretraining."""
        return "task" in self.config

    def last(self, metric: str) -> float | None:
        """The last value of a figure; None where the run has none."""
        return self.series[metric].last if metric in self.series else None


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The folders of runs among those given, and in them at any depth, each once.

    Raises:
        ArchiveMissingError: a folder is none of a run, nor of runs.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = list(_walk(folder))
        if not runs:
            raise ArchiveMissingError(
                f"{folder} is no folder of a run, nor of runs: nothing in it has an {EVENTS_FILE} or a {SCORES_FILE}. "
                "Give the folder that the run named when it began, or the one that holds them (config: output)."
            )
        found |= dict.fromkeys(run.absolute() for run in runs)
    return list(found)


def _walk(folder: Path) -> Iterator[Path]:
    """Runs hold no runs, but what they set aside before they were started over."""
    if any((folder / name).is_file() for name in (EVENTS_FILE, SCORES_FILE)):
        yield folder
    elif folder.is_dir():
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink():
                yield from _walk(inner)


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder. A figure that a run going on computed again is shown as it was first, as MLflow has it.

    Raises:
        StorageError: a line of the spool is not as runs write it.
    """
    pictures, unreadable = _pictures(folder)
    reader = _SpoolReader(folder.name)
    for event in read_events(folder):
        try:
            reader.take(event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
            raise StorageError(
                f"{folder / EVENTS_FILE} was damaged: {str(event)[:120]} is no event of a run. Take that line out, and try again."
            ) from None
    return reader.record(folder, pictures, unreadable)


class _SpoolReader:
    """Adds up the lines of a spool, in bounded memory but for the figures."""

    def __init__(self, name: str) -> None:
        self._facts: dict[str, Any] = {"name": name}
        self._points: dict[str, tuple[array[float], array[float]]] = {}
        self._last_step = dict.fromkeys(_FIGURES, -1)
        self._datasets: dict[tuple[str, str, str], None] = {}
        self._incidents: list[Incident] = []

    def take(self, event: Mapping[str, Any]) -> None:
        """One line."""
        kind, facts = event["event"], self._facts
        facts["ended"] = float(event["time"])
        if not 0 <= facts["ended"] < _LATEST_S:
            raise ValueError(facts["ended"])
        facts.setdefault("began", facts["ended"])
        if kind in _FIGURES:
            self._take_figures(kind, event)
        elif kind == "run":
            facts["name"] = str(event["name"])
        elif kind == "attempt":
            facts |= {"attempts": int(event["number"]), "state": RunRecord.state, "error": None}
        elif kind == "start":
            facts["total_samples"] = int(event["total_samples"])
        elif kind == "tags":
            facts["tags"] = facts.get("tags", {}) | {str(name): str(value) for name, value in event["values"].items()}
        elif kind == "params":
            facts["config"] = dict(_flat(event["values"]))
        elif kind == "dataset":
            self._datasets[str(event["name"]), str(event["digest"]), str(event["source"])] = None
        elif kind == "end":
            facts |= {"state": str(event["status"]), "error": event["error"] and str(event["error"])}
        elif kind in _INCIDENTS:
            self._incidents.append(Incident(facts["ended"], _INCIDENTS[kind].format_map(event)))

    def _take_figures(self, kind: str, event: Mapping[str, Any]) -> None:
        step, samples = int(event["step"]), int(event["samples"])
        if not 0 <= samples <= _MOST_SAMPLES:
            raise ValueError(samples)
        if step <= self._last_step[kind]:
            return
        self._last_step[kind] = step
        self._facts |= {"steps": step, "samples": samples}
        for name, value in event["metrics"].items():
            places, values = self._points.setdefault(str(name), (array("d"), array("d")))
            number = float(value)  # before anything is added, so that both stay equally long
            places.append(samples)
            values.append(number if not abs(number) > _LARGEST else copysign(inf, number))

    def record(self, folder: Path, pictures: tuple[Picture, ...], unreadable: tuple[str, ...]) -> RunRecord:
        """All of it."""
        series = {name: Series(np.asarray(places), np.asarray(values)) for name, (places, values) in self._points.items()}
        return RunRecord(
            folder,
            datasets=tuple(self._datasets),
            series=series,
            incidents=tuple(self._incidents),
            pictures=pictures,
            unreadable=unreadable,
            **self._facts,
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested config with dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pictures(folder: Path) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """The panels that decode, and the names of those that do not or lie elsewhere."""
    shown, unreadable = [], []
    for path in sorted((folder / PANELS).glob("*.png")):
        try:
            if not path.resolve().is_relative_to(folder.resolve()):  # a link must not bring a foreign file onto the page
                raise ValueError(path)
            with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("PNG",)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(path)
                image.load()
                shown.append(Picture(path, image.width, image.height))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            unreadable.append(path.name)
    return tuple(shown), tuple(unreadable)

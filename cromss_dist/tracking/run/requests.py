"""From the spool's lines to what MLflow is asked: a pure function, so that every sending of a spool leaves the same.

A point is (key, step, time of its line, value). MLflow's stores keep one of equal points, so that what is sent once more, after
a reply that was lost, adds nothing.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MAX_PARAM, _MAX_TAG = 6000, 5000  # characters that MLflow keeps of a value
_PROGRESS, _VALIDATION = "progress", "validation"


@dataclass(frozen=True)
class RunName:
    """What a run is found by in a store."""

    run: str  # its own id
    name: str
    experiment: str
    time_ms: int


@dataclass(frozen=True)
class Point:
    """One value of a curve."""

    key: str
    value: float  # finite or NaN
    time_ms: int
    step: int


@dataclass(frozen=True)
class DatasetUse:
    """A dataset that the run learns from."""

    name: str
    digest: str
    source: str


@dataclass(frozen=True)
class Registration:
    """An encoder package that becomes a version of a model."""

    package: str  # folder in the run's folder
    card: str  # sha256 of its card
    model: str
    alias: str


@dataclass
class Requests:
    """What MLflow is asked for some lines of a spool, in the order of sending."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    datasets: list[DatasetUse] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)  # path in the store -> path in the run's folder
    registrations: list[Registration] = field(default_factory=list)
    status: str | None = None  # RUNNING, FINISHED, FAILED or KILLED
    end_ms: int | None = None  # of a run that has ended


class Fold:
    """Turns the lines of a spool, in order, into requests. What it gives depends on nothing but the lines before.

    Of a step that was computed twice, since the run was cut and went on from a checkpoint, the first value of each key counts,
    and the tag `recomputed_steps` names it. Of a parameter the first value counts, since MLflow changes none; a later one goes to
    the tag `resumed/<key>`. Infinities become NaN, since MLflow would store 1.8e308, which no plot survives; the first value of a
    key that is not finite is noted in the tag `nonfinite/<key>`.
    """

    def __init__(self) -> None:
        self.run: RunName | None = None
        self.status = "RUNNING"
        self.last_ms = 0
        """Time of the last line."""
        self._params: dict[str, str] = {}
        self._last_step: dict[str, int] = {}
        self._nonfinite: set[str] = set()
        self._progress = 0  # the largest step
        self._recomputed: list[str] = []

    def add(self, lines: Iterable[Mapping[str, Any]]) -> Requests:
        """What the next lines of the spool ask for."""
        requests = Requests()
        for line in lines:
            self.last_ms = int(line["time"] * 1000)
            getattr(self, f"_on_{line['event']}", lambda *_: None)(line, requests)
        requests.tags = {key: value[:_MAX_TAG] for key, value in requests.tags.items()}
        return requests

    def _on_run(self, line: Mapping[str, Any], requests: Requests) -> None:
        self.run = RunName(line["run"], line["name"], line["experiment"], self.last_ms)

    def _on_attempt(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.tags["attempts"] = str(line["number"])
        if line["step"] < self._progress:
            self._recomputed.append(f"{line['step'] + 1}-{self._progress}")
            requests.tags["recomputed_steps"] = ", ".join(self._recomputed)
        self.status = requests.status = "RUNNING"
        requests.end_ms = None

    def _on_params(self, line: Mapping[str, Any], requests: Requests) -> None:
        for key, value in flatten(line["values"]).items():
            value = value[:_MAX_PARAM]
            if key not in self._params:
                self._params[key] = requests.params[key] = value
            elif self._params[key] != value:
                requests.tags[f"resumed/{key}"] = value

    def _on_tags(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.tags |= line["values"]

    def _on_dataset(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.datasets.append(DatasetUse(line["name"], line["digest"], line["source"]))
        # MLflow takes few signs in the name of a tag.
        requests.tags[f"dataset/{re.sub(r'[^A-Za-z0-9_.: -]', '_', line['name'])}"] = line["digest"]

    def _on_progress(self, line: Mapping[str, Any], requests: Requests) -> None:
        self._progress = max(self._progress, line["step"])
        self._add_points(line["metrics"] | {"train/samples": float(line["samples"])}, line["step"], requests)

    def _on_validation(self, line: Mapping[str, Any], requests: Requests) -> None:
        self._add_points(line["metrics"], line["step"], requests)

    def _add_points(self, metrics: Mapping[str, float], step: int, requests: Requests) -> None:
        for key, value in metrics.items():
            if step <= self._last_step.get(key, -1):
                continue
            self._last_step[key] = step
            if not math.isfinite(value) and key not in self._nonfinite:
                self._nonfinite.add(key)
                requests.tags[f"nonfinite/{key}"] = f"{value} at step {step}"
            requests.points.append(Point(key, float(value) if math.isfinite(value) else math.nan, self.last_ms, step))

    def _on_artifact(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.artifacts[line["artifact"]] = line["path"]

    def _on_register(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.registrations.append(Registration(line["package"], line["card"], line["model"], line["alias"]))

    def _on_end(self, line: Mapping[str, Any], requests: Requests) -> None:
        if line["error"]:
            requests.tags["error"] = line["error"]
        self.status = requests.status = line["status"]
        requests.end_ms = self.last_ms


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one with dotted keys; values are text, other containers JSON."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat

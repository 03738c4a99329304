"""From the spool's lines to what MLflow is asked: a pure function, so that every sending of a spool leaves the same.

A point is (key, step, time of its line, value). MLflow's stores keep one of equal points, so that what is sent once more, after
a reply that was lost, adds nothing.
"""

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Self

from cromss_dist.errors import StorageError

_MAX_KEY, _MAX_NAME, _MAX_PARAM, _MAX_TAG = 250, 500, 6000, 5000  # characters that MLflow takes


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
    status: str | None = None  # RUNNING, FINISHED, FAILED or KILLED
    end_ms: int | None = None  # of a run that has ended


@dataclass
class Fold:
    """Turns the lines of a spool, in order, into requests. What it gives depends on nothing but the lines before.

    Of a step that was computed twice, since the run was cut and went on from a checkpoint, the first value of each key counts,
    and the tag `recomputed_steps` names it. Of a parameter the first value counts, since MLflow changes none; a later one goes to
    the tag `resumed/<key>`. Infinities become NaN, since MLflow would store 1.8e308, which no plot survives; the first value of a
    key that is not finite is noted in the tag `nonfinite/<key>`. Names that MLflow refuses are changed (`name_for_mlflow`).

    What it knows of the lines before is JSON, too, so that a start need not read them again.
    """

    run: RunName | None = None
    status: str = "RUNNING"
    last_ms: int = 0  # time of the last line
    registrations: dict[str, Registration] = field(default_factory=dict)  # by model, the last of each
    params: dict[str, str] = field(default_factory=dict)
    last_step: dict[str, int] = field(default_factory=dict)
    nonfinite: list[str] = field(default_factory=list)
    progress: int = 0  # the largest step
    recomputed: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """From what `state` gave.

        Raises:
            TypeError, KeyError, AttributeError: it gave something else.
        """
        run = RunName(**state["run"])
        return cls(**{**state, "run": run, "registrations": {m: Registration(**r) for m, r in state["registrations"].items()}})

    def state(self) -> dict[str, Any]:
        """What it knows, as JSON."""
        return asdict(self)

    def add(self, lines: Iterable[Mapping[str, Any]]) -> Requests:
        """What the next lines of the spool ask for.

        Raises:
            StorageError: a line is not as it was written; what follows it needs another Fold.
        """
        requests = Requests()
        for line in lines:
            try:
                self.last_ms = max(int(line["time"] * 1000), 0)
                getattr(self, f"_on_{line['event']}", lambda *_: None)(line, requests)
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise StorageError(
                    f"The spool was damaged: {str(line)[:120]!r} is not as it was written. Take that line out, and run it again."
                ) from error
        requests.tags = {name_for_mlflow(key): text_for_mlflow(str(value), _MAX_TAG) for key, value in requests.tags.items()}
        return requests

    def _on_run(self, line: Mapping[str, Any], requests: Requests) -> None:
        experiment = text_for_mlflow(line["experiment"], _MAX_NAME)
        self.run = RunName(line["run"], text_for_mlflow(line["name"], _MAX_NAME), experiment, self.last_ms)

    def _on_attempt(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.tags["attempts"] = str(line["number"])
        if line["step"] < self.progress:
            self.recomputed.append(f"{line['step'] + 1}-{self.progress}")
            requests.tags["recomputed_steps"] = ", ".join(self.recomputed)
        self.status = requests.status = "RUNNING"
        requests.end_ms = None

    def _on_params(self, line: Mapping[str, Any], requests: Requests) -> None:
        for key, value in flatten(line["values"]).items():
            key, value = name_for_mlflow(key), text_for_mlflow(value, _MAX_PARAM)
            if key not in self.params:
                self.params[key] = requests.params[key] = value
            elif self.params[key] != value:
                requests.tags[f"resumed/{key}"] = value

    def _on_tags(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.tags |= line["values"]

    def _on_dataset(self, line: Mapping[str, Any], requests: Requests) -> None:
        name, source = text_for_mlflow(line["name"], _MAX_NAME), text_for_mlflow(line["source"], _MAX_PARAM)
        requests.datasets.append(DatasetUse(name, line["digest"], source))
        # MLflow takes few signs in the name of a tag.
        requests.tags[f"dataset/{re.sub(r'[^A-Za-z0-9_.: -]', '_', line['name'])}"] = line["digest"]

    def _on_progress(self, line: Mapping[str, Any], requests: Requests) -> None:
        self.progress = max(self.progress, line["step"])
        self._add_points(line["metrics"] | {"train/samples": line["samples"]}, line["step"], requests)

    def _on_validation(self, line: Mapping[str, Any], requests: Requests) -> None:
        self._add_points(line["metrics"], line["step"], requests)

    def _add_points(self, metrics: Mapping[str, float], step: int, requests: Requests) -> None:
        for key, value in metrics.items():
            key = name_for_mlflow(key)
            if step <= self.last_step.get(key, -1):
                continue
            self.last_step[key] = step
            number = _float(value)
            if not math.isfinite(number) and key not in self.nonfinite:
                self.nonfinite.append(key)
                requests.tags[f"nonfinite/{key}"] = f"{number} at step {step}"
            requests.points.append(Point(key, number if math.isfinite(number) else math.nan, self.last_ms, step))

    def _on_artifact(self, line: Mapping[str, Any], requests: Requests) -> None:
        requests.artifacts[line["artifact"]] = line["path"]

    def _on_register(self, line: Mapping[str, Any], requests: Requests) -> None:
        self.registrations[line["model"]] = Registration(line["package"], line["card"], line["model"], line["alias"])

    def _on_end(self, line: Mapping[str, Any], requests: Requests) -> None:
        if line["error"]:
            requests.tags["error"] = line["error"]
        self.status = requests.status = line["status"]
        requests.end_ms = self.last_ms


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer above all floats
        return math.inf


@lru_cache(1 << 12)
def name_for_mlflow(name: str) -> str:
    """The name of a parameter, tag or curve as MLflow takes it; one that has to change ends with a digest, as no other does."""
    clean = posixpath.normpath(re.sub(r"[^\w/.\- :]", "_", name)).lstrip("./")
    if clean == name and 0 < len(name) <= _MAX_KEY:
        return name
    return f"{clean[:200]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def text_for_mlflow(text: str, most: int) -> str:
    """Text as databases take it, of at most so many characters: file names may hold bytes that are no text."""
    return text[:most].replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one with dotted keys; values are text, other containers JSON."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat

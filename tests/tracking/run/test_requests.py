"""The fold: what a spool asks of MLflow is a function of its lines, however they are cut into readings."""

import json
import math
import random
from typing import Any

from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag

from cromss_dist.tracking.run.requests import DatasetUse, Fold, Registration, flatten
from cromss_dist.tracking.store import connect


def line(event: str, time: float = 1.0, **values: Any) -> dict[str, Any]:
    return {"event": event, "time": time, **values}


def progress(step: int, value: float, time: float = 1.0) -> dict[str, Any]:
    return line("progress", time, step=step, samples=4 * step, metrics={"loss": value})


RUN = [
    line("stage", text="waiting for machines"),
    line("run", run="a" * 32, name="n", experiment="e"),
    line("attempt", number=1, step=0),
    line("tags", values={"world_size": "2"}),
    line("params", values={"engine": {"micro": 2}, "seed": 0}),
    line("dataset", name="données (1)+2%", digest="f" * 64, source="/shards"),
    *(progress(step, float(step), 10.0 + step) for step in range(1, 9)),
    line("validation", 19.0, step=8, samples=32, metrics={"val/loss": 0.5}),
    line("attempt", number=2, step=5),
    line("tags", values={"world_size": "4"}),
    line("params", values={"engine": {"micro": 4}, "seed": 0, "new": [1, 2]}),
    *(progress(step, -float(step), 20.0 + step) for step in range(6, 12)),
    line("validation", 39.0, step=8, samples=32, metrics={"val/loss": -0.5}),
    line("artifact", path="panels/a.png", artifact="panels/a.png"),
    line("register", package="encoders/s2", card="c" * 64, model="m", alias="candidate"),
    line("end", 40.0, status="FINISHED", error=None),
    line("an event of a later version"),
]


def asked(lines: list[dict[str, Any]], cuts: list[int]) -> tuple[Any, ...]:
    """What all readings together ask for."""
    fold, every = Fold(), []
    for start, stop in zip([0, *cuts], [*cuts, len(lines)], strict=True):
        every.append(fold.add(lines[start:stop]))
        if fold.run is not None:  # as a start that finds a watermark does
            fold = Fold.of(json.loads(json.dumps(fold.state())))
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    artifacts: dict[str, str] = {}
    for requests in every:
        assert not params.keys() & requests.params.keys(), "MLflow changes no parameter"
        params |= requests.params
        tags |= requests.tags
        artifacts |= requests.artifacts
    points = [(point.key, point.step, point.value, point.time_ms) for requests in every for point in requests.points]
    statuses = [requests.status for requests in every if requests.status]
    others = [*(use for requests in every for use in requests.datasets), *fold.registrations.values()]
    return fold.run, params, tags, points, artifacts, others, statuses[-1]


def test_a_run_becomes_requests() -> None:
    run, params, tags, points, artifacts, others, status = asked(RUN, [])
    assert (run.run, run.name, run.experiment, run.time_ms) == ("a" * 32, "n", "e", 1000)
    assert params == {"engine.micro": "2", "seed": "0", "new": "[1, 2]"}
    assert tags == {
        "attempts": "2",
        "world_size": "4",
        "resumed/engine.micro": "4",
        "recomputed_steps": "6-8",
        "dataset/donn_es _1__2_": "f" * 64,
    }
    assert [point for point in points if point[0] == "loss"] == [
        *(("loss", step, float(step), 10_000 + 1000 * step) for step in range(1, 9)),
        *(("loss", step, -float(step), 20_000 + 1000 * step) for step in range(9, 12)),
    ], "of a step that was computed twice the first value"
    assert [point for point in points if point[0] == "val/loss"] == [("val/loss", 8, 0.5, 19_000)]
    assert [point[:3] for point in points if point[0] == "train/samples"] == [
        ("train/samples", step, 4.0 * step) for step in range(1, 12)
    ]
    assert artifacts == {"panels/a.png": "panels/a.png"}
    assert others == [
        DatasetUse("données (1)+2%", "f" * 64, "/shards"),
        Registration("encoders/s2", "c" * 64, "m", "candidate"),
    ]
    assert status == "FINISHED"


def test_what_is_asked_does_not_depend_on_when_it_is_read() -> None:
    whole = asked(RUN, [])
    draws = random.Random(0)
    for _ in range(50):
        assert asked(RUN, sorted(draws.sample(range(1, len(RUN)), draws.randrange(1, 8)))) == whole


def test_non_finite_values_become_nan_and_the_first_is_noted() -> None:
    lines = [progress(step, value) for step, value in enumerate((1.0, math.inf, math.nan, -math.inf))]
    requests = Fold().add(lines)
    values = [point.value for point in requests.points if point.key == "loss"]
    assert values[0] == 1.0
    assert all(math.isnan(value) for value in values[1:])
    assert requests.tags["nonfinite/loss"] == "inf at step 1"


def test_a_run_that_goes_on_after_its_end_is_running() -> None:
    end = line("end", 5.0, status="FAILED", error="ValueError: no")
    fold = Fold()
    requests = fold.add([*RUN[:3], end])
    assert (requests.status, requests.end_ms, requests.tags["error"]) == ("FAILED", 5000, "ValueError: no")
    requests = fold.add([line("attempt", number=2, step=0)])
    assert (requests.status, requests.end_ms, fold.status) == ("RUNNING", None, "RUNNING")


def test_values_are_no_longer_than_mlflow_takes() -> None:
    requests = Fold().add([line("params", values={"a": "x" * 10_000}), line("tags", values={"b": "x" * 10_000})])
    assert (len(requests.params["a"]), len(requests.tags["b"])) == (6000, 5000)


def test_what_mlflow_refuses_is_changed_and_stays_apart(store_uri: str) -> None:
    """Names and text as file names and users may have them; a refusal would hold up all that comes after it."""
    names = ["a b", "IoU #1", "IoU %1", "x" * 251, "x" * 252, "a//b", "../a", "/a", "", ".", "é", "a\n", "a\0", "\udcff", "a/"]
    lines = [
        *RUN[:3],
        line("params", values={name: f"{name}\0\udcff" for name in names} | {f"p{n}": "v" for n in range(250)}),
        line("tags", values={f"t {name}": f"{name}\0\udcff" for name in names} | {f"t{n}": "v" for n in range(250)}),
        line("progress", -5.0, step=1, samples=4, metrics={name: float(n) for n, name in enumerate(names)}),
        line("progress", step=2, samples=10**400, metrics={"huge": 1.7e308, "tiny": 5e-324, "no number": -math.inf}),
        line("dataset", name="d" * 600, digest="f" * 64, source="s" * 70_000),
    ]
    fold = Fold()
    requests = fold.add(lines)
    keys = {point.key for point in requests.points} - {"huge", "tiny", "no number", "train/samples"}
    assert len(keys) == len(names)
    assert {"a b", "é"} <= keys, "what it takes stays"
    assert Fold.of(json.loads(json.dumps(fold.state()))) == fold
    client = connect(store_uri)
    run_id = client.create_run("0").info.run_id
    client.log_batch(
        run_id,
        [Metric(point.key, point.value, point.time_ms, point.step) for point in requests.points],
        [Param(key, value) for key, value in requests.params.items()],
        [RunTag(key, value) for key, value in requests.tags.items()],
    )
    (use,) = requests.datasets
    client.log_inputs(run_id, [DatasetInput(Dataset(use.name, "f", "local", use.source))])
    data = client.get_run(run_id).data
    assert len(data.params) == len(names) + 250
    assert data.metrics.keys() == {point.key for point in requests.points}


def test_nested_parameters_get_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": True}, "e": [1, 2]}) == {"a.b.c": "1", "a.d": "true", "e": "[1, 2]"}

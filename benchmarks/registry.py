"""What each verb of the registry takes, at 1, 100 and 5,000 versions of one model, against bare calls of MLflow's client.

    python -m benchmarks.registry OUT [--stores sqlite postgres server] [--versions 1 100 5000] [--repeats 20]

Stores: sqlite and postgres are opened directly; server is `mlflow server` over PostgreSQL on loopback, server-sqlite over SQLite.
PostgreSQL waits for the disk at each commit. One package is registered; the other versions are copies of its rows, of another
version number and evidence, inserted by SQL: that is not what is measured. The alias has as many moves as there are versions.

Every call is made a few times first, since the first one opens connections. A table of medians and 90th percentiles goes to
stdout, all to OUT as JSON.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import sqlalchemy
from mlflow import MlflowClient

from cromss_dist.encoders.golden import package_encoder
from cromss_dist.models.encoder import build_encoder, stage_channels
from cromss_dist.schema import NORMALISATION, S2_BANDS
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.package.folder import read_package, write_package
from cromss_dist.tracking.registry.aliases import history, promote, reinstate, retire, rollback
from cromss_dist.tracking.registry.cache import Cache
from cromss_dist.tracking.registry.check import check
from cromss_dist.tracking.registry.lineage import difference, trace
from cromss_dist.tracking.registry.query import Query, find
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import artifact_root, initialise_store
from tests.servers import MlflowServer, Postgres

NAME = "cromss-resnet18-s2"
STORES = ("sqlite", "postgres", "server-sqlite", "server")
WARM_UP = 2
BUDGET_S = (
    20.0  # of a call; slow ones are repeated less often, at least MIN_REPEATS times, those that take more by themselves not
)
MIN_REPEATS = 3
CHUNK = 500  # rows of an INSERT

Call = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """A store: what clients are given, the database behind it, and where its artifacts go if clients must say."""

    uri: str
    database: str
    artifacts: str | None


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Place]:
    """A new, empty store."""
    with ExitStack() as stack:
        if kind.endswith("sqlite"):
            database = f"sqlite:///{folder / 'mlflow.db'}"
            initialise_store(database)
        else:
            database = stack.enter_context(Postgres(durable=True)).store()
        if kind.startswith("server"):
            uri = stack.enter_context(MlflowServer(folder / "server", database)).uri
            yield Place(uri, database, None)
        else:
            root = artifact_root(database) or folder / "artifacts"
            yield Place(database, database, root.as_uri())


def write_encoder(folder: Path) -> Path:
    """A package of a small encoder with random weights."""
    encoder = build_encoder("resnet18", 3, len(S2_BANDS))
    channels, strides = stage_channels(encoder)
    card = EncoderCard(
        modality="s2", bands=S2_BANDS, normalisation=NORMALISATION["s2"], encoder="resnet18", depth=3, in_channels=len(S2_BANDS),
        out_channels=channels, strides=strides, method="cromss", fusion="middle", dataset="benchmark", patch_px=256,
        config_digest="c" * 64, manifest_digest="d" * 64, run_id="0" * 32, git_revision="e" * 40, versions={},
        licence="Apache-2.0", metrics={f"val/iou_s2/{number}": 0.5 for number in range(9)}, evidence=(measured(0.5),),
    )  # fmt: skip
    package_encoder(folder, encoder, card)
    return folder


def measured(value: float) -> Evidence:
    """A figure to search for."""
    return Evidence("dw", "miou", "frozen", value, value - 0.01, value + 0.01, "benchmark", manifest_digest="f" * 64)


def fill(database: str, missing: int) -> int:
    """Copies version 1, with its tags and its alias's move, to so many new versions; returns the number of the last."""
    engine = sqlalchemy.create_engine(database)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine, only=["model_versions", "model_version_tags", "registered_model_tags"])
    versions, tags, model_tags = (
        tables.tables[name] for name in ("model_versions", "model_version_tags", "registered_model_tags")
    )
    with engine.begin() as connection:

        def copies_of(table: sqlalchemy.Table) -> list[dict[str, Any]]:
            found = connection.execute(table.select().where(table.c.version == 1, table.c.name == NAME))
            return [dict(row) for row in found.mappings()]

        (version,), own_tags = copies_of(versions), copies_of(tags)
        workspace = {"workspace": version["workspace"]} if "workspace" in version else {}
        # MLflow keeps the rows of deleted versions and never gives their numbers again.
        top = connection.execute(sqlalchemy.select(sqlalchemy.func.max(versions.c.version))).scalar_one()
        first, last = top + 1, top + missing
        for start in range(first, last + 1, CHUNK):
            numbers = range(start, min(start + CHUNK, last + 1))
            connection.execute(versions.insert(), [version | {"version": number} for number in numbers])
            evidence = {number: measured(0.3 + number % 500 / 1000).to_json() for number in numbers}
            rows = [
                tag | {"version": n, "value": evidence[n] if tag["key"].startswith("evidence/") else tag["value"]}
                for n in numbers
                for tag in own_tags
            ]
            connection.execute(tags.insert(), rows)
            moves = {n: {"from": n - 1, "to": n, "who": "benchmark", "reason": "register", "why": ""} for n in numbers}
            connection.execute(
                model_tags.insert(),
                [workspace | {"name": NAME, "key": f"history/candidate/{n}", "value": json.dumps(m)} for n, m in moves.items()],
            )
    engine.dispose()
    return int(last)


def verbs(registry: Registry, bare: MlflowClient, package: Path, run_id: str, last: int, scratch: Path) -> dict[str, Call]:
    """Every call that is timed, 'mlflow: ...' being the client's own. Those that change something leave it as it was found."""
    own, alias = f"{NAME}/{last}", f"{NAME}@candidate"
    other = f"{NAME}/{max(last - 1, 1)}"
    cache, number = Cache(registry.uri, scratch / "cache"), count()
    cache.get(own)
    narrow = "tags.`verified` = 'true' AND tags.`modality` = 's2'"
    source = f"{bare.get_run(run_id).info.artifact_uri}/x"

    def pulled() -> None:
        shutil.rmtree(registry.pull(own, scratch / "pulled"))

    def registered() -> None:
        folder = scratch / f"new-{next(number)}"
        content = read_package(package)
        write_package(folder, replace(content, card=replace(content.card, run_id=str(time.time_ns()))))
        start = time.perf_counter()
        entry = registry.register(folder, NAME, run_id, alias="scratch")
        told = time.perf_counter() - start
        registry.client.delete_model_version(NAME, str(entry.version))
        shutil.rmtree(folder)
        raise OwnTimeError(told)

    def bare_registered() -> None:
        start = time.perf_counter()
        bare.log_artifacts(run_id, str(package), f"encoders/bare-{next(number)}")
        made = bare.create_model_version(NAME, source, run_id=run_id, await_creation_for=0)
        bare.set_registered_model_alias(NAME, "scratch", str(made.version))
        told = time.perf_counter() - start
        bare.delete_model_version(NAME, str(made.version))
        raise OwnTimeError(told)

    def every_version() -> int:
        found, token = 0, None
        while True:
            page = bare.search_model_versions(page_token=token)
            found, token = found + len(page), page.token
            if not token:
                return found

    calls: dict[str, Call] = {
        "look-up by alias": partial(registry.resolve, alias),
        "mlflow: by alias": partial(bare.get_model_version_by_alias, NAME, "candidate"),
        "look-up by version": partial(registry.resolve, own),
        "mlflow: by version": partial(bare.get_model_version, NAME, str(last)),
        "list": registry.list,
        "mlflow: all versions": every_version,
        "find: bands, evidence, sorted": partial(
            find, registry, Query(modality="s2", bands=S2_BANDS, at_least={"dw.miou": 0.6}, sort="dw.miou", limit=5)
        ),
        "mlflow: by two tags": partial(bare.search_model_versions, narrow),
        "show (card)": partial(registry.card, own),
        "diff": partial(difference, registry, own, other),
        "trace": partial(trace, registry, own),
        "pull": pulled,
        "mlflow: download": partial(_downloaded, bare, run_id, registry.resolve(own).source),
        "pull, in the cache": partial(cache.get, own),
        "pull, offline": partial(cache._kept, own),  # without its line in the log
        "register": registered,
        "mlflow: upload, create, alias": bare_registered,
        "promote": lambda: (promote(registry, own, "bench"), promote(registry, other, "bench")),
        "history": partial(history, registry, alias),
        "evidence": partial(registry.add_evidence, own, measured(0.5)),
        "mlflow: set a tag": partial(bare.set_model_version_tag, NAME, str(last), "bench", "1"),
        "check": partial(check, registry),
    }
    if last > 1:
        promote(registry, other, "bench")
        calls["promote and roll back"] = lambda: (promote(registry, own, "bench"), rollback(registry, f"{NAME}@bench"))
        calls["retire and take back"] = lambda: (retire(registry, f"{NAME}/1", "bench"), reinstate(registry, f"{NAME}/1"))
    return calls


class OwnTimeError(Exception):
    """Not an error: carries the seconds that a call has taken of its own part, without making and clearing up."""


def timed(call: Call, repeats: int) -> list[float]:
    """Seconds of each call, after warming up."""
    seconds: list[float] = []
    deadline = time.perf_counter() + BUDGET_S
    while len(seconds) < repeats + WARM_UP:
        if len(seconds) >= MIN_REPEATS + WARM_UP and time.perf_counter() > deadline:
            break
        start = time.perf_counter()
        try:
            call()
            seconds.append(time.perf_counter() - start)
        except OwnTimeError as own:
            seconds.append(own.args[0])
        if seconds[-1] > BUDGET_S:
            return seconds[-1:]
    return seconds[WARM_UP:]


def measure(kind: str, numbers: Sequence[int], repeats: int, package: Path) -> Iterator[dict[str, Any]]:
    """Rows of results for one store."""
    with tempfile.TemporaryDirectory() as folder, opened(kind, Path(folder)) as place:
        bare = MlflowClient(place.uri, place.uri)
        run_id = bare.create_run(bare.create_experiment("bench", artifact_location=place.artifacts)).info.run_id
        registry = Registry(place.uri)
        registry.register(package, NAME, run_id)
        there = last = 1
        for number in sorted(numbers):
            if number > there:
                last = fill(place.database, number - there)
                bare.set_registered_model_alias(NAME, "candidate", str(last))
                there = number
            scratch = Path(folder) / f"scratch-{number}"
            scratch.mkdir()
            for name, call in verbs(registry, bare, package, run_id, last, scratch).items():
                seconds = timed(call, repeats)
                ordered = sorted(seconds)
                yield {
                    "store": kind, "versions": number, "call": name, "repeats": len(seconds),
                    "median_ms": 1000 * statistics.median(seconds), "p90_ms": 1000 * ordered[int(0.9 * (len(ordered) - 1))],
                }  # fmt: skip


def _downloaded(bare: MlflowClient, run_id: str, source: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        bare.download_artifacts(run_id, source[source.index("encoders/") :], scratch)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--versions", nargs="+", type=int, default=[1, 100, 5000])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        package = write_encoder(Path(folder) / "package")
        print(f"{'store':14} {'versions':>8}  {'call':32} {'median ms':>10} {'p90 ms':>10} {'n':>4}")
        for kind in options.stores:
            for row in measure(kind, options.versions, options.repeats, package):
                results.append(row)
                figures = f"{row['median_ms']:10.1f} {row['p90_ms']:10.1f} {row['repeats']:4}"
                print(f"{row['store']:14} {row['versions']:8}  {row['call']:32} {figures}", flush=True)
                options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()

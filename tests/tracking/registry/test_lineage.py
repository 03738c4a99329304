import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cromss_dist.tracking.registry.lineage import difference, trace
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import sqlite_path
from tests.tracking.registry.conftest import NAME, MakePackage, measured

DIGEST = "d" * 64  # of the card's manifest


@pytest.fixture
def whole(registry: Registry, run_id: str, make_package: MakePackage, tmp_path: Path) -> Registry:
    """Version 2 has all that a version can have behind it."""
    from mlflow.entities import Dataset, DatasetInput

    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text(json.dumps({"digest": DIGEST}))
    client = registry.client
    dataset = Dataset("shards", DIGEST[:36], "local", json.dumps({"uri": str(shards)}))
    client.log_inputs(run_id, [DatasetInput(dataset, [])])
    client.log_text(run_id, "seed: 1", "config.yaml")
    for key, value in (("dataset/shards", DIGEST), ("config_digest", "c" * 64), ("cromss.run", "0" * 32)):
        client.set_tag(run_id, key, value)
    archive = {f"{DIGEST}.kind": "SSL4EO-S12", f"{DIGEST}.layout": "lmdb"}
    registry.register(make_package("whole", archive=archive), NAME, run_id)
    return registry


def stops(registry: Registry) -> dict[str, bool]:
    return {hop.stop: hop.found for hop in trace(registry, f"{NAME}/2")}


def test_a_trace_leads_from_the_version_to_the_archive(whole: Registry, run_id: str) -> None:
    hops = {hop.stop: hop for hop in trace(whole, f"{NAME}@candidate")}
    assert [(stop, hop.found) for stop, hop in hops.items()] == [
        (stop, True) for stop in ("version", "package", "run", "config", "dataset", "archive")
    ]
    assert hops["run"].facts["run_id"] == run_id
    assert hops["dataset"].facts["digest"] == DIGEST  # whole, although MLflow cuts it
    assert hops["archive"].facts == {"kind": "SSL4EO-S12", "layout": "lmdb"}


def test_every_hop_that_is_missing_is_told(whole: Registry, run_id: str, tmp_path: Path) -> None:
    manifest = tmp_path / "shards" / "manifest.json"
    manifest.write_text(json.dumps({"digest": "e" * 64}))
    assert [stop for stop, found in stops(whole).items() if not found] == ["dataset"]
    manifest.write_text("{")
    assert not stops(whole)["dataset"]
    manifest.unlink()
    assert not stops(whole)["dataset"]
    whole.client.set_tag(run_id, "config_digest", "other")
    assert not stops(whole)["config"]
    whole.client.set_tag(run_id, "cromss.run", "another")
    assert not stops(whole)["run"]
    whole.client.delete_run(run_id)
    assert "mlflow runs restore" in next(hop.told for hop in trace(whole, f"{NAME}/2") if hop.stop == "run")
    shutil.rmtree(whole.resolve(f"{NAME}/2").source.removeprefix("file://"))
    assert [stop for stop, found in stops(whole).items() if not found] == ["package", "run", "config"]
    with closing(sqlite3.connect(str(sqlite_path(whole.uri)))) as database:
        database.execute("DELETE FROM runs WHERE run_uuid = ?", (run_id,))
        database.commit()
    told = {hop.stop: hop.told for hop in trace(whole, f"{NAME}/2")}
    assert "is not in the store" in told["run"]
    assert "mlflow gc" in told["package"]


def test_a_run_that_recorded_nothing_is_told(registry: Registry) -> None:
    found = {hop.stop: hop.found for hop in trace(registry, f"{NAME}/1")}
    assert [stop for stop, there in found.items() if not there] == ["config", "dataset", "archive"]


def test_an_import_leads_to_its_file(registry: Registry, run_id: str, make_package: MakePackage) -> None:
    origin = {"file": "moco.pth", "sha256": "a" * 64, "url": "", "layout": "moco"}
    registry.register(make_package("imported", origin=origin, method="moco"), NAME, run_id)
    hops = trace(registry, f"{NAME}/2")
    assert [hop.stop for hop in hops] == ["version", "package", "run", "origin"]
    assert hops[-1].facts == origin


def test_a_difference_names_the_facts_that_differ_and_no_others(
    registry: Registry, run_id: str, make_package: MakePackage
) -> None:
    other = make_package("other", licence="MIT", recipe={"loss.consistency": "mse"}, evidence=(measured(0.6),))
    registry.register(other, NAME, run_id)
    registry.add_evidence(f"{NAME}/2", measured(0.7))  # later evidence replaces the card's
    differing = {d.fact: (d.first, d.second) for d in difference(registry, f"{NAME}/1", f"{NAME}@candidate")}
    assert differing.pop("content_sha256")
    assert differing == {
        "licence": ("Apache-2.0", "MIT"),
        "recipe.loss.consistency": ("ce", "mse"),
        "evidence.dw.frozen.miou": ("", "0.7 [0.69, 0.71]"),
    }
    assert difference(registry, f"{NAME}/1", f"{NAME}:1") == ()
    folders = {d.fact for d in difference(None, str(other), str(make_package("same")))}
    assert folders == {"licence", "recipe.loss.consistency", "evidence.dw.frozen.miou", "content_sha256"}

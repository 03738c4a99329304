"""A store with runs, and registries with versions of one small encoder."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.package.folder import read_package, write_package
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import artifact_root, connect

NAME = "cromss-resnet18-s2"

MakeRun = Callable[[], str]
MakePackage = Callable[..., Path]


def new_run(uri: str) -> str:
    """MLflow's id of a new run, its artifacts beside the store."""
    client = connect(uri)
    found = client.get_experiment_by_name("cromss")
    root = artifact_root(uri)
    assert root is not None
    experiment = found.experiment_id if found else client.create_experiment("cromss", artifact_location=root.as_uri())
    return str(client.create_run(experiment).info.run_id)


def measured(value: float, half_width: float = 0.01, **facts: Any) -> Evidence:
    """A figure of 'dw.frozen.miou'."""
    facts = {"dataset": "dw", "metric": "miou", "protocol": "frozen", "source": "r", "manifest_digest": "f" * 64} | facts
    return Evidence(value=value, low=value - half_width, high=value + half_width, **facts)


@pytest.fixture(scope="session")
def template_registry(template_store: Path, encoder_package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a store whose registry has version 1 of one model, alias 'candidate'; and MLflow's id of its run."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copyfile(template_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    run_id = new_run(uri)
    Registry(uri).register(encoder_package, NAME, run_id, tags={"note": "first"})
    return folder, run_id


def copy_registry(template: tuple[Path, str], folder: Path) -> Registry:
    """A copy of a store and its one run, as if another run had made it in `folder`: MLflow remembers where a run's files are."""
    (there, its_run), run = template, uuid4().hex
    shutil.copytree(there, folder)
    its_files = folder / "artifacts" / its_run
    its_files.rename(its_files.with_name(run))
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("runs", "run_uuid"),
            ("tags", "run_uuid"),
            ("model_versions", "run_id"),
            ("model_versions", "source"),
            ("model_versions", "storage_location"),
        ):
            replaced = f"replace(replace({column}, ?, ?), ?, ?)"
            database.execute(f"UPDATE {table} SET {column} = {replaced}", (str(there), str(folder), its_run, run))
    return Registry(f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture
def registry(template_registry: tuple[Path, str], tmp_path: Path) -> Registry:
    """A registry with version 1 of one model, alias 'candidate'."""
    return copy_registry(template_registry, tmp_path / "registered")


@pytest.fixture
def run_id(registry: Registry) -> str:
    """The run of version 1 in `registry`."""
    return registry.resolve(f"{NAME}/1").run_id


@pytest.fixture
def make_package(tmp_path: Path, encoder_package: Path) -> MakePackage:
    """Makes a package of the same weights, with other facts on its card."""

    def make(folder: str, **facts: Any) -> Path:
        package = read_package(encoder_package)
        write_package(tmp_path / folder, replace(package, card=replace(package.card, **facts)))
        return tmp_path / folder

    return make

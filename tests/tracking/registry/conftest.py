"""A store with runs, and registries with versions of one small encoder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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


@pytest.fixture
def run_id(store_uri: str) -> str:
    return new_run(store_uri)


@pytest.fixture
def registry(store_uri: str, run_id: str, encoder_package: Path) -> Registry:
    """A registry with version 1 of one model, alias 'candidate'."""
    registry = Registry(store_uri)
    registry.register(encoder_package, NAME, run_id, tags={"note": "first"})
    return registry


@pytest.fixture
def make_package(tmp_path: Path, encoder_package: Path) -> MakePackage:
    """Makes a package of the same weights, with other facts on its card."""

    def make(folder: str, **facts: Any) -> Path:
        package = read_package(encoder_package)
        write_package(tmp_path / folder, replace(package, card=replace(package.card, **facts)))
        return tmp_path / folder

    return make

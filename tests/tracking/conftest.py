"""Servers for the tests of tracking and registry: started once for a session, by tests marked `slow`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.servers import MlflowServer, Postgres, postgres_lacking, server_lacking
from tests.tracking.life import OFFLINE
from tests.whole_runs import of_steps, small_run, start_folder, traced_run


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL; each test takes a `store()` or `empty_database()` of its own."""
    if reason := postgres_lacking():
        pytest.skip(reason)
    with Postgres() as running:
        yield running


@pytest.fixture(scope="session")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """An MLflow server over PostgreSQL that asks for no password; its runs and models are other tests', too."""
    if reason := server_lacking():
        pytest.skip(reason)
    with MlflowServer(tmp_path_factory.mktemp("server"), postgres.store()) as running:
        yield running


@pytest.fixture(scope="session")
def trained_runs(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two runs of two steps, which told no store; what a test sends is noted in them by its store."""
    folder = tmp_path_factory.mktemp("trained")
    config = replace(of_steps(small_run(synthetic_shards, "unused"), 2), tracking=OFFLINE)
    runs = folder / "first", folder / "second"
    for seed, run_dir in enumerate(runs):
        assert run_ranks(traced_run, 1, run_dir, start_folder(run_dir, replace(config, seed=seed))) == [0]
    return runs

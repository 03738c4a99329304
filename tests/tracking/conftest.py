"""Servers for the tests of tracking and registry: started once for a session, by tests marked `slow`."""

from collections.abc import Iterator

import pytest

from tests.servers import MlflowServer, Postgres, postgres_lacking, server_lacking


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

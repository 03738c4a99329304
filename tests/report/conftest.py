"""Folders of runs that the report's tests share. Read only."""

from pathlib import Path

import pytest

from tests.report.run_folders import panel, pretraining_run, transfer_run


@pytest.fixture(scope="session")
def pretrainings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pretraining runs of different seeds."""
    folder = tmp_path_factory.mktemp("pretrainings")
    for seed in (0, 1):
        pretraining_run(folder / f"run-{seed}", seed)
    return folder


@pytest.fixture(scope="session")
def transfers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained and a random encoder, transferred by two seeds each."""
    folder = tmp_path_factory.mktemp("transfers")
    for seed in (0, 1):
        transfer_run(folder / f"cromss-{seed}", seed=seed, skill=0.6)
        transfer_run(folder / f"random-{seed}", "", seed=seed, skill=0.4, random=True)
    panel(folder / "cromss-0" / "panels" / "test.png")
    return folder

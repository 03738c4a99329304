"""docs/loading.md: its code runs as it is shown."""

import json
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import cromss_dist.data.loading as loading
from cromss_dist.data.loading import Source, TrainLoader, TrainPlan
from cromss_dist.data.store.open import open_dataset
from cromss_dist.data.store.remote.cache import ShardCache

PAGE = Path(__file__).resolve().parents[3] / "docs" / "loading.md"


def test_the_code_of_the_page_runs(synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(synthetic_shards, tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["batch"].images["s2_10m"].shape == (4, 4, 96, 96)
    assert names["example"].images["s2"].shape == (4, 3, 64, 64)
    assert names["state"]["samples"] == names["stream"].plan.start == 8


def test_every_name_that_is_exported_is_there() -> None:
    assert all(getattr(loading, name).__name__ == name for name in loading.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loading.nothing


@pytest.mark.parametrize("remote", [False, True])
def test_workers_read_stored_datasets_as_threads_do(synthetic_shards: Path, tmp_path: Path, remote: bool) -> None:
    location = f"file://{synthetic_shards}" if remote else str(synthetic_shards)
    dataset = open_dataset(location, ShardCache(tmp_path / "cache") if remote else None)
    plan = TrainPlan(sources=[Source(dataset)], seed=1, global_batch=4, micro_batch=4)
    batches = []
    for workers in (2, 0):
        with TrainLoader(plan=plan, workers=workers) as loader:
            batches.append(list(islice(loader, 4)))
            assert json.loads(json.dumps(loader.state_dict())) == plan.state(16)
    for one, other in zip(*batches, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.labels, other.labels)
        assert all(torch.equal(one.images[name], other.images[name]) for name in one.images)

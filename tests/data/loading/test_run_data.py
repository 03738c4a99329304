from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cromss_dist.config import BatchPlan, DataConfig, FilterConfig, ReadingConfig
from cromss_dist.data.loading import run_data
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.data.loading.plan import Bands
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.data.reporting.quality import measure_location, write_csv
from cromss_dist.data.store.index import open_shards
from cromss_dist.errors import ConfigError, ShardError
from tests.data.fake_dataset import FakeDataset

BATCHES = BatchPlan(global_batch=4, micro_batch=2, accumulation_steps=1, world_size=2)


def config_of(shards: Path | dict[str, float], **changes: object) -> DataConfig:
    named = {str(name): weight for name, weight in shards.items()} if isinstance(shards, dict) else str(shards)
    return replace(DataConfig(shards=named, crop_px=64, val_fraction=0.25), **changes)  # type: ignore[arg-type]


def test_every_location_is_trained_on_or_held_out(synthetic_shards: Path) -> None:
    data = RunData.open(config_of(synthetic_shards), seed=0)
    (source,) = data.train
    assert source.selection is not None
    assert sorted([*source.selection.ids, *data.validation.ids]) == list(range(12))
    assert (data.num_train, len(data.validation.ids)) == (9, 3)


def test_a_loader_reads_what_its_rank_is_planned_to_read(synthetic_shards: Path) -> None:
    data = RunData.open(config_of(synthetic_shards, reading=ReadingConfig(threads=1)), seed=0)
    requests = data.train_plan(BATCHES, rank=1).starting_at(8).requests()
    with data.train_loader(BATCHES, rank=1, samples=8) as loader:
        assert [next(loader).sample_ids.tolist() for _ in range(9)] == [next(requests).sample_ids.tolist() for _ in range(9)]
    with data.eval_loader(BATCHES, rank=1) as scored:
        pairs = [pair for batch in scored for pair in zip(batch.sample_ids.tolist(), batch.seasons.tolist(), strict=True)]
    requests = data.eval_plan(BATCHES, rank=1).requests()
    assert pairs == [pair for r in requests for pair in zip(r.sample_ids.tolist(), r.seasons.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("bands", "arrays"),
    [
        ({"s2": ("B4", "B3", "B2")}, ["s2_10m"]),
        ({"s1": ("VH",), "s2": ("B4", "B5")}, ["s1", "s2_10m", "s2_20m"]),
        ({"s1": (), "s2": ("B1",)}, ["s2_60m"]),
        (None, ["s1", "s2_10m", "s2_20m", "s2_60m"]),
    ],
)
def test_arrays_without_a_band_that_is_wanted_are_not_read(
    synthetic_shards: Path, bands: Bands | None, arrays: list[str]
) -> None:
    data = RunData.open(config_of(synthetic_shards), seed=0)
    plan, whole = replace(data.train_plan(BATCHES), bands=bands), data.train_plan(BATCHES)
    with TrainLoader(plan=plan) as loader, TrainLoader(plan=whole) as reads_all:
        batch, expected = next(loader), next(reads_all)
    assert [spec.name for spec in batch.specs] == list(batch.images) == arrays
    for name, values in batch.images.items():
        assert torch.equal(values, expected.images[name])
    assert torch.equal(batch.labels, expected.labels)


def test_another_seed_holds_out_others(synthetic_shards: Path) -> None:
    first, second = (RunData.open(config_of(synthetic_shards), seed).validation.ids for seed in (0, 7))
    assert not np.array_equal(first, second)


def test_a_mixture_holds_out_of_each_dataset_and_numbers_them_on(synthetic_shards: Path, shards: Path) -> None:
    with pytest.raises(ConfigError, match="differ"):
        RunData.open(config_of({str(synthetic_shards): 1.0, str(shards): 1.0}), seed=0).train_plan(BATCHES)
    twin = synthetic_shards.parent / "twin"
    if not twin.exists():
        twin.symlink_to(synthetic_shards)
    data = RunData.open(config_of({str(synthetic_shards): 3.0, str(twin): 1.0}), seed=0)
    assert len(data.dataset.locations) == 24
    assert data.validation.ids.tolist() == [*data.held_out[0].ids, *(data.held_out[1].ids + 12)]
    assert len(data.eval_plan(BATCHES).pairs) == 2 * 3 * 4
    taken = [data.train_plan(BATCHES).order.stretch(start, 4).source.tolist() for start in range(0, 400, 4)]
    assert sum(map(sum, taken)) == 100, "one in four is of the second"


def test_training_draws_from_the_seasons_that_are_asked_for_and_validation_from_all(synthetic_shards: Path) -> None:
    data = RunData.open(config_of(synthetic_shards, filter=FilterConfig(seasons=(1, 3))), seed=0)
    requests = data.train_plan(BATCHES).requests()
    assert {int(season) for _ in range(40) for season in next(requests).seasons} == {1, 3}
    assert set(data.eval_plan(BATCHES).pairs[:, 1].tolist()) == {0, 1, 2, 3}
    everything = RunData.open(config_of(synthetic_shards), seed=0)
    assert np.array_equal(data.validation.ids, everything.validation.ids), "the split does not depend on seasons"


def test_a_location_of_two_datasets_is_trained_on_in_none_if_one_holds_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = {"many": FakeDataset([20, 20]), "few": FakeDataset([13]), "other": FakeDataset([16], seed=1)}
    monkeypatch.setattr(run_data, "open_dataset", lambda location, *_: datasets[location])
    data = RunData.open(replace(DataConfig(shards=dict.fromkeys(datasets, 1.0)), val_fraction=0.25), seed=0)
    trained = {source.dataset.locations[i] for source in data.train if source.selection for i in source.selection.ids}
    held_out = {data.dataset.locations[i] for i in data.validation.ids}
    assert trained | held_out == {key for dataset in datasets.values() for key in dataset.locations}
    assert not trained & held_out


def test_clouds_are_kept_out_of_training_and_validation(synthetic_shards: Path, tmp_path: Path) -> None:
    index = open_shards(synthetic_shards)
    rows = [row for i in range(len(index)) for row in measure_location(index, i)]
    shares = sorted(row.cloud_share for row in rows if row.cloud_share is not None)
    limit = shares[len(shares) // 2]
    write_csv(tmp_path / "quality.csv", rows)
    filters = FilterConfig(max_cloud_share=limit, quality=(str(tmp_path / "quality.csv"),))
    data = RunData.open(config_of(synthetic_shards, filter=filters), seed=0)
    clear = {(row.key, row.season) for row in rows if row.cloud_share is not None and round(row.cloud_share, 4) <= limit}
    scored = {(index.locations[i], season) for i, season in data.eval_plan(BATCHES).pairs.tolist()}
    requests = data.train_plan(BATCHES).requests()
    drawn = {
        (index.locations[i], season)
        for _ in range(200)
        for request in [next(requests)]
        for i, season in zip(request.sample_ids.tolist(), request.seasons.tolist(), strict=True)
    }
    assert scored
    assert drawn
    assert scored | drawn <= clear
    assert {key for key, _ in clear} == {key for key, _ in scored | drawn}


def test_a_table_for_each_dataset_is_asked_for(synthetic_shards: Path) -> None:
    filters = FilterConfig(max_cloud_share=0.5, quality=("a.csv", "b.csv"))
    with pytest.raises(ConfigError, match="2 tables for 1 datasets"):
        RunData.open(config_of(synthetic_shards, filter=filters), seed=0)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (FilterConfig(seasons=(4,)), r"data\.filter of .*: seasons=\[4\] .*0 to 3"),
        (FilterConfig(region=(0, 50, 10, 40)), r"data\.filter of .*: region=\[0, 50, 10, 40\].*south <= north"),
        (FilterConfig(max_cloud_share=0.5), r"data\.filter of .*: max_cloud_share=0\.5 needs .*quality\.csv"),
    ],
)
def test_a_wrong_filter_is_named_by_its_key_and_the_dataset(synthetic_shards: Path, filters: FilterConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunData.open(config_of(synthetic_shards, filter=filters), seed=0)
    assert str(synthetic_shards) in str(caught.value)


def test_a_dataset_of_which_nothing_is_left_to_train_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = {"many": FakeDataset([16]), "few": FakeDataset([1, 1])}  # the same keys: what the first holds out, none trains on
    monkeypatch.setattr(run_data, "open_dataset", lambda location, *_: datasets[location])
    with pytest.raises(ConfigError, match=r"Nothing of few is left to train on: all of its 2 .*val_fraction=0\.7"):
        RunData.open(DataConfig(shards=dict.fromkeys(datasets, 1.0), val_fraction=0.7), seed=3)


def test_a_kind_that_is_not_there_is_refused(synthetic_shards: Path) -> None:
    with pytest.raises(ShardError, match="cube"):
        RunData.open(config_of(synthetic_shards, reading=ReadingConfig(kind="cube")), seed=0)

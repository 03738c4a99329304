"""What surrounds a run: its folder, dry run, and how the validation is scored."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from rich.console import Console

from cromss_dist.config import DataConfig, ReadingConfig, RunConfig, TrackingConfig
from cromss_dist.errors import ConfigError, PackageError, RegistryError
from cromss_dist.parse import parse_run
from cromss_dist.pretrain.task import Pretraining
from cromss_dist.schema import S2_9
from cromss_dist.tracking.revision import git_revision
from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.store import connect
from cromss_dist.train.run.conduct import record_task, report
from cromss_dist.train.run.folder import RunSummary, new_run_dir
from cromss_dist.train.run.record import Record
from cromss_dist.train.task import Task


def test_runs_of_one_second_get_their_own_folders_with_the_resolved_config(tmp_path: Path) -> None:
    config = replace(RunConfig(), output=str(tmp_path), name="twice")
    folders = {new_run_dir(config) for _ in range(3)}
    assert len(folders) == 3
    for folder in folders:
        assert parse_run([f"--config={folder / 'config.yaml'}"]).config == config


def test_relative_paths_become_absolute_for_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig().with_absolute_paths()
    assert config.data.shards == str(tmp_path / "shards")
    assert config.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("HOME", "/home/her")
    for cache, absolute in (("cache", f"{tmp_path}/cache"), ("~/cache", "/home/her/cache"), (None, None)):
        data = replace(config.data, reading=ReadingConfig(cache=cache))
        assert replace(config, data=data).with_absolute_paths().data.reading.cache == absolute
    for uri, absolute in (
        ("sqlite:///my.db", f"sqlite:///{tmp_path}/my.db"),
        ("sqlite:////srv/my.db", "sqlite:////srv/my.db"),
        ("http://host:5000", "http://host:5000"),
    ):
        elsewhere = replace(RunConfig(), tracking=TrackingConfig(uri=uri)).with_absolute_paths()
        assert elsewhere.tracking_uri == absolute


def test_every_world_and_run_of_a_seed_has_the_same_split(synthetic_shards: Path) -> None:
    arguments = ["--data.shards", str(synthetic_shards), "--data.crop_px", "64", "--data.val_fraction", "0.25"]
    first, again = (Pretraining.of(parse_run(arguments).config, world_size=world).data for world in (1, 2))
    assert np.array_equal(first.validation.ids, again.validation.ids)
    assert (first.num_train, len(first.validation.ids)) == (9, 3)


def test_tails_make_epochs_of_whole_batches(synthetic_shards: Path) -> None:
    arguments = ["--data.shards", str(synthetic_shards), "--data.crop_px", "64", "--engine.global_batch", "4"]
    lengths = {}
    for tail in ("carry", "drop", "pad"):
        lengths[tail] = Pretraining.of(parse_run([*arguments, "--data.tail", tail]).config, world_size=2).timeline.steps_per_epoch
    assert lengths == {"carry": 11 / 4, "drop": 2, "pad": 3}


def test_the_crop_must_fit_the_patches(synthetic_shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.crop_px=256 is larger than the 96 px patches"):
        Pretraining.of(parse_run(["--data.shards", str(synthetic_shards)]).config, world_size=1)


def test_band_subsets_set_the_width_of_the_encoders(synthetic_shards: Path) -> None:
    arguments = ["--data.shards", str(synthetic_shards), "--data.crop_px", "64", "--data.s1_bands", "[VH]"]
    model = Pretraining.of(parse_run([*arguments, "--data.s2_bands", str(list(S2_9))]).config, world_size=1).build_model()
    widths = {m: next(model.encoders[m].parameters()).shape[1] for m in ("s1", "s2")}
    assert widths == {"s1": 1, "s2": 9}


def test_encoders_are_named_after_backbone_and_modality(synthetic_shards: Path) -> None:
    run = Pretraining.of(parse_run(["--data.shards", str(synthetic_shards), "--data.crop_px", "64"]).config, world_size=1)
    assert run.model_name("s2") == "cromss-resnet50-s2"


@pytest.mark.parametrize(
    ("option", "value"),
    [("alias", "latest"), ("alias", "v2"), ("alias", ""), ("alias", "a b"), ("model_prefix", "a/b"), ("model_prefix", "a" * 200)],
)
def test_encoders_that_could_not_be_registered_are_refused_before_the_run(
    synthetic_shards: Path, option: str, value: str
) -> None:
    arguments = ["--data.shards", str(synthetic_shards), "--data.crop_px", "64", f"--tracking.{option}", value]
    with pytest.raises(RegistryError, match=r"is not allowed; use letters"):
        Pretraining.of(parse_run(arguments).config, world_size=1)
    Pretraining.of(parse_run([*arguments, "--tracking.register", "false"]).config, world_size=1)


def summary(**refused: str) -> RunSummary:
    return RunSummary("/runs/r", "f" * 32, "sqlite:///s", 1, 1, 4, 1.0, {}, {}, {}, {}, refused)


def test_a_run_whose_encoders_cannot_be_registered_ends_with_that(capsys: pytest.CaptureFixture[str]) -> None:
    report(summary(), Console())
    for kind in (PackageError, RegistryError):
        with pytest.raises(kind, match=r"^m is not registered: no: why\. The run is whole .* cromss track sync /runs/r$"):
            report(summary(m=f"{kind.__name__}: no: why."), Console())
    assert "4 samples" in capsys.readouterr().out


def test_the_revision_is_a_commit_or_says_that_it_is_not_known() -> None:
    assert git_revision() == "unknown" or len(git_revision().removesuffix("+dirty")) == 40


def test_a_mixture_of_any_places_can_be_recorded(store_uri: str, tmp_path: Path) -> None:
    shards = {"https://host:8000/a": 0.7, "s3://bucket/a": 0.2, "../données+1": 0.1}
    config = replace(RunConfig(), data=DataConfig(shards=shards), output=str(tmp_path))
    folder = new_run_dir(config)
    with Record(folder) as record:
        record.begin("run", "mixture", {}, 0)
        digests = dict(zip(shards, ("a" * 64, "b" * 64, "c" * 64), strict=True))
        record_task(record, cast(Task, SimpleNamespace(config=config, datasets=digests)))
    run_id = str(deliver(folder, store_uri).run_id)
    run = connect(store_uri).get_run(run_id)
    assert json.loads(run.data.params["data.shards"]) == [[*item] for item in shards.items()]
    assert run.data.params["data.window"] == "2048"
    tags = {key: value[0] for key, value in run.data.tags.items() if key.startswith("dataset/")}
    assert tags == {"dataset/a-0": "a", "dataset/a-1": "b", "dataset/donn_es_1": "c"}
    assert [item.path for item in connect(store_uri).list_artifacts(run_id)] == ["config.yaml"]

"""Config: defaults, YAML, overrides, and the errors that name the mend."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cromss_dist.config import DataConfig, EngineConfig, RunConfig, TrainConfig, plan_batches
from cromss_dist.config.transfer import TransferConfig
from cromss_dist.errors import BatchError, ConfigError, CromssError
from cromss_dist.parse import from_dict, known_keys, parse_run, parse_run_of, write_yaml
from cromss_dist.pretrain.task import Pretraining
from cromss_dist.schema import S2_9

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))


def test_the_defaults_are_the_published_recipe() -> None:
    config = RunConfig()
    assert (config.model.encoder, config.model.fusion, len(config.data.s2_bands)) == ("resnet50", "middle", 13)
    assert (config.train.epochs, config.train.lr, config.train.weight_decay) == (200, 5e-3, 1e-8)
    assert (config.train.schedule, config.train.plateau_patience, config.train.plateau_factor) == ("plateau", 30, 0.5)
    assert (config.engine.global_batch, config.data.crop_px, config.data.val_fraction) == (128, 256, 0.01)
    assert (config.data.flip_p, config.data.rotate_p, config.data.rotate_max_deg) == (0.5, 0.2, 90)
    loss = config.loss
    assert (loss.prior, loss.prior_weight, loss.uniform_weight) == ("ts", 0.15, 0.05)
    assert (loss.keep_share, loss.ramp, loss.ramp_epochs, loss.consistency_weight) == (0.5, "exp", 80, 1)


def test_overrides_beat_yaml_and_yaml_beats_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 3\nengine: {global_batch: 16, zero_stage: 2}\n")
    (tmp_path / "b.yaml").write_text("engine: {zero_stage: 1}\n")
    arguments = [f"--config={tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml", "--engine.global_batch", "32"]
    config = parse_run([*arguments, "--data.s2_bands", "[B4,B3,B2]"]).config
    assert (config.seed, config.engine.global_batch, config.engine.zero_stage) == (3, 32, 1)
    assert config.data.s2_bands == ("B4", "B3", "B2")


def test_a_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = parse_run(["--data.s2_bands", str(list(S2_9)), "--engine.micro_batch", "4", "--train.lr", "0.001"]).config
    write_yaml(config, tmp_path / "config.yaml")
    assert parse_run([f"--config={tmp_path}/config.yaml"]).config == config
    assert from_dict(config.to_dict(), RunConfig) == config


def test_the_digest_follows_the_order_of_a_mixture_which_numbers_its_samples() -> None:
    one, other = (replace(RunConfig(), data=DataConfig(shards=shards)) for shards in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}))
    assert one.data == other.data
    assert one.digest != other.digest


def test_a_dataset_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.shards=.*named twice"):
        DataConfig(shards={"a": 0.7, "./a": 0.3})


def test_the_digest_follows_every_value() -> None:
    base = RunConfig()
    assert base.digest == RunConfig().digest
    assert parse_run(["--loss.keep_share", "0.4"]).config.digest != base.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine.globl_batch", "3"], r"Unknown config key 'engine.globl_batch'; did you mean engine.global_batch"),
        (["--engine.lr", "1"], r"'engine.lr'; did you mean train.lr\?"),
        (["--sed", "1"], r"'sed'; did you mean seed"),
        (["--seed", "x"], r'"seed": Expected a .*int.*Got value: x'),
        (["--loss.ramp", "cubic"], r"loss.ramp"),
        (["--engine.zero_stage", "7"], r"engine.zero_stage=7 is not allowed; give 0, 1, 2 or 3"),
        (["--data.crop_px", "250"], r"data.crop_px=250 is not allowed; give a multiple of 32"),
        (["--data.window", "0"], r"data.window=0 is not allowed; give at least 1"),
        (["--data.tail", "keep"], r"data.tail.*carry.*drop.*pad.*Got value: keep"),
        (["--data.tail", "pad", "--data.shards", "{a: 1, b: 1}"], r"data.tail='pad' .*set 'carry'"),
        (["--data.filter.region", "[1,2,3]"], r"data.filter.region.*4 elements"),
        (["--data.reading.threads", "0"], r"data.reading.threads=0 is not allowed; give at least 1"),
        (["--data.reading.timeout_s", ".inf"], r"data.reading.timeout_s=inf is not allowed; give more than 0, up to 1e6"),
        (["--data.reading.cache_gib", ".inf"], r"data.reading.cache_gib=inf is not allowed"),
        (["--data.reader_threads", "4"], r"'data.reader_threads'; did you mean data.reading.threads"),
        (["--data.s2_bands", "[B01]"], r"unknown \['B01'\]"),
        (["--model.decoder_channels", "[32,16]"], r"give 5 numbers"),
        (["--loss.prior_weight", "0.99"], r"add up to at most 1"),
        (["--launch.ray", "false", "--launch.workers", "2"], r"launch.ray=false runs one worker"),
        (["--train.decay_epochs", "40"], r"train.decay_epochs=40.0 is not allowed; it is of train.schedule=cosine"),
        (["--train.schedule=cosine", "--train.warmup_epochs=5", "--train.decay_epochs=5"], r"more than train.warmup_epochs"),
        (["--name", "../x"], r"name='../x' is not allowed"),
        (["--config", "nowhere.yaml"], r"does not exist"),
    ],
)
def test_a_bad_value_is_an_error_that_says_what_is_allowed(arguments: list[str], message: str) -> None:
    with pytest.raises(CromssError, match=message) as caught:
        parse_run(arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_yaml_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("engine:\n  micro_btch: 3\n")
    with pytest.raises(ConfigError, match=r"'engine.micro_btch'; did you mean engine.micro_batch"):
        parse_run([f"--config={tmp_path}/a.yaml"])


def test_a_config_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match=r"no text of UTF-8.*run\.yaml"):
        parse_run([f"--config={tmp_path / 'run.yaml'}"])


def test_a_yaml_tag_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "a.yaml").write_text(f'name: !!python/object/apply:pathlib.Path.touch ["{marker}"]\n')
    with pytest.raises(ConfigError):
        parse_run([f"--config={tmp_path}/a.yaml"])
    assert not marker.exists()


def test_a_config_imports_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.yaml").write_text("data: {class_path: evil.Config}")
    with pytest.raises(ConfigError, match="not allowed"):
        parse_run([f"--config={tmp_path}/a.yaml"])
    assert not marker.exists()


@pytest.mark.parametrize(
    "uri", ["postgresql://me:canary@host:5432/db", "https://canary@host", "postgresql://host/db?password=canary"]
)
def test_a_login_in_the_tracking_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking.uri holds a login") as caught:
        parse_run(["--tracking.uri", uri])
    assert "canary" not in str(caught.value)
    assert parse_run(["--tracking.uri", "http://host:5000"]).config.tracking.uri == "http://host:5000"


def test_keys_that_came_later_leave_the_digest_of_configs_that_do_not_use_them() -> None:
    content = RunConfig().to_dict()
    content["data"]["shards"] = [["shards", 1.0]]
    del content["train"]["decay_epochs"], content["loss"]["consistency_reliability"]
    assert RunConfig().digest == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    cosine = replace(RunConfig(), train=TrainConfig(schedule="cosine"))
    assert replace(cosine, train=replace(cosine.train, decay_epochs=40.0)).digest != cosine.digest


def test_each_kind_of_run_has_its_own_keys(tmp_path: Path) -> None:
    config = parse_run_of(TransferConfig, ["--encoder.s2", "a", "--decoder", "fpn"]).config
    assert from_dict(config.to_dict(), TransferConfig) == config
    write_yaml(config, tmp_path / "config.yaml")
    assert parse_run_of(TransferConfig, ["--resume", str(tmp_path)]).config == config
    assert "decoder" in known_keys(TransferConfig)
    assert "decoder" not in known_keys(RunConfig)
    with pytest.raises(ConfigError, match=r"'model.encoder'; did you mean encoder\? A pretraining has it: is this"):
        parse_run_of(TransferConfig, ["--encoder.s2", "a", "--model.encoder", "resnet18"])
    with pytest.raises(ConfigError, match=r"Unknown config key 'data.train'.* A transfer run has it: is this"):
        parse_run(["--resume", str(tmp_path)])


def test_every_key_is_known() -> None:
    assert {"seed", "data.crop_px", "loss.ramp_epochs", "engine.zero_stage", "launch.workers"} <= set(known_keys(RunConfig))


@pytest.mark.parametrize(
    ("engine", "world", "micro"),
    [
        (EngineConfig(global_batch=64), 4, 16),
        (EngineConfig(global_batch=64, accumulation_steps=2), 4, 8),
        (EngineConfig(global_batch=64, micro_batch=32), 2, 32),
    ],
)
def test_the_batch_is_micro_batch_times_accumulation_times_world(engine: EngineConfig, world: int, micro: int) -> None:
    plan = plan_batches(engine, world)
    assert plan.micro_batch == micro
    assert plan.micro_batch * plan.accumulation_steps * plan.world_size == plan.global_batch == 64


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            EngineConfig(global_batch=250, micro_batch=16, accumulation_steps=2),
            r"micro_batch 16 x accumulation 2 x world 8 = 256",
        ),
        (
            EngineConfig(global_batch=250),
            r"does not divide by accumulation 1 x world 8 = 8; set engine.global_batch to 248 or 256",
        ),
        (EngineConfig(global_batch=4), r"set engine.global_batch to 8, or"),
    ],
)
def test_a_batch_that_does_not_divide_names_one_that_does(engine: EngineConfig, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        plan_batches(engine, 8)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_dry_runs(path: Path, synthetic_shards: Path) -> None:
    crop = ["--data.crop_px", "64"]  # the test's patches are small
    config = parse_run([f"--config={path}", "--data.shards", str(synthetic_shards), *crop]).config
    text = Pretraining.of(config, world_size=2).describe()
    assert f"batch               {config.engine.global_batch} = micro batch {config.engine.global_batch // 2}" in text
    assert "steps per epoch" in text
    assert "encoder S2" in text


def test_the_dry_run_states_the_parameters_of_resnet50(synthetic_shards: Path) -> None:
    config = parse_run(["--data.shards", str(synthetic_shards), "--data.crop_px", "64"]).config
    counts = Pretraining.of(config, world_size=1).parameter_counts()
    # torchvision's ResNet-50 has 23,508,032 parameters without its classifier; the first convolution has 64 x 49 a band.
    assert counts.encoder_s1 == 23_508_032 - 64 * 49
    assert counts.encoder_s2 == 23_508_032 + 10 * 64 * 49

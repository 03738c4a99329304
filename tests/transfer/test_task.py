"""What is known of a transfer run before it starts, and what is refused then."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cromss_dist.config.transfer import TransferConfig
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.data.store.manifest import read_manifest, write_manifest
from cromss_dist.encoders.golden import package_encoder
from cromss_dist.errors import BandError, BatchError, ConfigError, RegistryError
from cromss_dist.models.encoder import build_encoder
from cromss_dist.parse import from_dict, parse_run_of
from cromss_dist.schema import S2_BANDS
from cromss_dist.transfer.network import build_network, load_encoders, pin_encoders
from cromss_dist.transfer.task import Transfer
from tests.conftest import MakeCard
from tests.tracking.registry.conftest import NAME, copy_registry
from tests.transfer.conftest import MakeTransfer


def test_the_defaults_are_the_papers_recipe() -> None:
    config = parse_run_of(TransferConfig, ["--encoder.s2", "name@alias"]).config
    train = config.train
    assert (train.lr, train.min_lr, train.epochs, train.decay_epochs, train.weight_decay) == (5e-4, 1e-5, 50, 40, 1e-8)
    assert (config.engine.global_batch, config.segmentation, config.decoder) == (32, ("ce", "dice"), "deeplabv3plus")


def test_every_config_that_is_found_as_a_task_is_one_and_round_trips() -> None:
    paths = sorted((Path(__file__).resolve().parents[2] / "configs" / "transfer").glob("*.yaml"))
    assert [path.stem for path in paths] == ["dfc2020", "dw", "osm"]
    for path in paths:
        config = parse_run_of(TransferConfig, ["--config", str(path), "--encoder.s2", "name@alias"]).config
        assert config.task == path.stem
        assert from_dict(config.to_dict(), TransferConfig) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "leave nothing to transfer; give the reference of an encoder"),
        (["--encoder.name", "resnet18"], "encoder.init='pretrained' is not allowed; an encoder by name has no weights"),
        (["--encoder.name", "resnet18", "--encoder.init", "random"], "needs bands to say which modality it sees"),
        (["--encoder.name", "resnet18", "--encoder.init", "random", "--encoder.s1", "x@y"], "encoder.s1 says which encoder"),
        (["--encoder.s2", "x@y", "--encoder.s1_bands", "[VV]"], "there is no encoder.s1 to feed them to"),
        (["--encoder.s2", "x@y", "--labels.fraction", "0"], r"labels.fraction=0.0 is not allowed; give a share in \(0, 1\]"),
        (["--encoder.s2", "x@y", "--labels.fraction", "0.5", "--labels.per_class", "2"], "give one of them"),
        (["--encoder.s2", "x@y", "--task", "My Task"], "task='My Task' is not allowed"),
        (["--encoder.s2", "x@y", "--train.schedule", "plateau", "--train.decay_epochs", "null"], "set it to cosine"),
        (["--encoder.s2", "x@y", "--segmentation", "[ce,ce]"], "give one or more distinct terms"),
    ],
)
def test_configs_that_say_nothing_or_too_much_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_of(TransferConfig, arguments)


def test_a_dry_run_tells_encoder_tiles_and_sizes(make_transfer: MakeTransfer) -> None:
    task = Transfer.of(make_transfer("--labels.fraction", "0.5"), world_size=1)
    told = task.describe()
    assert "resnet18, pretrained, 13 bands, frozen" in told
    assert "6 of 12 tiles of 96 px" in told
    assert task.timeline.total_steps == 3  # two epochs of six tiles
    assert task.timeline.epoch_samples == 6
    assert list(task.datasets.values()) == [task.train.digest]


def test_the_papers_protocol_drops_the_rest_of_an_epoch_and_lets_batch_norms_move(
    make_transfer: MakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cromss_dist.transfer.evaluate.PAPER_TEST_BATCH", {"dw": 5})
    config = make_transfer("--task", "dw", "--protocol", "paper", "--engine.global_batch", "5")
    task = Transfer.of(config, world_size=1)
    assert task.timeline.epoch_samples == 10
    assert len(task.test.keys) == 10
    freezes = {}
    for name, changed in {
        "paper": config,
        "default": replace(config, protocol="default"),
        "random": replace(config, protocol="default", encoder=replace(config.encoder, init="random")),
        "finetuned": replace(config, mode="finetuned"),
    }.items():
        freezes[name] = build_network(changed, load_encoders(changed), 9).freeze
    assert freezes == {"paper": "weights", "default": "all", "random": "weights", "finetuned": "none"}


def test_random_encoders_have_the_architecture_and_bands_of_the_reference(make_transfer: MakeTransfer) -> None:
    pretrained, random = (load_encoders(make_transfer("--encoder.init", init))["s2"] for init in ("pretrained", "random"))
    assert random.spec.weights is None
    assert pretrained.spec.weights is not None
    assert replace(random.spec, weights=None) == replace(pretrained.spec, weights=None)
    assert random.contract == pretrained.contract
    by_name = ("--encoder.name", "resnet18", "--encoder.depth", "3", "--encoder.s1_bands", "[VH]")
    named = load_encoders(make_transfer("--encoder.init", "random", encoder=by_name))
    assert list(named) == ["s1"]
    assert (named["s1"].bands, named["s1"].spec.depth, named["s1"].used.card_sha256) == (("VH",), 3, "")


def test_bands_are_selected_and_missing_ones_said_how(make_transfer: MakeTransfer) -> None:
    bands = ("--encoder.s2_bands", "[B8,B2]")
    encoder = load_encoders(make_transfer(*bands))["s2"]
    whole = load_encoders(make_transfer())["s2"]
    assert encoder.spec.weights is not None
    assert whole.spec.weights is not None
    selected, full = encoder.spec.weights["conv1.weight"], whole.spec.weights["conv1.weight"]
    assert torch.equal(selected, full[:, [S2_BANDS.index("B8"), S2_BANDS.index("B2")]])
    assert whole.contract is not None
    assert encoder.contract == whole.contract.select(("B8", "B2"))


def test_a_run_of_both_modalities_sees_both(make_transfer: MakeTransfer) -> None:
    arguments = (
        "--encoder.name resnet18 --encoder.init random --encoder.depth 3 --encoder.s1_bands [VV] --encoder.s2_bands [B8,B2]"
    )
    task = Transfer.of(make_transfer(encoder=arguments.split()), world_size=1)
    plan = task.train_plan(task.plan)
    assert {spec.name for spec in plan.images} == {"s1", "s2_10m"}
    with TrainLoader.of(plan, task.reading) as loader:
        example = task.example(next(loader), torch.device("cpu"))
    assert {modality: image.shape for modality, image in example.images.items()} == {"s1": (4, 1, 32, 32), "s2": (4, 2, 32, 32)}
    (logits,) = task.build_model()(*example.images.values())
    assert logits.shape == (4, 9, 32, 32)


def test_an_alias_becomes_the_version_that_it_means(
    make_transfer: MakeTransfer, template_registry: tuple[Path, str], tmp_path: Path
) -> None:
    registry = copy_registry(template_registry, tmp_path / "store")
    config = make_transfer("--tracking.uri", registry.uri, encoder=("--encoder.s2", f"{NAME}@candidate"))
    pinned = pin_encoders(config)
    assert pinned.encoder.s2 == f"{NAME}/1"
    assert pin_encoders(pinned) == pinned
    assert load_encoders(pinned)["s2"].used.version == f"{NAME}/1"
    with pytest.raises(RegistryError, match="has no alias 'none'"):
        pin_encoders(replace(config, encoder=replace(config.encoder, s2=f"{NAME}@none")))
    folder = make_transfer()
    assert pin_encoders(folder) == folder


def test_other_scales_bands_classes_and_sizes_are_refused(
    make_transfer: MakeTransfer, make_card: MakeCard, tmp_path: Path
) -> None:
    card = make_card()
    other = replace(card, normalisation=replace(card.normalisation, mean=(0.0, *card.normalisation.mean[1:])))
    package_encoder(tmp_path / "other", build_encoder("resnet18", 3, 13), other)
    with pytest.raises(
        BandError, match=r"do not scale s2 alike: the dataset is in 'reflectance.*B1 1605.58.*the encoder.*B1 0 \+-"
    ):
        Transfer.of(make_transfer(encoder=("--encoder.s2", str(tmp_path / "other"))), 1)
    with pytest.raises(BandError, match=r"is an encoder of s2; give it as encoder.s2, not encoder.s1"):
        Transfer.of(make_transfer(encoder=("--encoder.s1", str(tmp_path / "other"))), 1)
    with pytest.raises(ConfigError, match=r"data.crop_px=36 is not allowed with tiles of 96 px.*a multiple of 8 up to 96"):
        Transfer.of(make_transfer("--data.crop_px", "36"), 1)
    with pytest.raises(BatchError, match=r"engine.micro_batch to 2 or more"):
        Transfer.of(make_transfer("--decoder", "deeplabv3plus", "--engine.micro_batch", "1"), 1)
    with pytest.raises(ConfigError, match=r"evidence=True is of one pretrained encoder in the registry.*not registered"):
        Transfer.of(make_transfer("--evidence", "true"), 1)
    with pytest.raises(ConfigError, match=r"seasons=\[7\] is not allowed"):
        Transfer.of(make_transfer("--data.seasons", "[7]"), 1)
    # a test set of other classes: the same files under a manifest that says so
    config = make_transfer()
    copy = tmp_path / "renamed"
    copy.mkdir()
    for path in Path(config.data.test).iterdir():
        (copy / path.name).symlink_to(path)
    manifest = {key: value for key, value in read_manifest(copy).items() if key != "digest"}
    manifest = json.loads(json.dumps(manifest).replace('"snow"', '"ice"'))
    (copy / "manifest.json").unlink()
    write_manifest(copy, manifest)
    with pytest.raises(ConfigError, match=r"has the classes water.*snow, data.test=.*ice; give two datasets of one task"):
        Transfer.of(replace(config, data=replace(config.data, test=str(copy))), 1)

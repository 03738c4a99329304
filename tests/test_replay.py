"""`cromss replay`: computes what the ranks of a run computed, and tells a fault of the data from one of a machine."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import cromss_dist.pretrain.task
from cromss_dist.cli import main
from cromss_dist.config import BatchPlan, DataConfig, EngineConfig, LossConfig, ModelConfig, RunConfig
from cromss_dist.data.loading.augment import prepare, train_example, train_geometry
from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.loader import TrainLoader
from cromss_dist.data.loading.run_data import RunData
from cromss_dist.errors import CheckpointError, ConfigError
from cromss_dist.losses import CromssLoss
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.replay import replay
from cromss_dist.schema import MODALITIES, Example
from cromss_dist.train.safety.bundle import Bundle, Samples, write_bundle

SEEN, EPOCHS = 16, 1.5
Scope = Literal["global", "micro", "local"]


def config_of(shards: Path, scope: Scope = "global", batch_norm: Literal["global", "local"] = "global") -> RunConfig:
    return RunConfig(
        seed=5,
        data=DataConfig(shards=str(shards), crop_px=32, rotate_p=1.0),
        model=ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)),
        loss=LossConfig(scope=scope, ramp_epochs=2.0),
        engine=EngineConfig(global_batch=8, device="cpu", batch_norm=batch_norm),
    )


def model_of(config: RunConfig) -> TwoBranchUNet:
    torch.manual_seed(0)
    return TwoBranchUNet(config.model, 2, 13)


def bundle_of(config: RunConfig, plan: BatchPlan, folder: Path, weights: dict[str, torch.Tensor], **facts: Any) -> Path:
    data = RunData.open(config.data, config.seed)
    bundle = Bundle(
        reason="loss is nan",
        step=3,
        samples_seen=SEEN,
        progress_epochs=EPOCHS,
        loss=math.nan,
        grad_norm=math.nan,
        weights_of="before",
        precision="bf16",
        device="NVIDIA X",
        plan=plan,
        datasets=tuple(source.dataset.digest for source in data.train),
        samples=Samples.of(data.train_plan, plan, SEEN),
    )
    return write_bundle(folder, replace(bundle, **facts), config, weights)


def step_in_one_pass(config: RunConfig, plan: BatchPlan) -> tuple[float, float]:
    """Loss and gradient norm of the step when all activations are kept and each rank reads for itself."""
    data, model, loss = RunData.open(config.data, config.seed), model_of(config).train(), CromssLoss(config.loss)
    micro: list[list[Example]] = []  # of each rank
    for rank in range(plan.world_size):
        with TrainLoader(plan=data.train_plan(plan, rank).starting_at(SEEN)) as loader:
            batches = [next(loader) for _ in range(plan.accumulation_steps)]
        micro.append([])
        for batch in batches:
            draws = Draws(config.seed, batch.epochs.numpy(), batch.sample_ids.numpy())
            geometry = train_geometry(draws, 96, 32, 0.5, 1.0, 90.0)
            micro[-1].append(prepare(batch, geometry, config.data.s1_bands, config.data.s2_bands, "ts", "cpu"))
    every = {(r, m): micro[r][m] for m in range(plan.accumulation_steps) for r in range(plan.world_size)}
    steps = [[at for at in every if at[1] == m] for m in range(plan.accumulation_steps)]
    outputs: dict[tuple[int, int], list[torch.Tensor]] = {at: [] for at in every}
    for group in steps if config.engine.batch_norm == "global" else [[at] for at in every]:
        for branch in model(*(torch.cat([every[at].images[m] for at in group]) for m in MODALITIES)):
            for at, part in zip(group, branch.chunk(len(group)), strict=True):
                outputs[at].append(part)
    groups = {"global": [list(every)], "micro": steps, "local": [[at] for at in every]}[config.loss.scope]
    losses = []
    for group in groups:
        first, second = (torch.cat([outputs[at][branch] for at in group]) for branch in range(2))
        priors = [prior for at in group if (prior := every[at].prior) is not None]
        losses.append(loss(first, second, torch.cat([every[at].label for at in group]), torch.cat(priors), EPOCHS).total)
    total = torch.stack(losses).mean()
    torch.autograd.backward(total)
    return float(total.detach()), math.hypot(*(float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize(
    ("scope", "batch_norm", "plan"),
    [
        ("global", "global", BatchPlan(8, 8, 1, 1)),
        ("global", "global", BatchPlan(8, 2, 2, 2)),
        ("global", "local", BatchPlan(8, 2, 2, 2)),
        ("micro", "global", BatchPlan(8, 2, 2, 2)),
        ("local", "local", BatchPlan(8, 2, 1, 4)),
    ],
)
def test_a_replay_computes_loss_and_gradient_of_all_ranks(
    synthetic_shards: Path, tmp_path: Path, scope: Scope, batch_norm: Literal["global", "local"], plan: BatchPlan
) -> None:
    config = config_of(synthetic_shards, scope, batch_norm)
    loss, grad_norm = step_in_one_pass(config, plan)
    facts = {"reason": "spike: loss is high", "loss": loss, "grad_norm": grad_norm}
    bundle, found = replay(bundle_of(config, plan, tmp_path, model_of(config).state_dict(), **facts))
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(grad_norm, rel=1e-5)
    assert list(found.grad_norms) == ["encoders.s1", "encoders.s2", "decoders.shared", "heads.shared"]
    assert [sample.key for sample in found.samples] == list(bundle.samples.keys)
    assert [sample.rank for sample in found.samples] == [
        rank for rank in range(plan.world_size) for _ in range(8 // plan.world_size)
    ]
    assert found.verdict(bundle).startswith(
        "reproduces: spike: loss is high. All is finite; the sample with the largest loss is "
    )
    other = replace(bundle, loss=1.5 * loss)
    assert found.verdict(other).startswith(f"a loss of {loss:.6g} here: a fault of a machine")
    assert found.verdict(replace(other, weights_of="after")).startswith("reproduces")


PLAN = BatchPlan(8, 2, 2, 2)


def test_weights_that_are_not_finite_reproduce_and_are_named(
    synthetic_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(synthetic_shards)
    weights = model_of(config).state_dict()
    weights["encoders.s2.layer1.0.conv2.weight"][3, 1, 0, 0] = math.nan
    folder = bundle_of(config, PLAN, tmp_path, weights)
    assert main(["replay", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "reproduces: loss is nan. Weights were not finite before it: encoders.s2.layer1.0.conv2.weight." in printed
    assert "not finite: encoders.s2.layer1.0.conv2, encoders.s2.layer1.0.bn2" in printed


def test_a_sample_that_is_not_finite_reproduces_and_is_named(
    synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(synthetic_shards)
    folder = bundle_of(config, PLAN, tmp_path, model_of(config).state_dict())
    calls = []

    def spoil(*arguments: Any) -> Example:
        example = train_example(*arguments)
        calls.append(arguments[0].keys)
        if len(calls) == 3:  # the first micro batch of rank 1
            example.images["s1"][1, 0, 4, 4] = math.inf
        return example

    monkeypatch.setattr(cromss_dist.pretrain.task, "train_example", spoil)
    bundle, found = replay(folder)
    (bad,) = [sample for sample in found.samples if not sample.inputs_finite]
    assert (bad.key, bad.rank) == (calls[2][1], 1)
    assert found.verdict(bundle) == f"reproduces: loss is nan. The inputs of some samples are not finite: {bad.key}."


def test_what_is_finite_here_was_no_fault_of_the_data(
    synthetic_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(synthetic_shards)
    moved = tmp_path / "moved"
    shutil.copytree(synthetic_shards, moved)
    gone = replace(config, data=replace(config.data, shards=str(moved)))
    folder = bundle_of(gone, PLAN, tmp_path, model_of(config).state_dict())
    shutil.rmtree(moved)
    assert main(["replay", str(folder), "--data.shards", str(synthetic_shards), "--engine.precision", "bf16"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "finite here: a fault of a machine or of arithmetic (recorded on 2 x NVIDIA X, bf16; here cpu, bf16), not of the data."
        in printed
    )


def test_a_gradient_that_is_not_finite_reproduces_and_its_layer_is_named(
    synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(synthetic_shards)

    def break_gradient(model: TwoBranchUNet) -> tuple[str, ...]:
        weight = model.get_parameter("heads.shared.0.weight")
        weight.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
        return ()

    monkeypatch.setattr(cromss_dist.replay, "recompute_activations", break_gradient)
    folder = bundle_of(config, PLAN, tmp_path, model_of(config).state_dict(), reason="gradient is not finite", loss=3.0)
    bundle, found = replay(folder, ["--engine.activation_checkpointing", "true"])
    assert found.verdict(bundle) == (
        "reproduces: gradient is not finite. The logits are finite; the first gradient that is not: heads.shared.0.weight."
    )


@pytest.mark.parametrize("flag", ["--dry-run", "--resume=runs/x", "--resume", "--fresh", "--profile"])
def test_flags_of_a_run_are_refused(synthetic_shards: Path, tmp_path: Path, flag: str) -> None:
    config = config_of(synthetic_shards)
    folder = bundle_of(config, PLAN, tmp_path, model_of(config).state_dict())
    with pytest.raises(ConfigError, match=f"cromss replay does not take {flag.partition('=')[0]}: it computes one step"):
        replay(folder, ["--engine.device", "cpu", flag])


def test_other_data_and_another_order_are_refused(synthetic_shards: Path, tmp_path: Path) -> None:
    config = config_of(synthetic_shards)
    weights = model_of(config).state_dict()
    with pytest.raises(ConfigError, match="is not what the step read"):
        replay(bundle_of(config, PLAN, tmp_path, weights, datasets=("b" * 64,)))
    folder = bundle_of(config, PLAN, tmp_path, weights)
    with pytest.raises(ConfigError, match="this config reads other samples than the step did"):
        replay(folder, ["--seed", "6"])
    with pytest.raises(ConfigError, match=r"Unknown config key 'engine\.rate'"):
        replay(folder, ["--engine.rate", "1"])
    with pytest.raises(CheckpointError, match="weights of another model"):
        replay(folder, ["--model.fusion", "late"])

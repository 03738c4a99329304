"""DeepSpeed steps of any ZeRO stage against plain torch, on real ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cromss_dist.config import EngineConfig, LossConfig, plan_batches
from cromss_dist.losses import CromssLoss
from cromss_dist.train.step.engine import deepspeed_config, resolve_memory_format, resolve_precision
from tests.ranks import run_ranks
from tests.train.step import engine_programs as programs
from tests.train.step.engine_programs import CLIP, STEPS, TRAIN, Normed, TwoHeads, batches, cross_entropy, flat, rate

STAGES = [0, 1, 2, 3]


def run(program: Callable[..., None], world: int, folder: Path, *args: Any) -> list[dict[str, Tensor]]:
    """What each rank wrote as rank-N.safetensors."""
    assert run_ranks(program, world, folder, *args) == [0] * world
    return [load_file(path) for path in sorted(folder.glob("rank-*.safetensors"))]


def plain_torch(accumulation: int = 1) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The oracle: one process, the whole batch in `accumulation` parts, torch's own Adam and clipping."""
    model, loss = TwoHeads(), CromssLoss(LossConfig(prior="none"))
    optimizer = torch.optim.Adam(model.parameters(), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)
    losses, norms = [], []
    for step, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        for s1, s2, label in zip(*(part.chunk(accumulation) for part in batch), strict=True):
            logits_s1, logits_s2 = model(s1, s2)
            out = loss(logits_s1, logits_s2, label, None, progress=60.0)
            (out.total / accumulation).backward()  # type: ignore[no-untyped-call]
            losses.append(float(out.total.detach()))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return model.state_dict(), losses, norms


def check_steps(result: dict[str, Tensor], weights: dict[str, Tensor], losses: list[float], norms: list[float]) -> None:
    torch.testing.assert_close(result["losses"], torch.tensor(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result["norms"], torch.tensor(norms), rtol=1e-5, atol=1e-6)
    assert weights.keys() <= result.keys()
    for key, value in weights.items():
        # Adam divides by the size of a gradient, so rounding in a tiny one moves a weight by a share of lr = 1e-2.
        torch.testing.assert_close(result[key], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_of_any_zero_stage_make_the_steps_of_plain_torch_on_the_whole_batch(zero_stage: int, tmp_path: Path) -> None:
    run(programs.cromss_steps, 2, tmp_path, zero_stage, 1, "fp32")
    oracle = plain_torch()
    assert max(oracle[2]) > CLIP, "the gradient is clipped"
    check_steps(load_file(tmp_path / "result.safetensors"), *oracle)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_accumulation_steps_once_a_global_batch_by_the_mean_gradient(zero_stage: int, tmp_path: Path) -> None:
    run(programs.cromss_steps, 1, tmp_path, zero_stage, 2, "fp32")
    check_steps(load_file(tmp_path / "result.safetensors"), *plain_torch(accumulation=2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32_and_keeps_fp32_weights(precision: str, tmp_path: Path) -> None:
    _, losses, _ = plain_torch()
    run(programs.cromss_steps, 1, tmp_path, 0, 1, precision)
    result = load_file(tmp_path / "result.safetensors")
    torch.testing.assert_close(result["losses"], torch.tensor(losses), rtol=2e-2, atol=0)
    assert result["s1.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_nan_gradient_on_one_rank_and_a_veto_leave_out_exactly_their_steps_on_all_ranks(
    zero_stage: int, tmp_path: Path
) -> None:
    ranks = run(programs.steps_with_a_bad_gradient, 2, tmp_path, zero_stage)
    for rank in ranks:
        assert rank["applied"].tolist() == [True, False, False, True]
        assert rank["finite"].tolist() == [True, False, True, True]
        assert not rank["overflow"].any()
        assert int(rank["steps"]) == 2
    model = Normed()
    optimizer = torch.optim.Adam(model.parameters(), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)
    for step, (s1, s2, label) in enumerate(batches(4)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.zero_grad()
        cross_entropy(model(s1, s2), label).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if step in (0, 3):
            optimizer.step()
        else:
            model.load_state_dict(before)  # running statistics
        for rank in ranks:
            torch.testing.assert_close(rank["weights"][step], flat(model.state_dict()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_the_scale_of_an_fp16_loss_falls_until_no_gradient_overflows_and_rises_again(zero_stage: int, tmp_path: Path) -> None:
    one, other = run(programs.scaled_steps, 2, tmp_path, zero_stage)
    assert one["finite"].all()
    for key in ("scales", "applied", "overflow", "norms"):
        assert torch.equal(one[key].nan_to_num(-1), other[key].nan_to_num(-1))
    skipped = int((~one["applied"]).sum())
    assert 1 <= skipped < 10
    assert torch.equal(one["overflow"], ~one["applied"])
    assert one["scales"].min() <= 2**16 / 2**skipped * 2, "each skipped step halves it"
    assert one["scales"][-1] > one["scales"].min()
    assert one["norms"][-1] < 10, "the norm is that of the loss, not of the scaled one"


@pytest.mark.parametrize(("zero_stage", "world"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_a_snapshot_restored_at_the_same_size_goes_on_bit_by_bit(zero_stage: int, world: int, tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    run(programs.shares, world, first, zero_stage)
    run(programs.resumed, world, second, zero_stage, first)
    assert_same(programs.load_shares(first), programs.load_shares(second))
    assert_same(load_file(first / "weights.safetensors"), load_file(second / "weights.safetensors"))
    for rank in range(world):
        assert_same(load_file(first / f"losses-{rank}.safetensors"), load_file(second / f"losses-{rank}.safetensors"))


@pytest.mark.parametrize(("of", "to"), [((0, 1), (3, 2)), ((3, 2), (1, 3)), ((1, 3), (2, 2)), ((2, 2), (0, 4))])
def test_a_snapshot_is_the_same_at_every_zero_stage_and_number_of_ranks(
    of: tuple[int, int], to: tuple[int, int], tmp_path: Path
) -> None:
    first, second = folders(tmp_path)
    run(programs.shares, of[1], first, of[0])
    run(programs.resumed, to[1], second, to[0], first)
    saved, again = programs.load_shares(first), programs.load_shares(second)
    assert {key.split("/")[0] for key in saved} == {"weights", "exp_avg", "exp_avg_sq", "buffers"}
    assert saved.keys() == again.keys()
    assert max(float((saved[key] - again[key]).abs().max()) for key in saved) == 0
    means = [torch.stack([load_file(path)["losses"] for path in folder.glob("losses-*")]).mean(0) for folder in (first, second)]
    torch.testing.assert_close(*means, rtol=1e-5, atol=0)


def test_shares_of_a_snapshot_weigh_about_the_same(tmp_path: Path) -> None:
    run(programs.shares, 3, tmp_path, 0)
    sizes = [sum(value.nbytes for value in load_file(tmp_path / f"share-{rank}.safetensors").values()) for rank in range(3)]
    assert max(sizes) <= 1.2 * min(sizes)


def test_fp16_that_goes_on_from_fp32_scales_its_loss_as_if_it_had_begun_so(tmp_path: Path) -> None:
    assert run_ranks(programs.scale_after_fp32, 1, tmp_path) == [0]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_checkpoint_of_other_networks_is_refused_before_anything_changes(zero_stage: int, tmp_path: Path) -> None:
    run(programs.shares, 1, tmp_path, 0)
    assert run_ranks(programs.refusals, 2, tmp_path, zero_stage) == [0, 0]
    told = (tmp_path / "told-0").read_text()
    assert told == (tmp_path / "told-1").read_text()
    missing, unknown, shape, half, state = told.splitlines()
    assert "1 missing (weights/s1.1.weight)" in missing
    assert "1 unknown (weights/s3.1.weight)" in unknown
    assert "1 of another shape or type (exp_avg/s1.1.weight: (9, 3, 1, 1) torch.float32)" in shape
    assert "torch.float16" in half
    assert "lacks loss_scale; start over" in state
    assert "--fresh" in missing


def folders(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    return first, second


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_switches_do_not_show_in_the_loss(tmp_path: Path) -> None:
    reference = losses_with(tmp_path, "reference", {"fused_optimizer": False, "channels_last": False})
    for name, switches, tolerance in (
        ("auto", {}, 1e-5),
        ("recomputing", {"activation_checkpointing": True}, 1e-5),
        ("recomputing-partitioned", {"activation_checkpointing": True, "zero_stage": 3}, 1e-5),
        ("bf16", {"precision": "bf16"}, 2e-2),
        ("fp16", {"precision": "fp16", "zero_stage": 2}, 2e-2),
    ):
        torch.testing.assert_close(losses_with(tmp_path, name, switches), reference, rtol=tolerance, atol=0, msg=name)


@pytest.mark.slow  # compiles with g++
@pytest.mark.parametrize("switches", [{}, {"activation_checkpointing": True, "zero_stage": 2}, {"precision": "bf16"}])
def test_compiled_networks_have_the_losses_of_others(switches: dict[str, Any], tmp_path: Path) -> None:
    plain = losses_with(tmp_path, "plain", switches)
    compiled = losses_with(tmp_path, "compiled", {**switches, "compile": True})
    torch.testing.assert_close(compiled, plain, rtol=1e-3 if "precision" in switches else 1e-5, atol=0)


def losses_with(folder: Path, name: str, switches: dict[str, Any]) -> Tensor:
    run(programs.switched_steps, 2, folder, name, switches)
    return torch.stack([load_file(folder / f"{name}-{rank}.safetensors")["losses"] for rank in range(2)])


def test_local_batch_norms_differ_until_averaged_and_global_ones_never(tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    local = run(programs.own_statistics, 2, first, "local")
    own = torch.stack([rank["own"] for rank in local])
    assert (own[0] - own[1]).abs().max() > 1e-4, "each rank saw other pixels"
    for rank in local:
        torch.testing.assert_close(rank["averaged"], own.mean(0))
    one, other = run(programs.own_statistics, 2, second, "global")
    assert torch.equal(one["own"], other["own"])
    assert torch.equal(one["own"], one["averaged"])


@pytest.mark.parametrize(("free", "recomputes"), [(1, True), (2**30, False)])
def test_activations_are_computed_again_on_all_ranks_where_they_do_not_fit_on_one(
    free: int, recomputes: bool, tmp_path: Path
) -> None:
    reference, measured = folders(tmp_path)
    expected = losses_with(reference, "reference", {"zero_stage": 3})
    ranks = run(programs.measured, 2, measured, free)
    assert [bool(rank["recomputes"]) for rank in ranks] == [recomputes] * 2
    assert [int(rank["seen"]) for rank in ranks] == [STEPS] * 2, "measuring moves no running statistics"
    torch.testing.assert_close(torch.stack([rank["losses"] for rank in ranks]), expected, rtol=1e-6, atol=0)


def test_the_dictionary_of_deepspeed_follows_the_config() -> None:
    engine = EngineConfig(global_batch=64, accumulation_steps=2, zero_stage=1, grad_clip=0.5, precision="fp16")
    content = deepspeed_config(engine, plan_batches(engine, 4))
    assert content["train_batch_size"] == 64
    assert content["train_micro_batch_size_per_gpu"] == 8
    assert content["gradient_accumulation_steps"] == 2
    assert content["zero_optimization"]["stage"] == 1
    assert content["gradient_clipping"] == 0, "the optimiser clips"
    assert not {"torch_autocast", "fp16", "bf16"} & content.keys(), "arithmetic is ours"


def test_auto_precision_is_fp32_on_a_cpu_and_bf16_on_a_gpu_only_where_it_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_precision(EngineConfig(), cpu) == "fp32"
    assert resolve_precision(EngineConfig(precision="bf16"), cpu) == "bf16"
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision(EngineConfig(), gpu) == "bf16"
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision(EngineConfig(), gpu) == "fp16"


def test_channels_come_last_on_a_gpu_unless_told_otherwise() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_memory_format(EngineConfig(), cpu) == torch.contiguous_format
    assert resolve_memory_format(EngineConfig(), gpu) == torch.channels_last
    assert resolve_memory_format(EngineConfig(channels_last=True), cpu) == torch.channels_last
    assert resolve_memory_format(EngineConfig(channels_last=False), gpu) == torch.contiguous_format

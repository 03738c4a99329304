"""DeepSpeed steps against plain torch.

Run as a script, this file is one rank of a gloo group: `test_engine.py FOLDER ZERO_STAGE ACCUMULATION PRECISION`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cromss_dist.config import BatchPlan, EngineConfig, LossConfig, TrainConfig, plan_batches
from cromss_dist.errors import ConfigError
from cromss_dist.losses import CromssLoss
from cromss_dist.train.engine import Engine, deepspeed_config, resolve_precision
from cromss_dist.world import World, join

STEPS, BATCH, CROP = 3, 8, 16
TRAIN = TrainConfig(lr=1e-2, weight_decay=1e-3)
CLIP = 0.5


class TwoHeads(nn.Module):
    """Two small branches without batch norm, so that nothing but loss and engine depends on the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.s1 = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 1))
        self.s2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 1))

    def forward(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        return self.s1(s1), self.s2(s2)


class WithNorm(TwoHeads):
    """The same and a batch norm beside it, which the forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 2, CROP, CROP, generator=generator),
            torch.rand(BATCH, 4, CROP, CROP, generator=generator),
            torch.randint(0, 9, (BATCH, CROP, CROP), generator=generator),
        )
        for _ in range(STEPS)
    ]


def rate(step: int) -> float:
    """The learning rate of a step; another one each time, as schedules have it."""
    return TRAIN.lr / (1 + step)


def plain_torch(accumulation: int = 1) -> tuple[dict[str, Tensor], list[float]]:
    """The oracle: one process, the whole batch in `accumulation` parts, torch's own Adam."""
    model, loss = TwoHeads(), CromssLoss(LossConfig(prior="none"))
    optimizer = torch.optim.Adam(model.parameters(), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)
    losses = []
    for step, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        for s1, s2, label in zip(*(part.chunk(accumulation) for part in batch), strict=True):
            logits_s1, logits_s2 = model(s1, s2)
            out = loss(logits_s1, logits_s2, label, None, progress=60.0)
            (out.total / accumulation).backward()  # type: ignore[no-untyped-call]
            losses.append(float(out.total.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model.state_dict(), losses


def run_ranks(folder: Path, world: int, *arguments: str) -> dict[str, Tensor]:
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
        }
        processes.append(subprocess.Popen([sys.executable, __file__, str(folder), *arguments], env=environment))
    try:
        assert [process.wait(240) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return load_file(folder / "result.safetensors")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_of_any_zero_stage_make_the_steps_of_plain_torch_on_the_whole_batch(zero_stage: int, tmp_path: Path) -> None:
    check_steps(run_ranks(tmp_path, 2, str(zero_stage), "1", "fp32"), *plain_torch())


def test_accumulation_steps_once_a_global_batch_by_the_mean_gradient(tmp_path: Path) -> None:
    result = run_ranks(tmp_path, 1, "0", "2", "fp32")
    assert result["stepped"].tolist() == [0, 1] * STEPS
    check_steps(result, *plain_torch(accumulation=2))


def check_steps(result: dict[str, Tensor], weights: dict[str, Tensor], losses: list[float]) -> None:
    torch.testing.assert_close(result["losses"], torch.tensor(losses), rtol=1e-5, atol=1e-6)
    assert weights.keys() <= result.keys()
    for key, value in weights.items():
        # Adam divides by the size of a gradient, so rounding in a tiny one moves a weight by a share of lr = 1e-2.
        torch.testing.assert_close(result[key], value, rtol=0, atol=2e-5)


def test_bf16_follows_fp32_and_keeps_fp32_weights(tmp_path: Path) -> None:
    _, losses = plain_torch()
    result = run_ranks(tmp_path, 1, "0", "1", "bf16")
    torch.testing.assert_close(result["losses"], torch.tensor(losses), rtol=2e-2, atol=0)
    assert result["s1.0.weight"].dtype == torch.float32


def test_the_dictionary_of_deepspeed_follows_the_config() -> None:
    engine = EngineConfig(global_batch=64, accumulation_steps=2, zero_stage=1, grad_clip=0.5)
    content = deepspeed_config(engine, plan_batches(engine, 4), "bf16")
    assert content["train_batch_size"] == 64
    assert content["train_micro_batch_size_per_gpu"] == 8
    assert content["gradient_accumulation_steps"] == 2
    assert content["zero_optimization"] == {"stage": 1}
    assert content["gradient_clipping"] == 0.5
    assert content["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "torch_autocast" not in deepspeed_config(engine, plan_batches(engine, 4), "fp32")


def test_auto_precision_on_a_cpu_is_fp32_and_fp16_is_refused() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision(EngineConfig(), cpu) == "fp32"
    assert resolve_precision(EngineConfig(precision="bf16"), cpu) == "bf16"
    with pytest.raises(ConfigError, match=r"fp16.*not supported on a CPU"):
        resolve_precision(EngineConfig(precision="fp16"), cpu)


def test_auto_precision_on_a_gpu_is_bf16_only_where_it_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision(EngineConfig(), gpu) == "bf16"
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision(EngineConfig(), gpu) == "fp16"
    with pytest.raises(ConfigError, match=r"fp16.*engine.zero_stage=1.*set engine.zero_stage to 0"):
        resolve_precision(EngineConfig(zero_stage=1), gpu)


def test_running_statistics_are_the_same_on_all_ranks_after_averaging(tmp_path: Path) -> None:
    result = run_ranks(tmp_path, 2, "0", "1", "fp32")
    own, averaged = result["own_means"], result["averaged_means"]
    assert (own[0] - own[1]).abs().min() > 0.05, "each rank saw other pixels"
    torch.testing.assert_close(averaged, own.mean(0).expand(2, 3))


def running_means(norm: nn.BatchNorm2d, world: World) -> Tensor:
    """float32 (world, 3): every rank's running means."""
    assert norm.running_mean is not None
    gathered = [torch.empty(3) for _ in range(world.size)]
    dist.all_gather(gathered, norm.running_mean)
    return torch.stack(gathered)


def main(folder: Path, zero_stage: int, accumulation: int, precision: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = join("cpu")
    config = EngineConfig(
        global_batch=BATCH,
        accumulation_steps=accumulation,
        zero_stage=zero_stage,
        grad_clip=CLIP,
        precision=precision,  # type: ignore[arg-type]
    )
    plan: BatchPlan = plan_batches(config, world.size)
    model = WithNorm()
    engine = Engine(model, config, TRAIN, plan, world)
    loss = CromssLoss(LossConfig(prior="none"), reduce_sum=world.reduce_sum, world_size=world.size)
    losses, stepped = [], []
    for step, batch in enumerate(batches()):
        engine.lr = rate(step)
        mine = [part.chunk(world.size)[world.rank] for part in batch]
        for s1, s2, label in zip(*(part.chunk(accumulation) for part in mine), strict=True):
            out = loss(*engine.forward(s1, s2), label, None, progress=60.0)
            result = engine.backward(out.total)
            losses.append(float(out.total.detach()))
            stepped.append(int(result.stepped))
    with torch.no_grad():
        model.norm.train()(torch.rand(4, 3, 5, 5) + world.rank)
    own = running_means(model.norm, world)
    engine.average_running_statistics()
    checks = {"own_means": own, "averaged_means": running_means(model.norm, world)}
    weights = {key: value for key, value in engine.state_dict().items() if not key.startswith("norm.")}
    if world.is_main:
        checks |= {"losses": torch.tensor(losses), "stepped": torch.tensor(stepped)}
        save_file(weights | checks, folder / "result.safetensors")
    dist.barrier()
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

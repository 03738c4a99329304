"""A machine whose numbers are round, and a run on it."""

from dataclasses import replace
from typing import Any

from cromss_dist.config import DataConfig, EngineConfig, ModelConfig, RunConfig
from cromss_dist.plan.machine import Line, Link, Machine, Rate
from cromss_dist.plan.work import KINDS

NONE = Line(0.0, 0.0)
MACHINE = Machine(
    name="round",
    source="a test",
    device="cuda",
    precision="fp32",
    memory_bytes=80 * 10**9,
    rates={kind: Rate(0.0, 1e-12, 0.0) for kind in KINDS},
    step_factor=1.0,
    crowding={1: 1.0},
    residual=0.0,
    prior=NONE,
    images=NONE,
    loss=NONE,
    optimizer=NONE,
    inside=Link(1e-5, 1e10),
    between=Link(1e-4, 1e9),
    tree=False,
    read_bytes_per_s=1e12,
    write_bytes_per_s=1e9,
)


def machine(**changes: Any) -> Machine:
    return replace(MACHINE, **changes)


def run(**engine: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig(crop_px=64), model=ModelConfig(encoder="resnet18"), engine=EngineConfig(**{"global_batch": 64} | engine)
    )

"""Steps, traffic and memory, by hand on a machine of round numbers."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from cromss_dist.config import plan_batches, valid_worlds
from cromss_dist.errors import BatchError
from cromss_dist.plan.collectives import Layout, Traffic, seconds_of, traffic_of
from cromss_dist.plan.machine import Line
from cromss_dist.plan.memory import memory_of, must_recompute
from cromss_dist.plan.plan import Plan, Samples, lr_advice
from cromss_dist.plan.work import Networks
from tests.plan.machines import MACHINE, machine, run


@cache
def networks() -> Networks:
    return Networks.of(run(), "fp32", many=False)


def plan(layout: Layout = Layout(1, 1), on: Any = MACHINE, samples: Samples = Samples(1280, 40), **engine: Any) -> Plan:  # noqa: B008
    return Plan.of(run(**engine), on, layout, samples, networks=networks())


def traffic(world: int, **engine: Any) -> dict[str, Traffic]:
    config = run(**engine)
    return traffic_of(config, plan_batches(config.engine, world), networks(), recomputing=False)


def test_a_step_of_one_rank_is_its_work_over_its_rates() -> None:
    step = plan().step
    assert step.parts == {"networks": pytest.approx(networks().flops(64) * 1e-12)}
    assert step.sums == {}
    assert step.total.value == pytest.approx(step.parts["networks"])


def test_every_part_of_a_machine_is_in_a_step() -> None:
    quick = plan().step.total.value
    line = Line(1.0, 0.0)
    for name in ("prior", "images", "loss", "optimizer"):
        assert plan(on=machine(**{name: line})).step.total.value == pytest.approx(quick + 1)
    assert plan(on=machine(step_factor=2.0)).step.total.value == pytest.approx(2 * quick)
    assert plan(on=machine(read_bytes_per_s=1.0)).step.parts["reading"] > 1e6
    crowded = machine(crowding={1: 1.0, 2: 3.0})
    assert plan(Layout(1, 2), crowded).step.parts["networks"] == pytest.approx(1.5 * quick)


def test_exact_accumulation_takes_a_forward_pass_more() -> None:
    one, two = plan(), plan(accumulation_steps=2)
    forward = sum(amount.flops for amount in networks().forward_of(32).values()) * 1e-12
    assert two.step.parts["second pass"] == pytest.approx(2 * forward)
    assert two.step.parts["networks"] == pytest.approx(one.step.parts["networks"])


def test_collective_calls_are_those_of_the_product() -> None:
    norms = len(networks().norm_channels)
    told = traffic(2)
    assert told["batch norms"] == Traffic(2 * norms, 2 * 16 * sum(networks().norm_channels))
    assert told["loss"] == Traffic(4, 3 * 294_912 + 66 * 8)
    assert told["gradients"] == Traffic(1, 4 * networks().parameters)
    assert "batch norms" not in traffic(2, batch_norm="local")
    assert traffic(1) == {}


@pytest.mark.parametrize(("stage", "rings"), [(0, 1.0), (1, 1.5), (2, 1.5), (3, 1.5)])
def test_zero_sends_half_as_much_again(stage: int, rings: float) -> None:
    assert traffic(4, zero_stage=stage)["gradients"].rings == rings


def test_a_ring_takes_its_hops_and_its_slowest_link() -> None:
    sent = Traffic(calls=3, bytes=4_000_000)
    inside = 3 * 2 * 3 * 1e-5 + 2 * 3 / 4 * 4e6 / 1e10
    across = 3 * 2 * 3 * 1e-4 + 2 * 3 / 4 * 4e6 / 1e9
    assert seconds_of(sent, MACHINE, Layout(1, 4)) == pytest.approx(inside)
    assert seconds_of(sent, MACHINE, Layout(2, 2)) == pytest.approx(across)
    assert seconds_of(sent, MACHINE, Layout(1, 1)) == 0


def test_a_tree_takes_the_logarithm_of_hops() -> None:
    assert seconds_of(Traffic(1, 0), machine(tree=True), Layout(4, 8)) == pytest.approx(2 * (3 * 1e-5 + 2 * 1e-4))


def test_memory_falls_by_what_a_stage_partitions() -> None:
    config, weights = run(), 4 * networks().parameters
    parts = [memory_of(config, plan_batches(config.engine, 4), networks(), stage, False, gpu=True) for stage in range(4)]
    assert [part.adam for part in parts] == [2 * weights] + [2 * weights // 4] * 3
    assert [part.gradients for part in parts] == [weights, weights, weights // 4, weights // 4]
    assert parts[3].weights - networks().buffer_bytes == weights // 4
    assert parts[0].activations == networks().activation_bytes(16, recomputing=False)


def test_activations_are_computed_again_where_they_do_not_fit() -> None:
    config = run()
    batches = plan_batches(config.engine, 1)
    kept = networks().activation_bytes(64, recomputing=False)
    assert must_recompute(config, batches, networks(), kept, gpu=True)
    assert not must_recompute(config, batches, networks(), 10 * kept, gpu=True)
    assert not must_recompute(config, batches, networks(), kept, gpu=False)
    assert must_recompute(run(activation_checkpointing=True), batches, networks(), 10 * kept, gpu=False)


def test_a_run_is_its_steps_and_validations() -> None:
    told = plan()
    assert told.timeline.total_steps == 4000
    assert told.run.value == pytest.approx(4000 * told.step.total.value + 200 * told.validation.value)
    assert told.validation.value == pytest.approx(40 / 64 / 3 * told.step.total.value)
    assert told.run.low < told.run.value < told.run.high
    assert told.device_hours.value == pytest.approx(told.run.value / 3600)
    assert told.checkpoint_bytes == 12 * networks().parameters + networks().buffer_bytes


def test_uncertainty_grows_with_the_residual_and_with_links_that_are_assumed() -> None:
    def width(told: Plan) -> float:
        return told.step.total.high / told.step.total.low

    assert width(plan(on=machine(residual=0.2))) > width(plan())
    assert width(plan(Layout(2, 1), machine(between=None))) > width(plan(Layout(2, 1)))


def test_a_world_that_does_not_divide_is_told_with_those_that_do() -> None:
    with pytest.raises(BatchError, match=r"divides over 1, 2, 4 workers, of up to 6"):
        plan(Layout(1, 3))
    assert valid_worlds(run(micro_batch=8).engine, 2, 16) == (2, 4, 8)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (lambda: plan(samples=Samples(640, 40)), "10 steps an epoch"),
        (lambda: plan(Layout(8, 8)), "micro batch of one sample"),
        (lambda: plan(Layout(4, 8)), "2 samples a rank"),
        (lambda: plan(Layout(8, 2)), "are sums over ranks"),
        (lambda: plan(on=machine(read_bytes_per_s=1.0)), "read slower"),
        (lambda: plan(on=machine(memory_bytes=10**8)), "lower engine.micro_batch"),
        (lambda: plan(Layout(1, 8), samples=Samples(1280, 40, num_shards=3)), "3 shards for 8 workers"),
        (lambda: plan(precision="bf16"), "measured in fp32"),
        (lambda: plan(Layout(2, 1), machine(between=None)), "not measured: 1.25 GB/s"),
    ],
)
def test_what_degenerates_is_flagged(told: Any, words: str) -> None:
    assert [flag for flag in told().flags if words in flag], told().flags


def test_what_is_sound_is_not_flagged() -> None:
    assert plan().flags == ()


def test_the_rate_of_another_batch_is_advice() -> None:
    assert "is the published one" in lr_advice(run(global_batch=128))
    advice = lr_advice(run(global_batch=512))
    for words in ("square-root rule gives 0.01", "linear one 0.02", "warm-up"):
        assert words in advice
    assert "warm-up" not in lr_advice(replace(run(global_batch=32)))

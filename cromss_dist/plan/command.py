"""`cromss plan` and `cromss probe`: from arguments to what is printed.

Layer 4.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import EngineConfig, RunConfig, valid_worlds
from cromss_dist.errors import ConfigError
from cromss_dist.parse import parse_run
from cromss_dist.plan.collectives import Layout
from cromss_dist.plan.machine import Link, Machine
from cromss_dist.plan.plan import Plan, Samples
from cromss_dist.plan.probe import probe
from cromss_dist.plan.report import as_json, show, show_scaling
from cromss_dist.plan.sheets import named_machine
from cromss_dist.plan.work import Networks

_NODE = 8  # devices of a node in a scaling table, where it is not said


def run_probe(options: argparse.Namespace) -> None:
    """Measures this machine and writes its profile."""
    if not options.folder.is_dir():
        raise ConfigError(f"--folder={options.folder} is no folder; give the one where checkpoints would be written.")
    machine = probe(options.device, options.folder, options.threads, lambda text: print(f"measuring {text}", flush=True))
    machine.write(options.out)
    print(f"{machine.name}: residual {100 * machine.residual:.0f} %, written to {options.out}")
    print(f"next: cromss plan --machine {options.out} --config CONFIG")


def run_plan(options: argparse.Namespace) -> None:
    """Plans a run and prints it."""
    parsed = parse_run(options.rest, prog="cromss plan", clusters=True)
    machine = _machine(options)
    layout = _layout(options, parsed.cluster, parsed.config)
    samples = Samples.of(parsed.config, options.locations)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.scaling:
        plans = _scaling(parsed.config, machine, samples, options)
        if options.json:
            print(json.dumps([as_json(plan) for plan in plans], indent=2))
        else:
            show_scaling(plans, console)
        return
    plan = Plan.of(parsed.config, machine, layout, samples, options.price)
    if options.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan, console)


def _machine(options: argparse.Namespace) -> Machine:
    machine = named_machine(options.machine) or Machine.read(Path(options.machine))
    if (options.network_gbit is None) != (options.network_us is None):
        raise ConfigError("--network-gbit and --network-us go together; give the rate of a node's network and its latency.")
    if options.network_gbit is None:
        return machine
    if not (options.network_gbit > 0 and options.network_us >= 0):
        raise ConfigError(
            f"--network-gbit={options.network_gbit:g} --network-us={options.network_us:g} is wrong; give a rate above 0 and "
            "a latency of 0 or more."
        )
    return replace(machine, between=Link(1e-6 * options.network_us, 1e9 / 8 * options.network_gbit))


def _layout(options: argparse.Namespace, cluster: ClusterConfig, config: RunConfig) -> Layout:
    """Of --nodes and --gpus, else of the cluster, else of launch.workers on this machine."""
    for name in ("nodes", "gpus"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value} is not allowed; give 1 or more.")
    if options.nodes or options.gpus:
        return Layout(options.nodes or cluster.nodes, options.gpus or cluster.workers_on_each_node())
    if cluster.kind == "here" and config.launch.workers:
        return Layout(1, config.launch.workers)
    workers, each = cluster.crew(config.launch).most, cluster.workers_on_each_node()
    return Layout(-(-workers // each), min(workers, each))


def _scaling(config: RunConfig, machine: Machine, samples: Samples, options: argparse.Namespace) -> list[Plan]:
    """The run on 1, 2, 4 ... ranks: the same global batch as far as it divides, or with --weak the same micro batch."""
    alone, many = (Networks.of(config, machine.precision, shared) for shared in (False, True))
    each = options.gpus or _NODE
    worlds = [2**power for power in range(options.scaling.bit_length())]
    if not options.weak:
        valid = valid_worlds(config.engine, 1, options.scaling)
        worlds = [world for world in worlds if world in valid]
    plans = []
    for world in worlds:
        engine: EngineConfig = config.engine
        if options.weak:
            engine = replace(engine, global_batch=options.weak * world, micro_batch=None, accumulation_steps=None)
        layout = Layout(max(1, world // each), min(world, each))
        plans.append(
            Plan.of(replace(config, engine=engine), machine, layout, samples, options.price, many if world > 1 else alone)
        )
    if not plans:
        raise ConfigError(f"--scaling={options.scaling} leaves no number of ranks; give 1 or more.")
    return plans

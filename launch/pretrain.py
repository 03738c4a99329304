"""Pretrains here or on a cluster: `python launch/pretrain.py --config configs/pretrain/demo.yaml [--cluster FILE]`.

Layer 5. Workers are started by Ray Train, over NCCL on GPUs and gloo on a CPU; `--launch.ray false` runs one worker in
this process instead, with the same numbers.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cromss_dist.config import RunConfig, plan_batches
from cromss_dist.errors import ConfigError, CromssError, main_guard
from cromss_dist.parse import ParsedRun, parse_run, to_yaml
from cromss_dist.pretrain.run import run_in_process
from cromss_dist.train.run.conduct import report
from cromss_dist.train.run.folder import new_run_dir, read_summary, working_in
from launch import submit
from launch.elastic import demand_of
from launch.job import Job, check, record, train
from launch.kuberay import manifests
from launch.kuberay import submit as kubectl
from launch.probe import check_closed
from launch.slurm import script
from launch.slurm import submit as slurm
from launch.snapshot import CODE_FOLDER, Snapshot

PROG = "python launch/pretrain.py"
DESCRIPTION = """Pretrains a Sentinel-1 and a Sentinel-2 encoder with CromSS: on this machine, or with --cluster FILE on a Ray
cluster, by Slurm or on Kubernetes. YAML files state differences from the defaults, dotted arguments come last: --config
configs/pretrain/demo.yaml --engine.global_batch 32. --print_config shows the resolved config, --dry-run also the batch
arithmetic, steps and parameter counts, and the job as it would be sent. SIGTERM, SIGUSR1 and a file `stop` in the run's
folder make it save and exit with 75; --resume RUN_DIR goes on. A job is followed until it ends: Ctrl-C leaves it running,
and --detach does not follow it."""


def main() -> int:
    """The command."""
    run = parse_run(prog=PROG, description=DESCRIPTION, clusters=True)
    run = replace(run, config=run.config.with_absolute_paths())
    console = Console()
    check_flags(run)
    start: Callable[[ParsedRun[RunConfig], Console], int]
    match run.cluster.kind:
        case "slurm":
            start = start_on_slurm
        case "kuberay":
            start = start_on_kubernetes
        case "ray" if run.cluster.ray.takes_jobs:
            start = start_on_ray
        case _:
            start = start_here
    return start(run, console)


def check_flags(run: ParsedRun[RunConfig]) -> None:
    """Raises ConfigError where the command line asks for what its kind of cluster does not have."""
    sent = run.cluster.elsewhere or run.cluster.kind == "slurm"
    if run.detach and not sent:
        raise ConfigError("--detach is allowed only with jobs, and this run has its driver here; leave it out.")
    if not run.config.launch.ray and run.cluster.kind != "here":
        raise ConfigError(
            f"launch.ray=false runs one worker in this process, and not on cluster.kind={run.cluster.kind}; set launch.ray to "
            "true, or leave --cluster out."
        )


def start_here(run: ParsedRun[RunConfig], console: Console) -> int:
    """Drives the run from this process, on this machine or on the Ray cluster that it is a part of."""
    address = run.cluster.ray.address if run.cluster.kind == "ray" else None
    if run.dry_run:
        show(describe(run), console)
        return 0
    if not run.config.launch.ray:
        report(run_in_process(run, console), console)
        return 0
    if address is not None:
        check_closed(address, run.allow_insecure)
    world = check(run).plan.world_size
    run_dir = run.resume or new_run_dir(run.config)
    console.print(f"  Ray starts {world} worker{'s' if world > 1 else ''} ...", highlight=False)
    report(train(run, run_dir, console, command(run), address), console)
    return 0


def start_on_ray(run: ParsedRun[RunConfig], console: Console) -> int:
    """Sends the run to the dashboard of a Ray cluster."""
    preflight = describe(run)
    job = Job.of(run, command(run))
    if run.dry_run:
        show(f"{preflight}\n---\n{submit.describe(run, job)}", console)
        return 0
    client = submit.submit(run, job)
    submit.tell_commands(run, job, console)
    if not run.detach:
        try:
            submit.follow(client, job)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note("The job goes on without this command; those above follow and stop it.")
            raise
    return 0


def start_on_kubernetes(run: ParsedRun[RunConfig], console: Console) -> int:
    """Gives the run's objects to Kubernetes, or prints them."""
    preflight = describe(run)
    job = Job.of(run, command(run))
    name = manifests.job_name(job.name)
    code, files = Snapshot.take().zipped(), job.files(run)
    manifest = manifests.to_yaml(manifests.manifests(run.config, run.cluster, name, files, code))
    if not manifests.takes_code(files, code):
        warning = (
            f"code                that of {run.cluster.kuberay.image}, and NOT of this checkout: its zip of {len(code) >> 10} "
            f"KiB does not fit into a ConfigMap, which takes {manifests.LARGEST_CONFIG_MAP >> 10} KiB"
        )
        print(warning, file=sys.stderr)
        preflight += f"\n{warning}"
    if run.dry_run:
        print("\n".join(f"# {line}" for line in preflight.splitlines()))  # so that the whole is a manifest
        print(manifest, end="")
        return 0
    show(kubectl.create(manifest), console)
    show(f"run folder {job.run_dir}\n{kubectl.how_to_follow(name, run.cluster.kuberay.namespace)}", console)
    return 0


def start_on_slurm(run: ParsedRun[RunConfig], console: Console) -> int:
    """Makes the run's folder with all that the job needs, and queues the job."""
    preflight = describe(run)
    if run.dry_run:
        run_dir = Path(Job.of(run, command(run)).run_dir)
        folder, code = run_dir / "slurm-1", run_dir / CODE_FOLDER
        text = script.job_script(run.cluster, run.config.launch, run_dir.name, folder, code)
        show(f"{preflight}\n---\n{text.rstrip()}", console)
        return 0
    run_dir = run.resume or new_run_dir(run.config)
    try:
        with working_in(run_dir, command(run), run.fresh):
            job = Job.of(replace(run, resume=run_dir, fresh=False), command(run))  # each start of it goes on
            written = script.write_job(run_dir, job.files(run), run.cluster, run.config.launch, record(run, run_dir))
        number = slurm.submit(written)
    except CromssError:
        if run.resume is None:
            shutil.rmtree(run_dir)  # of no use to anybody
        raise
    show(f"  job {number}, run folder {run_dir}\n  {slurm.describe(number, written)}", console)
    if not run.detach:
        slurm.follow(number, written, console)
        summary = read_summary(run_dir)
        assert summary is not None, "a job that ends well leaves it"
        report(summary, console)
    return 0


def describe(run: ParsedRun[RunConfig]) -> str:
    """What is known about a run before it starts; without its data, where only the cluster sees that.

    Raises:
        CromssError: see `launch.job.check`.
    """
    unseen = [place for place in run.config.data.weights if "://" not in place and not Path(place).exists()]
    if unseen and run.cluster.kind != "here":
        plan = plan_batches(run.config.engine, demand_of(run.config, run.cluster).worlds[0])
        return (
            f"{to_yaml(run.config).rstrip()}\n---\n"
            f"config digest       {run.config.digest}\n"
            f"data                {', '.join(unseen)}: not seen from this machine, so that the job is the first to look at it\n"
            f"batch               {plan.global_batch} = micro batch {plan.micro_batch} x accumulation "
            f"{plan.accumulation_steps} x world {plan.world_size}"
        )
    return check(run).describe()


def command(run: ParsedRun[RunConfig]) -> str:
    """What `--resume RUN_DIR` is to be added to: a machine that does not see the folder needs all that was typed."""
    if not run.cluster.elsewhere:
        return shlex.join([sys.orig_argv[0], sys.argv[0]])
    once = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    once.add_argument("--resume")
    for flag in ("--fresh", "--dry-run", "--profile"):
        once.add_argument(flag, action="store_true")
    return shlex.join([sys.orig_argv[0], sys.argv[0], *once.parse_known_args(sys.argv[1:])[1]])


def show(text: str, console: Console) -> None:
    """Prints a text as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main_guard(main))

"""Measures our loader against webdataset, litdata, MosaicML streaming, the published way and bare reading, on this machine.

    python benchmarks/loader.py --archive ../shared/data/noldo_real_mini --work DIR --peers .venv-peers/bin/python
    python benchmarks/loader.py --work DIR --device cuda          on a machine with a GPU; see loader_device.py

A sample is one season of one location at native resolution with the labels of four seasons, 807 kB; every way gives batches
of 16 as torch tensors, in its own shuffled order. Each runs in a process of its own, in turn, several times over; a ratio
is taken between runs of the same turn. Figures are medians (lowest to highest). Without --peers, litdata and MosaicML are
left out: they need another environment, see benchmarks/peers.txt. Takes about ten minutes, and 10 GB of disk and of page cache.

  bare         one `preadv` an array into new memory, no order, no checks: the limit. bare-reused: into the same memory again and
               again, which saves mapping it and which no loader could hand out
  ours         TrainLoader on shards, every byte checked, by a thread a core; ours-workers by a worker process a core;
               ours-8-threads by eight threads, as suits a disk; ours-cube on the Zarr cube
  webdataset   tars of one record a sample, decoded by it
  litdata      StreamingDataset and StreamingDataLoader; litdata-tuned with its decoding of many items at a time switched off
  mds          MosaicML's StreamingDataset and StreamingDataLoader
  published    LMDBs of pickled records at 10 m, four seasons read for one, SciPy prior, crop, flip, rotation on the CPU

The first batches of each but the last are compared with what was stored. Warm: files are dropped from the page cache and read
once, front to back, just before a run, so that all lie there the same way. Cold: dropped, and the first read is what is timed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from convert import HERE, Run, call, machine, say, spread

PACKAGES = ("cromss-dist", "numpy", "torch", "webdataset", "lmdb", "scipy", "google-crc32c", "zarr")
PEERS = ("litdata", "litdata-tuned", "mds")
OURS = ("ours", "ours-workers", "ours-8-threads", "ours-cube")
READS = {  # way -> folder under `work`, and the files of it that it reads
    "bare": ("ours", "*.tar"),
    "bare-reused": ("ours", "*.tar"),
    "ours": ("ours", "*.tar"),
    "ours-workers": ("ours", "*.tar"),
    "ours-8-threads": ("ours", "*.tar"),
    "ours-cube": ("ours", "cube.zarr/**/*"),
    "webdataset": ("webdataset", "*.tar"),
    "litdata": ("litdata", "*"),
    "litdata-tuned": ("litdata", "*"),
    "mds": ("mds", "*"),
    "published": ("lmdb", "**/*"),
}
ALL = ("bare", "ours", "ours-cube", "webdataset", *PEERS, "published")
GROUPS = {  # temperature and cores -> title and ways
    "warm 1": ("Warm, one core", ("bare-reused", *ALL)),
    "warm 2": ("Warm, two cores", ("bare-reused", "ours-workers", *ALL)),
    "cold 1": ("Cold, one core", ("ours-8-threads", *ALL)),
}
ORDERS = ((10**5, 250), (10**7, 250), (10**9, 250), (10**9, 1000))
SHARD_SIZE_MIB = 64
READ_BYTES = 2**24


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, metavar="FOLDER", help="whose pixels are read, rolled to make many locations")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="interpreter with benchmarks/peers.txt installed")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write loader-<date>.md there")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for what is read; what is there is used again")
    parser.add_argument("--locations", type=int, default=400, help="of 2.4 MB (default: %(default)s)")
    parser.add_argument("--many", type=int, default=100_000, help="small locations, to open; 0: none (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of everything (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a run is measured (default: %(default)s)")
    parser.add_argument("--groups", nargs="*", choices=tuple(GROUPS), default=list(GROUPS), help="default: all")
    parser.add_argument("--ways", nargs="*", choices=tuple(READS), default=list(READS), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: only what needs a GPU is measured")
    return parser.parse_args(arguments)


class Bench:
    """Runs ways of loading in fresh processes and remembers what each took."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.runs: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
        self.startup: defaultdict[tuple[str, ...], list[Run]] = defaultdict(list)

    def make_inputs(self) -> None:
        """What each way reads, at `work`/<folder>."""
        sizes = ["--locations", str(self.options.locations), "--many", str(self.options.many)]
        script = [sys.executable, str(HERE / "loader_inputs.py"), str(self.work), "--archive", str(self.options.archive)]
        call([*script, *sizes])
        for peer in ("litdata", "mds") if self.options.peers else ():
            done = self.work / f"{peer}.done"
            if not done.is_file():
                say(f"writing {peer}")
                script = [
                    str(self.options.peers),
                    str(HERE / "peers.py"),
                    peer,
                    str(self.work / "records"),
                    str(self.work / peer),
                ]
                records = str(4 * self.options.locations)
                call([*script, "--locations", records, "--shard-size-mib", str(SHARD_SIZE_MIB)])
                done.touch()

    def compare(self) -> None:
        """All ways in turn, `repeats` times."""
        ways = [way for way in self.options.ways if self.options.peers or way not in PEERS]
        for repeat in range(self.options.repeats):
            for group in self.options.groups:
                say(f"repeat {repeat + 1} of {self.options.repeats}, {group}, load {os.getloadavg()[0]:.1f}")
                for way in ways:
                    if way in GROUPS[group][1]:
                        self.run(group, way)

    def run(self, group: str, way: str) -> None:
        """One run, in a process of its own."""
        temperature, cores = group.split()
        folder, files = READS[way]
        prepare([path for path in sorted((self.work / folder).glob(files)) if path.is_file()], temperature == "warm")
        python, script = (self.options.peers, "loader_peers.py") if way in PEERS else (sys.executable, "loader_contenders.py")
        command = [str(python), str(HERE / script), way, str(self.work / folder), "--cores", cores]
        command += ["--seconds", str(self.options.seconds)]
        if way != "published":
            command += ["--records", str(self.work / "records")]
        if temperature == "cold":  # no byte twice: an item of ours and of the published way is a location, of the others a season
            command += ["--limit", str(self.options.locations * (1 if way in (*OURS, "published") else 4))]
        told: Run = json.loads(call(command).splitlines()[-1])
        say(f"  {way}: {told['samples'] / told['wall_s']:.0f}/s, {told['samples'] / told['cpu_s']:.0f}/s a core")
        self.runs[group, way].append(told)

    def start(self) -> None:
        """Order and opening, each in a process of its own, `repeats` times."""
        cases: list[tuple[str, ...]] = [("order", str(samples), str(per_shard)) for samples, per_shard in ORDERS]
        if self.options.many:
            cases.append(("open", str(self.work / "many")))
        for case in cases:
            say(f"start-up: {' '.join(case)}")
            for _ in range(self.options.repeats):
                told: Run = json.loads(call([sys.executable, str(HERE / "loader_startup.py"), *case]).splitlines()[-1])
                self.startup[case].append(told)


def prepare(files: list[Path], warm: bool) -> None:
    """Drops files from the page cache and, warm, reads them again."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # only clean pages can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while warm and os.read(descriptor, READ_BYTES):
            pass
        os.close(descriptor)


def rates(runs: Sequence[Run], clock: str) -> list[float]:
    """Samples a second of each run, by one of its clocks."""
    return [run["samples"] / run[clock] for run in runs]


def ratios(runs: Sequence[Run], against: Sequence[Run], clock: str = "cpu_s") -> list[float]:
    """How many times as fast, run by run."""
    return [mine / theirs for mine, theirs in zip(rates(runs, clock), rates(against, clock), strict=True)]


def section(bench: Bench, group: str) -> list[str]:
    """The table of a group."""
    run = [way for way in READS if bench.runs[group, way]]
    clock = "wall_s" if group.startswith("cold") else "cpu_s"  # waiting for a disk takes no CPU time
    lines = [
        f"## {GROUPS[group][0]}",
        "",
        "| way | samples/s of a core | samples/s | MB/s | of ours | first batch, s | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in run:
        these = bench.runs[group, way]
        size = statistics.median(one["bytes"] / one["wall_s"] / 1e6 for one in these)
        share = spread(ratios(these, bench.runs[group, "ours"], clock), 2) if "ours" in run else "-"
        cells = [spread(rates(these, "cpu_s"), 0), spread(rates(these, "wall_s"), 0), f"{size:.0f}", share]
        cells += [spread([one["first_s"] for one in these], 2), f"{max(one['peak_mib'] for one in these):.0f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return [*lines, ""]


def targets(bench: Bench) -> list[str]:
    """What was aimed at and what came out, one core, warm, by CPU time."""
    runs = {way: bench.runs["warm 1", way] for way in READS if bench.runs["warm 1", way]}
    others = {way: statistics.median(rates(runs[way], "cpu_s")) for way in ("webdataset", *PEERS) if way in runs}
    best = max(others, key=others.__getitem__, default="")
    aims = (("published", 100), (best, 1.5), ("bare", 0.6), ("bare-reused", 0.6))
    lines = ["## Targets: ours against others, one core, warm, by CPU time", "", "| against | times | target |", "|---|---|---|"]
    for way, aim in aims:
        if way in runs and "ours" in runs:
            lines.append(f"| {way} | {spread(ratios(runs['ours'], runs[way]), 2)} | {aim} |")
    return [*lines, ""]


def startup(bench: Bench) -> list[str]:
    """The table of start-up time and memory."""
    lines = [
        "## Start: the order alone, of simulated shards",
        "",
        "| samples | a shard | first batch of 256, s | in the middle of epoch 3, s | each further, ms | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case, runs in bench.startup.items():
        if case[0] == "order":
            cells = [f"{int(case[1]):.0e}", case[2]]
            cells += [spread([run[name] for run in runs], 2) for name in ("first_s", "resumed_s", "batch_ms")]
            lines.append(f"| {' | '.join(cells)} | {max(run['mib'] for run in runs):.0f} |")
    for case, runs in bench.startup.items():
        if case[0] == "open":
            opened = spread([run["opened_s"] for run in runs], 2)
            size = max(run["mib"] for run in runs)
            lines += ["", f"Opening a dataset of {runs[0]['samples']} locations: {opened} s, {size:.0f} MiB."]
    return [*lines, ""]


def report(bench: Bench, loads: Sequence[float]) -> str:
    """The dated document."""
    options = bench.options
    lines = [f"# Loading, {date.today().isoformat()}", "", *machine(options.peers, PACKAGES)]
    lines += [
        f"- Files on {call(['stat', '-f', '-c', '%T', str(bench.work)]).strip()}; load of the machine before and after: "
        f"{loads[0]:.1f}, {loads[1]:.1f}",
        f"- {options.locations} locations of 264 px made from those of {options.archive.name}, {options.repeats} repeats in turn "
        f"of {options.seconds:g} s, batches of 16, shards of {SHARD_SIZE_MIB} MiB; median (lowest-highest)",
        "- of ours: samples a second of a core in proportion to ours; cold, samples a second",
        "- Only ours checks every byte. Only published makes label priors and crops, flips and rotates, on the CPU, as it does; "
        "the others leave that to a GPU. MB/s: what is handed out, of published float32 at 10 m. Peak: without worker processes",
        "",
        *targets(bench),
    ]
    for group in options.groups:
        lines += section(bench, group)
    return "\n".join([*lines, *startup(bench)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures, prints."""
    options = parse_arguments(arguments)
    if options.device == "cuda":
        from loader_device import measure_device

        text, name = measure_device(options), "loader-gpu"
    else:
        if options.archive is None:
            raise SystemExit("--archive is missing; give the folder of an archive, such as ../shared/data/noldo_real_mini.")
        with tempfile.TemporaryDirectory(prefix="cromss-bench-") as folder:
            bench = Bench(options, (options.work or Path(folder)).absolute())
            before = os.getloadavg()[0]
            bench.make_inputs()
            bench.compare()
            bench.start()
            text, name = report(bench, (before, os.getloadavg()[0])), "loader"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}-{date.today().isoformat()}.md").write_text(text)


if __name__ == "__main__":
    main()

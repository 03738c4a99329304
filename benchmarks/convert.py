"""Measures our converter against the published code's way, litdata and MosaicML streaming, on this machine.

    python benchmarks/convert.py --peers .venv-peers/bin/python --out benchmarks/results

Each way runs in a process of its own, in turn, several times over; a ratio is taken between runs of the same turn. Figures
are medians (lowest to highest). The page cache is warm. Without --peers, litdata and MosaicML are left out: they need
another environment, see benchmarks/peers.txt. Takes about half an hour, --parallel and --memory most of it; outputs are removed
as soon as they are measured, and the largest of --memory needs 2.4 MB a location.

From an archive (inputs.py makes it; contenders.py runs the ways):
  published   one process: rasterio opens a band, PIL resizes it to 264 px, a location is one record of each of three LMDBs
  convert     this project, one process: from the look at the folder to the published dataset, verified and on disk
End to end, of a larger archive:
  convert     as above
  convert x2  the same on two Ray workers, the start of Ray included
From the same samples in memory:
  shards      our shard writer: CRC-32C of seasons and members, sha256, fsync, read back
  litdata     litdata.optimize, one worker, its start not counted
  mds         MosaicML's MDSWriter; mds-sha256 with checksums
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("litdata", "mds", "mds-sha256")
OURS = ("cromss-dist", "numpy", "imagecodecs", "rasterio", "pillow", "lmdb", "ray", "google-crc32c")
THEIRS = ("litdata", "mosaicml-streaming", "numpy", "torch")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

Run = dict[str, float]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help is this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="interpreter with benchmarks/peers.txt installed")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write convert-<date>.md there")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for archives and outputs; archives there are used again")
    parser.add_argument("--locations", type=int, default=200, help="of each archive (default: %(default)s)")
    parser.add_argument("--distinct", type=int, default=24, help="generated; others are links to them (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of everything but --memory (default: %(default)s)")
    parser.add_argument("--forms", nargs="*", choices=("physical", "uint8", "jpeg"), default=["physical", "uint8", "jpeg"])
    parser.add_argument("--shard-size-mib", type=int, default=64, help="of all formats with shards (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1000, metavar="LOCATIONS", help="archive to share among workers; 0: none")
    parser.add_argument("--workers", type=int, default=2, help="that share it (default: %(default)s)")
    parser.add_argument(
        "--memory",
        nargs="*",
        type=int,
        default=[100, 1000, 10000],
        metavar="LOCATIONS",
        help="archive sizes to take peak memory at",
    )
    return parser.parse_args(arguments)


class Bench:
    """Runs ways of conversion in fresh processes and remembers what each took."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.runs: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)

    def make_inputs(self, locations: int, forms: Sequence[str]) -> None:
        """Archives at `work`/<form>-<locations>, and the samples at `work`/arrays."""
        sizes = ("--distinct", str(self.options.distinct), "--locations", str(locations))
        call([sys.executable, str(HERE / "inputs.py"), str(self.work), *sizes, "--forms", *forms])

    def run(self, group: str, way: str, source: Path, workers: int = 1) -> Run:
        """One run, in a process of its own; the output is measured and removed."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        is_peer = way in PEERS
        python, script = (self.options.peers, "peers.py") if is_peer else (sys.executable, "contenders.py")
        options = ["--locations", str(self.options.locations), "--shard-size-mib", str(self.options.shard_size_mib)]
        if not is_peer:
            options += ["--workers", str(workers)]
        told: Run = json.loads(call([str(python), str(HERE / script), way, str(source), str(out), *options]).splitlines()[-1])
        told.setdefault("locations", self.options.locations)
        told["bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
        self.runs[group, way if workers == 1 else f"{way} x{workers}"].append(told)
        return told

    def compare(self) -> None:
        """All ways in turn, `repeats` times."""
        forms = self.options.forms
        self.make_inputs(self.options.locations, forms or ["physical"])
        if self.options.parallel:
            self.make_inputs(self.options.parallel, ["physical"])
        for path in self.work.rglob("*.tif"):
            path.read_bytes()
        for repeat in range(self.options.repeats):
            say(f"repeat {repeat + 1} of {self.options.repeats}, load {os.getloadavg()[0]:.1f}")
            for form in forms:
                archive = self.work / f"{form}-{self.options.locations}"
                for way in ("published", "convert"):
                    self.run(form, way, archive)
            for way in ("shards", *(PEERS if self.options.peers else ())):
                self.run("arrays", way, self.work / "arrays")
            if self.options.parallel:
                for workers in (1, self.options.workers):
                    self.run("parallel", "convert", self.work / f"physical-{self.options.parallel}", workers)

    def take_memory(self) -> Iterator[tuple[int, Run]]:
        """Peak memory of one conversion an archive size."""
        for locations in self.options.memory:
            say(f"memory at {locations} locations")
            self.make_inputs(locations, ["physical"])
            archive = self.work / f"physical-{locations}"
            yield locations, self.run(f"memory {locations}", "convert", archive)
            if locations not in (self.options.locations, self.options.parallel):
                shutil.rmtree(archive)


def call(command: list[str]) -> str:
    """What a command printed; ends this program with what it complained of where it fails."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def say(text: str) -> None:
    """Tells whoever waits."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (lowest to highest)."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})" if len(values) > 1 else middle


def rates(runs: Sequence[Run], clock: str) -> list[float]:
    """Locations a second of each run, by one of its clocks."""
    return [run["locations"] / run[clock] for run in runs]


def section(title: str, runs: dict[tuple[str, str], list[Run]], group: str, base: str) -> list[str]:
    """A table of the ways of one group, if it was run; ratios are to `base`, run by run."""
    if (group, base) not in runs:
        return []
    lines = [
        f"## {title}",
        "",
        "| way | locations/s of a core | times that of the first | locations/s | to disk | MB a location | of the first |",
        "|---|---|---|---|---|---|---|",
    ]
    against = runs[group, base]
    for (of, way), these in runs.items():
        if of != group:
            continue
        per_core = rates(these, "cpu_s")
        ratios = [ours / theirs for ours, theirs in zip(per_core, rates(against, "cpu_s"), strict=True)]
        size = these[0]["bytes"] / these[0]["locations"]
        share = size / (against[0]["bytes"] / against[0]["locations"])
        alone = " x" not in way  # Ray's workers are nobody's children: their CPU seconds are not known
        cells = [spread(per_core), spread(ratios, 2)] if alone else ["-", "-"]
        cells += [spread(rates(these, "wall_s")), spread(rates(these, "disk_s")), f"{size / 1e6:.3f}", f"{share:.3f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return [*lines, ""]


def machine(peers: Path | None, packages: Sequence[str] = OURS) -> list[str]:
    """What was measured with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    told = [
        f"- {model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}",
        f"- Python {platform.python_version()}; {', '.join(f'{name} {version(name)}' for name in packages)}",
    ]
    if peers:
        query = f"from importlib.metadata import version as v; print(', '.join(f'{{n}} {{v(n)}}' for n in {THEIRS}))"
        told.append(f"- Peers: {call([str(peers), '-c', query]).strip()}")
    return told


def report(bench: Bench, memory: list[tuple[int, Run]], loads: Sequence[float], file_system: str) -> str:
    """The dated document."""
    options = bench.options
    lines = [f"# Conversion, {date.today().isoformat()}", "", *machine(options.peers)]
    lines += [
        f"- Files on {file_system}; load of the machine before and after: {loads[0]:.1f}, {loads[1]:.1f}",
        f"- {options.locations} locations of 264 px ({options.distinct} distinct), {options.repeats} repeats in turn, shards of "
        f"{options.shard_size_mib} MiB; median (lowest-highest)",
        "",
    ]
    for form in options.forms:
        lines += section(f"From an archive: {form}", bench.runs, form, "published")
    lines += section("From samples in memory", bench.runs, "arrays", "shards")
    lines += section(f"End to end: {options.parallel} locations, physical", bench.runs, "parallel", "convert")
    if memory:
        lines += [
            "## Peak memory of a conversion, one process",
            "",
            "| locations | MiB | locations/s of a core | locations/s |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {size} | {run['peak_mib']:.0f} | {spread(rates([run], 'cpu_s'))} | {spread(rates([run], 'wall_s'))} |"
            for size, run in memory
        ]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures, prints."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="cromss-bench-") as folder:
        work = (options.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work)
        before = os.getloadavg()[0]
        bench.compare()
        memory = list(bench.take_memory())
        kind = call(["stat", "-f", "-c", "%T", str(work)]).strip()
        text = report(bench, memory, (before, os.getloadavg()[0]), kind)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"convert-{date.today().isoformat()}.md").write_text(text)


if __name__ == "__main__":
    main()

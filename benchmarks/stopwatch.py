"""Times a loader: what every way of benchmarks/loader.py runs under, in either environment. Imports nothing of this project.

A loader is an iterator of batches, each a mapping: 'record' (whole numbers) and the arrays by name, uint8, stacked.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Batch = Mapping[str, Any]
WARM_UP_BATCHES = 4
MIN_BATCHES = 6  # two workers finish theirs at about the same time: whole rounds only
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Settings:
    """How a way is to run.

    Args:
        folder: What it reads.
        records: The .npy of each array that its first batches are compared with; None where it changes them.
        batch: Samples of a batch.
        cores: It may use; 1 means no worker process.
        seconds: To measure, once warm.
        limit: Samples to stop at; 0: none. A cold run stops before it meets bytes that it has read itself.
    """

    folder: Path
    records: Path | None
    batch: int
    cores: int
    seconds: float
    limit: int


def parse(ways: Sequence[str], description: str | None) -> tuple[str, Settings]:
    """The command line of a process that runs one way; pins the process to its cores."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=ways)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--limit", type=int, default=0)
    options = vars(parser.parse_args())
    way = options.pop("way")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options["cores"] :])
    return way, Settings(**options)


def measure(loader: Callable[[Settings], Iterator[Batch]], settings: Settings) -> None:
    """Runs a loader and prints what it took, as JSON.

    Warm: the clock starts after some batches, and the first of them are compared with the records. Cold (`limit`): it starts
    before the first, since there is no second time.
    """
    opened = time.perf_counter()
    batches = loader(settings)
    cold = settings.limit > 0
    started, cpu_before = time.perf_counter(), cpu_s()
    first_s = 0.0
    if not cold:
        for number in range(WARM_UP_BATCHES):
            batch = next(batches)
            first_s = first_s or time.perf_counter() - opened
            if settings.records and number < 2:
                compare(batch, settings.records)
        started, cpu_before = time.perf_counter(), cpu_s()
    samples = size = 0
    now = started
    least = MIN_BATCHES * settings.batch
    while (now - started < settings.seconds or samples < least) and (not cold or samples + settings.batch <= settings.limit):
        batch = next(batches)
        now = time.perf_counter()
        first_s = first_s or now - opened
        samples += len(batch["record"])
        size += sum(array.nbytes for name, array in batch.items() if name != "record")
    told = {
        "samples": samples,
        "bytes": size,
        "wall_s": now - started,
        "cpu_s": cpu_s() - cpu_before,
        "first_s": first_s,
        "peak_mib": peak_mib(),
    }
    print(json.dumps(told), flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)  # not all loaders can be closed, and their threads would be waited for


def compare(batch: Batch, records: Path) -> None:
    """Checks that a batch holds the records that it names, byte for byte."""
    for name, array in batch.items():
        if name != "record":
            stored = np.load(records / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for place, number in enumerate(batch["record"]):
                if not np.array_equal(np.asarray(array[place]), stored[int(number)]):
                    raise SystemExit(f"{name} of record {int(number)} is not what was stored")


def cpu_s() -> float:
    """CPU seconds of this process and of its worker processes, living and ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(usage.ru_utime + usage.ru_stime for usage in used)
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND
    return total


def peak_mib() -> float:
    """Peak resident memory of this process, MiB: not ru_maxrss, which counts what the starting process had."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))

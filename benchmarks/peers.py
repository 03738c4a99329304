"""Writes the samples of a folder of arrays with litdata or MosaicML streaming; prints what it took, as JSON.

    PEERS_PYTHON benchmarks/peers.py litdata|mds|mds-sha256 ARRAYS OUT --locations 200 --shard-size-mib 64

Runs under another interpreter than the rest, see peers.txt, and so imports nothing of it. benchmarks/convert.py calls it.

Arrays are in memory before the clock starts. Of litdata, the clock starts at the first sample: the start of its worker,
some seconds, does not count, since it would vanish in a long conversion.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES: list[dict[str, Any]] = []  # what litdata's forked worker inherits


def load(folder: Path) -> list[dict[str, Any]]:
    """The samples: key and metadata as text, arrays as they are."""
    texts = json.loads((folder / "metadata.json").read_text())
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
    stacks = {name: [np.ascontiguousarray(sample) for sample in stack] for name, stack in arrays.items()}
    return [
        {"key": text["key"], "metadata": json.dumps(text), **{name: stack[i] for name, stack in stacks.items()}}
        for i, text in enumerate(texts)
    ]


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def flush(folder: Path) -> None:
    """Waits until every file is on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def next_sample(mark: str, number: int) -> dict[str, Any]:
    """What litdata's worker calls for each sample; notes the clocks at the first."""
    if not os.path.exists(mark):
        Path(mark).write_text(json.dumps([time.perf_counter(), cpu_s()]))
    return {**SAMPLES[number % len(SAMPLES)], "key": f"{number:07d}"}


def write_litdata(out: Path, locations: int, shard_size_mib: int) -> tuple[float, float]:
    """Writes with `litdata.optimize` and one worker; returns wall and CPU seconds."""
    from functools import partial

    import litdata  # type: ignore[import-not-found]  # is in the other environment

    mark = out.with_name(f"{out.name}.mark")
    mark.unlink(missing_ok=True)
    litdata.optimize(
        fn=partial(next_sample, str(mark)),
        inputs=list(range(locations)),
        output_dir=str(out),
        chunk_bytes=shard_size_mib * 2**20,
        num_workers=1,
        start_method="fork",
        keep_data_ordered=True,
        verbose=False,
    )
    ended, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    started, cpu_before = json.loads(mark.read_text())
    mark.unlink()
    return ended - started, used.ru_utime + used.ru_stime - cpu_before


def write_mds(out: Path, locations: int, shard_size_mib: int, hashes: list[str] | None) -> tuple[float, float]:
    """Writes with `MDSWriter`; returns wall and CPU seconds."""
    from streaming import MDSWriter  # type: ignore[import-not-found]  # is in the other environment

    columns = {"key": "str", "metadata": "str"}
    for name, array in SAMPLES[0].items():
        if isinstance(array, np.ndarray):
            columns[name] = f"ndarray:uint8:{','.join(map(str, array.shape))}"
    started, cpu_before = time.perf_counter(), cpu_s()
    with MDSWriter(out=str(out), columns=columns, hashes=hashes, size_limit=shard_size_mib * 2**20) as writer:
        for number in range(locations):
            writer.write({**SAMPLES[number % len(SAMPLES)], "key": f"{number:07d}"})
    return time.perf_counter() - started, cpu_s() - cpu_before


def main() -> None:
    """Parses, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("litdata", "mds", "mds-sha256"))
    parser.add_argument("arrays", type=Path, metavar="ARRAYS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--locations", type=int, required=True)
    parser.add_argument("--shard-size-mib", type=int, required=True)
    options = parser.parse_args()
    SAMPLES.extend(load(options.arrays))
    if options.peer == "litdata":
        wall, cpu = write_litdata(options.out, options.locations, options.shard_size_mib)
    else:
        hashes = ["sha256"] if options.peer == "mds-sha256" else None
        wall, cpu = write_mds(options.out, options.locations, options.shard_size_mib, hashes)
    written = time.perf_counter()
    flush(options.out)
    print(json.dumps({"wall_s": wall, "disk_s": wall + time.perf_counter() - written, "cpu_s": cpu}))


if __name__ == "__main__":
    main()

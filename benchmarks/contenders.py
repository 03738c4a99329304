"""Runs one way of turning an archive into what a trainer reads, and prints what it took, as JSON.

    python benchmarks/contenders.py convert ARCHIVE OUT       our converter
    python benchmarks/contenders.py published ARCHIVE OUT     the way of the published code
    python benchmarks/contenders.py shards ARRAYS OUT         our shard writer, on samples in memory

benchmarks/convert.py calls it, each time in a fresh process. Imports are done before the clock starts.
"""

import argparse
import csv
import json
import os
import pickle  # only to write what the published code writes
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt
import rasterio
from PIL import Image

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert, run_here
from cromss_dist.data.sample import Sample
from cromss_dist.data.store.shards import Checksums, season_checksums, write_shard
from cromss_dist.schema import BANDS, NORMALISATION, NUM_CLASSES, Modality
from launch.parallel import ray_runner

PATCH_PX = 264
MAP_BYTES = 2**40
ROWS_A_COMMIT = 100


def run_convert(archive: Path, out: Path, workers: int, shard_size_mib: int) -> int:
    """Our converter, from the look at the folder to the published dataset; returns the locations written."""
    run = run_here if workers == 1 else ray_runner(workers)
    return convert(open_archive(archive), out, shard_size_mib=shard_size_mib, run=run).num_samples


def run_published(archive: Path, out: Path) -> int:
    """One process; rasterio opens a band, PIL resizes it, a location is one record of each of three LMDBs.

    Seasons in the order of the csv (S2, labels) and of the acquisition time (S1). Where a band holds physical values it is
    normalised, in float32. Labels go through the same bicubic resize. A commit (and so a sync) every 100 locations.
    """
    out.mkdir(parents=True)
    environments = {name: lmdb.open(str(out / f"{name}.lmdb"), map_size=MAP_BYTES) for name in ("s1", "s2c", "labels")}
    transactions = {name: environment.begin(write=True) for name, environment in environments.items()}
    with (archive / "dw_complete_ids.csv").open(newline="") as table:
        rows = list(csv.reader(table))[1:]
    for number, (location, *scenes) in enumerate(rows):
        key = f"{int(location):07d}"
        s1_scenes = sorted(os.listdir(archive / "s1" / key), key=lambda scene: scene.split("_")[4])
        records = {
            "s1": np.stack([_read_scene(archive / "s1" / key / scene, "s1") for scene in s1_scenes]),
            "s2c": np.stack([_read_scene(archive / "s2c" / key / scene, "s2") for scene in scenes]),
            "labels": np.stack([_read_label(archive / "dw_noisy_labels" / key / scene / "label.tif") for scene in scenes]),
        }
        for name, pixels in records.items():
            transactions[name].put(str(number).encode(), pickle.dumps((pixels.tobytes(), pixels.shape, int(location))))
        if number % ROWS_A_COMMIT == 0:
            for name, environment in environments.items():
                transactions[name].commit()
                transactions[name] = environment.begin(write=True)
    for name, environment in environments.items():
        transactions[name].commit()
        environment.sync()
        environment.close()
    return len(rows)


def _read_scene(folder: Path, modality: Modality) -> npt.NDArray[np.uint8]:
    """All bands of a scene at 10 m, uint8 (band, 264, 264)."""
    contract = NORMALISATION[modality]
    bands = []
    for band, mean, std in zip(BANDS[modality], contract.mean, contract.std, strict=True):
        pixels = _read_band(folder / f"{band}.tif")
        if pixels.dtype != np.uint8:
            low, span = np.float32(mean - 2 * std), np.float32(4 * std)
            pixels = np.clip((pixels.astype(np.float32) - low) / span * np.float32(255), 0, 255).astype(np.uint8)
        bands.append(_resize(pixels))
    return np.stack(bands)


def _read_label(path: Path) -> npt.NDArray[np.uint8]:
    return np.clip(_resize(_read_band(path)), 0, NUM_CLASSES - 1)


def _read_band(path: Path) -> npt.NDArray[np.generic]:
    with rasterio.open(path) as dataset:
        pixels: npt.NDArray[np.generic] = dataset.read().squeeze()
    return pixels


def _resize(pixels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    return np.array(Image.fromarray(pixels).resize((PATCH_PX, PATCH_PX), Image.Resampling.BICUBIC))


def load(folder: Path) -> list[Sample]:
    """The samples of a folder of arrays."""
    metadata = json.loads((folder / "metadata.json").read_text())
    stacks = {path.stem: np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
    return [
        Sample(place["key"], {name: stack[i] for name, stack in stacks.items()}, place, ()) for i, place in enumerate(metadata)
    ]


def run_shards(samples: list[Sample], out: Path, locations: int, shard_size_mib: int) -> int:
    """Our shard writer: checksums, commit records, every file synced and read back."""
    out.mkdir(parents=True)
    per_shard = max(1, shard_size_mib * 2**20 // sum(array.nbytes for array in samples[0].arrays.values()))

    def checked(numbers: range) -> Iterator[tuple[Sample, Checksums]]:
        for number in numbers:
            sample = samples[number % len(samples)]
            yield replace(sample, key=f"{number:07d}"), season_checksums(sample.arrays)

    for first in range(0, locations, per_shard):
        numbers = range(first, min(first + per_shard, locations))
        write_shard(out, f"shard-{first // per_shard:06d}.tar", checked(numbers))
    return locations


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_mib() -> float:
    """Peak resident memory of this process, MiB: not ru_maxrss, which counts what the starting process had."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))


def flush(folder: Path) -> None:
    """Waits until every file is on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def main() -> None:
    """Parses, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("convert", "published", "shards"))
    parser.add_argument("source", type=Path, metavar="ARCHIVE|ARRAYS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--locations", type=int, default=0, help="that `shards` writes, going round those there are")
    parser.add_argument("--shard-size-mib", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1, help="of `convert`")
    options = parser.parse_args()
    samples = load(options.source) if options.way == "shards" else []
    started, cpu_before = time.perf_counter(), cpu_s()
    match options.way:
        case "convert":
            locations = run_convert(options.source, options.out, options.workers, options.shard_size_mib)
        case "published":
            locations = run_published(options.source, options.out)
        case _:
            locations = run_shards(samples, options.out, options.locations, options.shard_size_mib)
    written, cpu = time.perf_counter(), cpu_s() - cpu_before
    flush(options.out)
    told = {
        "locations": locations,
        "wall_s": written - started,
        "disk_s": time.perf_counter() - started,
        "cpu_s": cpu,
        "peak_mib": peak_mib(),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()

"""Makes what the loaders are measured on: the same pixels in the form of each of them.

    python benchmarks/loader_inputs.py OUT --archive ../shared/data/noldo_real_mini --locations 400

A record is one season of one location at native resolution, with the labels of all four seasons: what a training sample
needs. Number 4 x location + season names it. Locations beyond those of the archive are its own, rolled along rows and
columns, so that no two are equal.

OUT/records     an .npy an array, records first, and metadata.json: what peers.py writes its formats from
OUT/ours        our dataset, shards and cube; a location holds its four seasons
OUT/webdataset  tars of one record a sample, each array an .npy
OUT/lmdb        the three environments of the published code, all bands resized to 264 px
OUT/many        our dataset of --many locations of 12 px: what opening a large dataset is measured on
"""

import argparse
import hashlib
import json
import pickle  # only to write what the published code writes
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import lmdb
import numpy as np
import webdataset
from contenders import MAP_BYTES, ROWS_A_COMMIT
from PIL import Image

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Sample, SampleSpec, Uint8Array
from cromss_dist.schema import IMAGE_ARRAYS, LABEL_ARRAY, S2_BANDS

SHARD_SIZE_MIB = 64
STEP_PX = 6  # what locations are rolled by: a whole pixel of every band


class Rolled:
    """A Source of many locations out of few: location i is location i mod n of the archive, rolled.

    Args:
        archive: Folder that `open_archive` knows.
        locations: How many.
        crop_px: Side that patches are cut to; None: as they are.
    """

    def __init__(self, archive: Path, locations: int, crop_px: int | None = None) -> None:
        self.archive, self.crop_px = archive, crop_px
        self.keys = tuple(f"{number:07d}" for number in range(locations))
        spec = open_archive(archive).spec
        self.spec: SampleSpec = spec if crop_px is None else replace(spec, patch_px=crop_px)
        self.duplicates: Counter[str] = Counter()
        self.asides: dict[str, int] = {}
        self.fingerprint = hashlib.sha256(f"{locations} of {crop_px}".encode()).hexdigest()
        self.size_bytes = 0

    @cached_property
    def samples(self) -> list[Sample]:
        """The archive's own."""
        source = open_archive(self.archive)
        return [source.read(key) for key in source.keys]

    def read(self, key: str) -> Sample:
        """Makes one location."""
        turn, which = divmod(int(key), len(self.samples))
        sample = self.samples[which]
        scale = {spec.name: spec.scale for spec in self.spec.images}
        side = self.spec.patch_px // STEP_PX
        arrays = {}
        for name, array in sample.arrays.items():
            shift = tuple(STEP_PX // scale.get(name, 1) * steps for steps in divmod(turn, side))
            rolled = np.roll(array, shift, axis=(-2, -1))
            edge = None if self.crop_px is None else self.crop_px // scale.get(name, 1)
            arrays[name] = np.ascontiguousarray(rolled[..., :edge, :edge])
        return Sample(key, arrays, {**sample.metadata, "key": key}, ())


def save_records(source: Rolled, out: Path) -> None:
    """Every season of every location as a record."""
    out.mkdir()
    seasons = source.spec.num_seasons
    count = len(source.keys) * seasons
    stacks = {}
    for name in source.spec.names:
        shape = source.spec.shape(name) if name == LABEL_ARRAY else source.spec.shape(name)[1:]
        stacks[name] = np.lib.format.open_memmap(out / f"{name}.npy", "w+", np.uint8, (count, *shape))
    for location, key in enumerate(source.keys):
        for name, array in source.read(key).arrays.items():
            records = slice(location * seasons, (location + 1) * seasons)
            stacks[name][records] = array[None] if name == LABEL_ARRAY else array
    (out / "metadata.json").write_text(json.dumps([{"key": f"{record:07d}"} for record in range(count)]))


def save_webdataset(records: Path, out: Path) -> None:
    """Records in their order, in tars as large as the others' shards."""
    out.mkdir()
    stacks = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(records.glob("*.npy"))}
    with webdataset.ShardWriter(str(out / "records-%06d.tar"), maxsize=SHARD_SIZE_MIB * 2**20, verbose=0) as writer:
        for record in range(len(stacks[LABEL_ARRAY])):
            arrays = {f"{name}.npy": np.array(stack[record]) for name, stack in stacks.items()}
            writer.write({"__key__": f"{record:07d}", **arrays})


def save_lmdb(source: Rolled, out: Path) -> None:
    """What the published code trains on; see `contenders.run_published` for how it gets there."""
    out.mkdir()
    environments = {name: lmdb.open(str(out / f"{name}.lmdb"), map_size=MAP_BYTES) for name in ("s1", "s2c", "labels")}
    for name, environment in environments.items():
        transaction = environment.begin(write=True)
        for number, key in enumerate(source.keys):
            pixels = _published(source.read(key).arrays, name)
            transaction.put(str(number).encode(), pickle.dumps((pixels.tobytes(), pixels.shape, number)))
            if number % ROWS_A_COMMIT == 0:
                transaction.commit()
                transaction = environment.begin(write=True)
        transaction.commit()
        environment.sync()
        environment.close()


def _published(arrays: dict[str, Uint8Array], name: str) -> Uint8Array:
    if name != "s2c":
        return arrays["s1" if name == "s1" else LABEL_ARRAY]
    side = arrays["s1"].shape[-1]
    bands: dict[str, list[Uint8Array]] = {}
    for spec in IMAGE_ARRAYS[1:]:
        for band, pixels in zip(spec.bands, np.moveaxis(arrays[spec.name], 1, 0), strict=True):
            images = [Image.fromarray(season) for season in pixels]
            bands[band] = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return np.stack([np.stack(bands[band]) for band in S2_BANDS], axis=1)


def main() -> None:
    """Parses and makes what is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--locations", type=int, required=True)
    parser.add_argument("--many", type=int, default=0)
    options = parser.parse_args()
    source = Rolled(options.archive, options.locations)
    steps: dict[str, Callable[[Path], object]] = {
        "records": lambda out: save_records(source, out),
        "ours": lambda out: convert(source, out, write="both", shard_size_mib=SHARD_SIZE_MIB),
        "webdataset": lambda out: save_webdataset(options.out / "records", out),
        "lmdb": lambda out: save_lmdb(source, out),
    }
    if options.many:
        steps["many"] = lambda out: convert(Rolled(options.archive, options.many, 12), out, shard_size_mib=4)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, make in steps.items():
        done = options.out / f"{name}.done"
        if not done.is_file():
            print(f"making {name}", flush=True)
            make(options.out / name)
            done.touch()


if __name__ == "__main__":
    main()

"""What a conversion will take: space, checked before it starts, and time, from trying a few locations."""

import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cromss_dist.data.conversion.parts import Assignment, write_part
from cromss_dist.data.conversion.plan import Plan, Sinks, locations_per_part, make_plan
from cromss_dist.data.conversion.workplace import Workplace
from cromss_dist.data.sample import SampleSpec, Source
from cromss_dist.data.store.cube.record import CUBE
from cromss_dist.data.store.cube.writer import create_cube
from cromss_dist.data.store.manifest import canonical
from cromss_dist.data.store.shards import sample_bytes
from cromss_dist.errors import StorageError

CUBE_SHARE = 0.75  # bytes of a cube over those of its pixels, at most: zstd at level 3 makes 0.4 to 0.7 of real ones
SPACE_MARGIN = 1.1


@dataclass(frozen=True)
class Estimate:
    """What a conversion would do.

    Args:
        num_inputs: Ledger lines.
        bytes_in: Of the archive.
        bytes_out: Of the dataset.
        num_parts: Parts, and so tars.
        free_bytes: On the disk of the output.
        seconds: With as many workers as were asked for.
        num_tried: Locations that were converted to find out.
    """

    num_inputs: int
    bytes_in: int
    bytes_out: int
    num_parts: int
    free_bytes: int
    seconds: float
    num_tried: int


def output_bytes(spec: SampleSpec, sinks: Sinks, num_samples: int) -> int:
    """Bytes of a dataset, at most, but for what compresses badly."""
    pixels = sum(math.prod(spec.shape(name)) for name in spec.names)
    each = (sinks != "cube") * sample_bytes(spec) + (sinks != "shards") * CUBE_SHARE * pixels
    return math.ceil(each * num_samples)


def check_space(spec: SampleSpec, sinks: Sinks, num_samples: int, folder: Path) -> None:
    """Raises StorageError if `folder` has too little space for so many samples."""
    needed, free = int(output_bytes(spec, sinks, num_samples) * SPACE_MARGIN), shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder} has {free / 2**30:.1f} GiB free, and {num_samples} locations may need {needed / 2**30:.1f} GiB. Free "
            "some, or choose a folder on another disk."
        )


def estimate(source: Source, out: Path, write: Sinks, shard_size_mib: float, workers: int, num_tried: int = 8) -> Estimate:
    """Says what a conversion would take, from converting a few locations in a temporary folder.

    Args:
        source: The archive.
        out: The output; its disk is looked at.
        write: What would be written.
        shard_size_mib: Size of a tar, at most, MiB.
        workers: That would share the work.
        num_tried: Locations to convert, spread over the archive.
    """
    per_part = locations_per_part(source.spec, shard_size_mib)
    plan = make_plan(source, write, per_part)
    keys = plan.keys[:: max(1, len(plan.keys) // num_tried)][:num_tried]
    tried = Plan(keys, len(keys), 0, write, plan.content)
    with tempfile.TemporaryDirectory(prefix="cromss-try-") as folder:
        work = Workplace(Path(folder) / "out", overwrite=False, append=False)
        work.folder.mkdir()
        work.prepare(canonical(tried.content))
        if tried.has_cube:
            create_cube(work.result / CUBE, source.spec, len(keys), len(keys))
        started = time.perf_counter()
        write_part(Assignment(source, tried, work, {}, 1), 0)
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in work.result.rglob("*") if path.is_file())
    share = len(plan.keys) / len(keys)
    return Estimate(
        num_inputs=len(plan.keys) + source.duplicates.total(),
        bytes_in=source.size_bytes,
        bytes_out=int(size * share),
        num_parts=len(plan.parts),
        free_bytes=shutil.disk_usage(out.absolute().parent).free,
        seconds=seconds * share / min(workers, len(plan.parts)),
        num_tried=len(keys),
    )

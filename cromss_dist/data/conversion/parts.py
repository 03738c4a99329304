"""Writes one part of a conversion and commits it: the unit of work, of parallelism and of what survives a crash."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from cromss_dist.data.conversion.ledger import Ledger, Line, duplicate, rejected, written
from cromss_dist.data.conversion.plan import Plan
from cromss_dist.data.conversion.statistics import Statistics
from cromss_dist.data.conversion.workplace import Workplace
from cromss_dist.data.sample import Json, Rejected, Sample, Source
from cromss_dist.data.staging import write_atomically
from cromss_dist.data.store.cube.record import CUBE, CubeFile
from cromss_dist.data.store.cube.writer import write_rows
from cromss_dist.data.store.manifest import ShardEntry
from cromss_dist.data.store.shards import Checksums, sample_digest, season_checksums, write_shard
from cromss_dist.failpoint import failpoint

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Assignment:
    """What all parts of a conversion share; it can be pickled to other processes.

    Args:
        source: The archive.
        plan: Of the conversion.
        work: Where it is done.
        known: Digest of the pixels of each key that the dataset appended to has.
        max_reject_fraction: Share of all inputs that may be rejected.
        progress: Called with key and status of each input; None in other processes.
    """

    source: Source
    plan: Plan
    work: Workplace
    known: Mapping[str, str]
    max_reject_fraction: float
    progress: Progress | None = None


@dataclass(frozen=True)
class Part:
    """A finished part: all that the end of the conversion needs to know of it.

    Args:
        number: Of the part.
        shard: Its tar, if it has one.
        lines: Of the ledger, in the order of the keys.
        rows: Metadata of each location; null where none was written.
        checksums: Of the pixels of each that was.
        cube: Files of the cube that it wrote.
        statistics: Of its samples.
    """

    number: int
    shard: ShardEntry | None
    lines: list[Line]
    rows: list[Json | None]
    checksums: list[Checksums]
    cube: tuple[CubeFile, ...]
    statistics: Statistics


def write_part(assignment: Assignment, number: int) -> list[Line]:
    """Reads the locations of a part, writes its tar and its rows of the cube, and commits it.

    Returns:
        Its lines of the ledger.

    Raises:
        RejectedInputsError: it alone has more rejects than the whole conversion may have.
    """
    plan, work, source = assignment.plan, assignment.work, assignment.source
    name = f"shard-{number:06d}.tar"
    place: Json = {"shard": name} if plan.has_shards else {}
    lines: list[Line] = []
    samples: list[Sample | None] = []  # of the cube; a tar is written as they come
    rows: list[Json | None] = []
    of_pixels: list[Checksums] = []
    statistics = Statistics(source.spec)
    ledger = Ledger(plan.content["num_inputs"], assignment.max_reject_fraction)

    def tell(line: Line) -> None:
        lines.append(line)
        if assignment.progress:
            assignment.progress(line["key"], line["status"])
        ledger.add(line)

    def read() -> Iterator[tuple[Sample, Checksums]]:
        for key in plan.keys_of(number):
            sample, checksums, line = _read(assignment, key, place)
            if plan.has_cube:
                samples.append(sample)
            rows.append(None if sample is None else dict(sample.metadata))
            tell(line)
            if sample is not None:
                of_pixels.append(checksums)
                statistics.add(sample)
                yield sample, checksums
            for _ in range(source.duplicates[key]):
                tell(duplicate(key))

    shard: ShardEntry | None = None
    cube: tuple[CubeFile, ...] = ()
    if plan.has_shards:
        shard = write_shard(work.result, name, read())
    else:
        for _ in read():
            pass
    if plan.has_cube:
        cube = write_rows(work.result / CUBE, source.spec, number * plan.per_part, samples)
    failpoint("before_record")
    _commit(assignment, Part(number, shard, lines, rows, of_pixels, cube, statistics))
    failpoint("after_record")
    return lines


def _read(assignment: Assignment, key: str, place: Json) -> tuple[Sample | None, Checksums, Line]:
    """A location's sample, or None, and what the ledger says of it."""
    try:
        sample = assignment.source.read(key)
        checksums = season_checksums(sample.arrays)
        pixels = sample_digest(checksums)
        known = assignment.known.get(key)
        if known is None:
            return sample, checksums, written(sample, place, pixels)
        if known != pixels:
            raise Rejected("conflicting_duplicate", key, "the dataset that is appended to has this key with other pixels")
        return None, {}, duplicate(key)
    except Rejected as error:
        return None, {}, rejected(key, error)


def _commit(assignment: Assignment, part: Part) -> None:
    content = {
        "plan": assignment.plan.digest,
        "shard": asdict(part.shard) if part.shard else None,
        "lines": part.lines,
        "rows": part.rows,
        "checksums": part.checksums,
        "cube": [asdict(file) for file in part.cube],
        "statistics": part.statistics.to_json(),
    }
    data = json.dumps(content).encode()
    write_atomically(assignment.work.part(part.number), hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def read_part(assignment: Assignment, number: int) -> Part | None:
    """A part that was committed under this plan and whose files are there, in full size; None: it must be written."""
    work, path = assignment.work, assignment.work.part(number)
    if not path.is_file():
        return None
    digest, _, data = path.read_bytes().partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != digest:
        return None
    content = json.loads(data)
    if content["plan"] != assignment.plan.digest:
        return None
    shard = ShardEntry(**content["shard"]) if content["shard"] else None
    cube = tuple(CubeFile(**file) for file in content["cube"])
    sizes = {work.result / CUBE / file.path: file.size for file in cube}
    if shard:
        sizes[work.result / shard.name] = shard.size
        if not (work.result / shard.record).is_file():
            return None
    if any(not file.is_file() or file.stat().st_size != size for file, size in sizes.items()):
        return None
    statistics = Statistics.from_json(assignment.source.spec, content["statistics"])
    return Part(number, shard, content["lines"], content["rows"], content["checksums"], cube, statistics)

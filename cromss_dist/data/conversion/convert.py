"""From an archive to a dataset: plan, write parts, merge them in order, publish; every input is accounted for.

What is written is a function of the inputs and settings alone: not of who wrote which part, in which order, or how often it
was killed. Work goes on in a hidden folder beside the output (`workplace`), which a single rename publishes.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from cromss_dist.data.conversion.append import Base
from cromss_dist.data.conversion.estimate import check_space
from cromss_dist.data.conversion.ledger import Ledger, line_bytes
from cromss_dist.data.conversion.parts import Assignment, Part, Progress, read_part, write_part
from cromss_dist.data.conversion.plan import Plan, Sinks, locations_per_part, make_plan
from cromss_dist.data.conversion.statistics import Statistics
from cromss_dist.data.conversion.workplace import Workplace, claimed
from cromss_dist.data.sample import Json, SampleSpec, Source
from cromss_dist.data.staging import atomic_file
from cromss_dist.data.store.cube.layout import Row
from cromss_dist.data.store.cube.record import CUBE, RECORD, CubeFile, write_record
from cromss_dist.data.store.cube.writer import create_cube, finish_cube, grow_cube
from cromss_dist.data.store.index_file import IndexTables, checksum_table, join, places_of, tar_tables, write_index
from cromss_dist.data.store.manifest import FORMAT, LEDGER, SCHEMA_VERSION, canonical, read_manifest, write_manifest
from cromss_dist.data.store.shards import read_record
from cromss_dist.failpoint import failpoint

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")


class Runner(Protocol):
    """Calls a function on every job, somewhere, and yields the results in any order; the first error ends it."""

    def __call__(
        self, function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]
    ) -> Generator[Result, None, None]:
        """Runs the jobs."""


def run_here(function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]) -> Generator[Result, None, None]:
    """The runner that is a loop in this process."""
    for job in jobs:
        yield function(shared, job)


@dataclass(frozen=True)
class Summary:
    """A finished dataset.

    Args:
        folder: Where it is.
        manifest: Its content, see docs/data-format.md.
    """

    folder: Path
    manifest: Json

    @property
    def num_samples(self) -> int:
        """Locations in it."""
        return int(self.manifest["num_samples"])

    @property
    def num_shards(self) -> int:
        """Tars in it."""
        return len(self.manifest["shards"])

    @property
    def size_bytes(self) -> int:
        """Bytes of its tars and of its cube."""
        cube = self.manifest["cube"]
        return int(sum(shard["size"] for shard in self.manifest["shards"]) + (cube["size"] if cube else 0))

    @property
    def digest(self) -> str:
        """Its name: sha256 (hex) of all that the manifest states."""
        return str(self.manifest["digest"])

    @property
    def ledger(self) -> dict[str, int]:
        """Counts of inputs, written, duplicate, rejected, and of each `rejected.<reason>`."""
        stated = self.manifest["ledger"]
        counts = {name: stated[name] for name in ("inputs", "written", "duplicate", "rejected")}
        return counts | {f"rejected.{reason}": count for reason, count in stated["reasons"].items()}

    @property
    def class_counts(self) -> dict[str, int]:
        """Pixels of each class over all seasons, the ignored ones last."""
        total: Counter[str] = Counter()
        for season in self.manifest["class_counts"]:
            total.update(season)
        return dict(total)


def convert(
    source: Source,
    out: str | Path,
    *,
    write: Sinks | None = None,
    shard_size_mib: float = 256,
    max_reject_fraction: float = 0.001,
    overwrite: bool = False,
    append: bool = False,
    restart: bool = False,
    run: Runner = run_here,
    progress: Progress | None = None,
    work: Workplace | None = None,
    origin: Json | None = None,
) -> Summary:
    """Converts an archive, going on where a killed call of the same arguments was.

    Args:
        source: From `open_archive`.
        out: Folder to create.
        write: 'shards', 'cube' or 'both'; None: shards, or what `out` consists of where it is appended to.
        shard_size_mib: Size of a tar, at most, MiB; a shard has at least one sample. Appended parts are as large as those there.
        max_reject_fraction: Share of the inputs that may be rejected, in [0, 1].
        overwrite: Whether an earlier output of ours at `out` is replaced.
        append: Whether an earlier output of ours at `out` is added to. A key that is there already is a duplicate if its
            pixels are equal, and rejected if not.
        restart: Whether what a killed call left is thrown away.
        run: Who writes the parts.
        progress: Called with key and status (written, rejected, duplicate) as inputs are done.
        work: Where to work, from `claimed(out, ...)`; None: claims it.
        origin: What the inputs were computed from, for the manifest; what it says must be in the source's fingerprint, too.

    Raises:
        OutputExistsError: `out` is there, and is not to be, or must not be, replaced; or another converter writes it.
        UnreadableInputError, EmptyLabelError, RejectedInputsError: too many inputs were rejected, mostly because files
            are damaged, labels are empty, or for other reasons. Stops at the first too many.
        InputChangedError: the inputs are not those the conversion was begun with.
        StorageError: the disk has too little space.
        ConfigError: an argument is out of range, or differs from that of the call that is gone on with.
    """
    with claimed(out, overwrite, append, restart) if work is None else nullcontext(work) as place:
        return _Conversion(source, place, write, shard_size_mib, max_reject_fraction, origin).run(run, progress)


class _Conversion:
    def __init__(
        self,
        source: Source,
        work: Workplace,
        write: Sinks | None,
        shard_size_mib: float,
        max_reject_fraction: float,
        origin: Json | None,
    ) -> None:
        self.source, self.work, self.write, self.origin = source, work, write, origin
        self.max_reject_fraction = max_reject_fraction
        self.num_inputs = len(source.keys) + source.duplicates.total()
        self.per_part = locations_per_part(source.spec, shard_size_mib)
        self.ledger = Ledger(self.num_inputs, max_reject_fraction)  # of this run; says when there are too many rejects

    def run(self, run: Runner, progress: Progress | None) -> Summary:
        work = self.work
        if work.is_published:
            wanted = self._was_published()
            work.clear()
            if wanted:
                return Summary(work.out, read_manifest(work.out))
            work.check_output()
        base = Base.of(work.out) if work.append else None
        plan = self._plan(base)
        if work.plan.exists():
            plan.check_resumes(json.loads(work.plan.read_bytes()), "pass --restart to begin anew")
        work.prepare(canonical(plan.content))
        known = base.pixels() if base else {}
        here = progress if run is run_here else None
        assignment = Assignment(self.source, plan, work, known, self.max_reject_fraction, here)
        missing = []
        for number in plan.parts:
            if part := read_part(assignment, number):
                self._count(part.lines, progress)
            else:
                missing.append(number)
        check_space(self.source.spec, plan.sinks, sum(len(plan.keys_of(number)) for number in missing), work.out.parent)
        self._lay_out(plan, base)
        with closing(run(write_part, assignment, missing)) as results:
            for lines in results:
                self._count(lines, None if here else progress)
        if base is None and not self.ledger.counts["written"]:
            raise self.ledger.too_many()
        manifest = self._finish(assignment, base)
        work.publish()
        work.clear()
        return Summary(work.out, manifest)

    def _was_published(self) -> bool:
        """Whether what a killed converter published from here is what is wanted."""
        begun = json.loads(self.work.plan.read_bytes())
        write, per_part = (begun["write"], begun["locations_per_part"]) if self.work.append else (self.write, self.per_part)
        plan = make_plan(self.source, write or "shards", per_part, begun["first_part"], begun["base"])
        return plan.content == begun and self.write in (None, plan.sinks)

    def _plan(self, base: Base | None) -> Plan:
        if base is None:
            return make_plan(self.source, self.write or "shards", self.per_part)
        base.check_takes(self.source.spec, self.write)
        return make_plan(self.source, base.sinks, base.locations_per_part, base.num_parts, base.manifest["digest"])

    def _count(self, lines: Sequence[Json], progress: Progress | None) -> None:
        for line in lines:
            if progress:
                progress(line["key"], line["status"])
            self.ledger.add(line)

    def _lay_out(self, plan: Plan, base: Base | None) -> None:
        """Makes what parts are written into."""
        if base:
            base.link_into(self.work.result)
        if plan.has_cube:
            cube, num_rows = self.work.result / CUBE, plan.first_part * plan.per_part + len(plan.keys)
            if base:
                grow_cube(cube, self.source.spec, num_rows)
            else:
                create_cube(cube, self.source.spec, num_rows, plan.per_part)

    def _finish(self, assignment: Assignment, base: Base | None) -> Json:
        """Merges the parts in order and writes what is beside them, the manifest last."""
        plan, spec, result = assignment.plan, self.source.spec, self.work.result
        ledger = Ledger(self.num_inputs + (base.manifest["ledger"]["inputs"] if base else 0), 1)
        statistics = base.statistics(spec) if base else Statistics(spec)
        shards = base.shards if base else []
        rows = base.rows() if base and plan.has_cube else []
        tables = [base.tables] if base else []
        files = {file.path: file for file in base.cube_files()} if base and plan.has_cube else {}
        keys_of: defaultdict[str, list[str]] = defaultdict(list)
        sha256 = hashlib.sha256()
        with atomic_file(result / LEDGER) as file:

            def tell(line: Json) -> None:
                ledger.add(line)
                if line["status"] == "written":
                    keys_of[line["pixels"]].append(line["key"])
                data = line_bytes(line)
                sha256.update(data)
                file.write(data)

            for line in base.lines() if base else ():
                tell(line)
            for number in plan.parts:
                part = _committed(assignment, number)
                for line in part.lines:
                    tell(line)
                statistics += part.statistics
                shards += [part.shard] if part.shard else []
                if any(part.rows):
                    tables.append(self._index(plan, part))
                if plan.has_cube:
                    rows += [Row("", None) if row is None else Row(row["key"], row) for row in part.rows]
                files |= {cube_file.path: cube_file for cube_file in part.cube}
        cube = self._finish_cube(spec, rows, files) if plan.has_cube else None
        cube_names = {f"{CUBE}/{path}" for path in files} | ({RECORD} if cube else set())
        _keep_only(result, {name for shard in shards for name in (shard.name, shard.record)} | cube_names | {LEDGER})
        index = write_index(result, join(tables))
        asides = Counter(self.source.asides)
        if base:
            asides.update(base.manifest["ledger"]["asides"])
        origin = self.origin or (base.manifest.get("origin") if base else None)
        failpoint("before_manifest")
        write_manifest(
            result,
            {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                "patch_px": spec.patch_px,
                "num_samples": ledger.counts["written"],
                "arrays": spec.arrays(),
                "normalisation": spec.contracts(),
                "normalised_by": spec.normalised_by,
                **statistics.to_json(),
                "ledger": {**ledger.to_json(), "asides": dict(sorted(asides.items())), "sha256": sha256.hexdigest()},
                "identical": sorted(keys for keys in keys_of.values() if len(keys) > 1),
                "parts": {"count": plan.parts.stop, "locations_per_part": plan.per_part},
                "shards": [shard.to_json() for shard in shards],
                "cube": cube,
                "index": index,
                **({"origin": origin} if origin else {}),
            },
        )
        return read_manifest(result)

    def _index(self, plan: Plan, part: Part) -> IndexTables:
        """Of a part that has samples."""
        spec = self.source.spec
        written = [row for row in part.rows if row is not None]
        first_row = part.number * plan.per_part
        cube_rows = [first_row + i for i, row in enumerate(part.rows) if row is not None]
        return IndexTables(
            locations=tuple(row["key"] for row in written),
            shard_sizes=np.array([len(written)], np.int64),
            places=places_of(written, spec.num_seasons),
            checksums=checksum_table(spec.arrays(), part.checksums),
            tars=tar_tables(spec.arrays(), read_record(self.work.result, part.shard)) if part.shard else None,
            cube_rows=np.array(cube_rows, np.int64) if plan.has_cube else None,
        )

    def _finish_cube(self, spec: SampleSpec, rows: Sequence[Row], files: dict[str, CubeFile]) -> Json:
        """Coordinates, metadata and record; adds the files it writes to `files`."""
        files |= {file.path: file for file in finish_cube(self.work.result / CUBE, spec, rows)}
        return write_record(self.work.result, files.values())


def _committed(assignment: Assignment, number: int) -> Part:
    part = read_part(assignment, number)
    assert part is not None, f"part {number} was committed and is gone"
    return part


def _keep_only(folder: Path, names: set[str]) -> None:
    """Removes what a killed converter wrote and this one did not."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()

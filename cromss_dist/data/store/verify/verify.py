"""Proves that a dataset is what its manifest says, and, where asked, what the archive says; names every sample that is not.

Fast: names, sizes and the digests of everything small. Deep: every byte, and shards against cube sample for sample. Nothing
found ends the search, except a manifest that cannot be believed: without it there is nothing to hold the rest against.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

from cromss_dist.data.sample import Json, Source
from cromss_dist.data.store.cube.reader import CubeLayout
from cromss_dist.data.store.cube.record import CUBE, RECORD
from cromss_dist.data.store.cube.record import file_problems as cube_file_problems
from cromss_dist.data.store.cube.record import read_record as read_cube_record
from cromss_dist.data.store.cube.writer import CubeReader
from cromss_dist.data.store.index_file import IndexTables
from cromss_dist.data.store.manifest import LEDGER, MANIFEST, ShardEntry, canonical, manifest_entries, read_manifest
from cromss_dist.data.store.shards import Samples, file_problems, read_record
from cromss_dist.data.store.stored import MALFORMED
from cromss_dist.data.store.verify.index import (
    differs_from_records,
    differs_from_rows,
    read_tables,
)
from cromss_dist.data.store.verify.pixels import Beside
from cromss_dist.data.store.verify.tar import Problem, check_tar
from cromss_dist.errors import ShardError

# Called with what is being read (files of the cube, shards, samples of a cube alone), how much is done and how much there is.
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass
class Report:
    """What `verify` found.

    Args:
        folder: The dataset.
        deep: Whether every byte was read.
        digest: Of the manifest, None where it cannot be believed.
        counts: Shards, samples, cube_files there should be; samples that were compared with cube and source.
        bytes_read: Of pixels and records.
        seconds: It took.
        problems: In the order of the files; empty if all is well.
    """

    folder: Path
    deep: bool
    digest: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    seconds: float = 0
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> Json:
        """For a file: the fields, and `ok`."""
        told = {**asdict(self), "folder": str(self.folder), "counts": dict(sorted(self.counts.items()))}
        return {"ok": not self.problems, **told}


def verify(
    folder: str | Path, deep: bool = False, source: Source | None = None, cube: bool = True, progress: Progress | None = None
) -> Report:
    """Checks a dataset against its manifest.

    Args:
        folder: That tools/shard.py has written.
        deep: Reads every byte: checksums, tar members, npy headers; compares shards and cube sample for sample.
        source: The archive it was made from: is read again and compared sample for sample. Implies `deep`.
        cube: Whether the cube is looked at too, if there is one.
        progress: Called as things are done.
    """
    started = time.monotonic()
    report = Report(Path(folder), deep or source is not None)
    try:
        manifest = read_manifest(report.folder)
        _Verifier(report, manifest, progress or (lambda _what, _done, _total: None)).run(source, cube)
    except ShardError as error:
        report.problems.append(Problem(MANIFEST, str(error)))
    except MALFORMED as error:  # its digest holds, yet the content is not ours
        report.problems.append(Problem(MANIFEST, f"is malformed: {error!r}"))
    report.seconds = time.monotonic() - started
    return report


class _Verifier:
    """The steps of `verify`, which add to one report."""

    def __init__(self, report: Report, manifest: Json, progress: Progress) -> None:
        self.report = report
        self.folder = report.folder
        self.manifest = manifest
        self.progress = progress
        self.arrays = {name: tuple(spec["shape"]) for name, spec in manifest["arrays"].items()}
        self.reader: CubeReader | None = None
        self.row_of: dict[str, int] = {}
        self.missing: set[str] = set()  # files of the cube
        self.tables: IndexTables | None = None
        report.digest = manifest["digest"]

    def run(self, source: Source | None, cube: bool) -> None:
        statuses = self.check_ledger()
        entries = manifest_entries(self.folder, self.manifest)
        records = self.check_shards(entries)
        if statuses is not None and entries and len(records) == len(entries):
            self.check_keys("the shards", [key for record in records.values() for key, _ in record], statuses)
        if cube and self.manifest["cube"] is not None:
            self.check_cube(statuses)
        self.check_index(entries, records)
        if source is not None:
            source = self.check_source(source, statuses)
        if self.report.deep:
            self.read_samples(entries, records, source)

    def add(self, file: str, what: str, key: str | None = None, array: str | None = None, season: int | None = None) -> None:
        self.report.problems.append(Problem(file, what, key, array, season))

    def check_ledger(self) -> dict[str, str] | None:
        """Status of each key; None where the ledger cannot be believed."""
        stated = self.manifest["ledger"]
        path = self.folder / LEDGER
        data = path.read_bytes() if path.is_file() else None
        if data is None or hashlib.sha256(data).hexdigest() != stated["sha256"]:
            self.add(LEDGER, "is missing" if data is None else f"is not the ledger that {MANIFEST} was made with")
            return None
        lines = [json.loads(line) for line in data.splitlines()]
        counts = Counter(line["status"] for line in lines)
        if len(lines) != stated["inputs"] or any(counts[name] != stated[name] for name in ("written", "rejected", "duplicate")):
            self.add(LEDGER, f"has {len(lines)} inputs, {dict(counts)}; {MANIFEST} states {stated}")
        if counts["written"] != self.manifest["num_samples"]:
            self.add(LEDGER, f"has {counts['written']} samples; {MANIFEST} states {self.manifest['num_samples']}")
        return {line["key"]: line["status"] for line in lines if line["status"] != "duplicate"}

    def check_keys(self, where: str, keys: Sequence[str], statuses: dict[str, str]) -> None:
        """Whether `keys` are the written ones, each once."""
        written = {key for key, status in statuses.items() if status == "written"}
        for key, times in Counter(keys).items():
            if times > 1 or key not in written:
                self.add(LEDGER, f"{where} hold it {times} times" if times > 1 else f"{where} hold it, the ledger does not", key)
        for key in sorted(written - set(keys)):
            self.add(LEDGER, f"is written by the ledger, and {where} do not hold it", key)

    def check_shards(self, entries: Sequence[ShardEntry]) -> dict[str, Samples]:
        """Names, sizes, first headers and records of the tars; returns the records that can be believed."""
        records: dict[str, Samples] = {}
        self.report.counts["shards"] = len(entries)
        for entry in entries:
            self.report.counts["samples"] += entry.samples
            try:
                records[entry.name] = read_record(self.folder, entry)
            except ShardError as error:
                self.add(entry.record, str(error))
            except MALFORMED as error:
                self.add(entry.record, f"is malformed: {error!r}")
            else:
                if len(records[entry.name]) != entry.samples:
                    self.add(entry.record, f"lists {len(records[entry.name])} samples, not {entry.samples}")
        first_keys = {name: record[0][0] for name, record in records.items() if record}
        for _, name, what in file_problems(self.folder, entries, first_keys):
            self.add(name, what)
        if self.manifest["cube"] is None:
            for name in (CUBE, RECORD):
                if (self.folder / name).exists():
                    self.add(name, f"is surplus: {MANIFEST} does not name it")
        return records

    def check_cube(self, statuses: dict[str, str] | None) -> None:
        """The cube's record and files, and which row is which sample."""
        stated = self.manifest["cube"]
        try:
            files = read_cube_record(self.folder, stated["record_sha256"])
        except ShardError as error:
            self.add(RECORD, str(error))
            return
        self.report.counts["cube_files"] = len(files)
        if (len(files), sum(file.size for file in files)) != (stated["files"], stated["size"]):
            self.add(RECORD, f"lists {len(files)} files; {MANIFEST} states {stated['files']} of {stated['size']} bytes")
        wrong = dict(cube_file_problems(self.folder, files))
        for name, what in wrong.items():
            self.add(f"{CUBE}/{name}", what)
        self.missing = {file.path for file in files if not (self.folder / CUBE / file.path).is_file()}
        if self.report.deep:
            for done, file in enumerate(files):
                self.progress("cube", done, len(files))
                if file.path not in wrong:
                    with (self.folder / CUBE / file.path).open("rb") as content:
                        digest = hashlib.file_digest(content, "sha256").hexdigest()
                    self.report.bytes_read += file.size
                    if digest != file.sha256:
                        self.add(f"{CUBE}/{file.path}", f"has sha256 {digest}; its record states {file.sha256}")
            self.progress("cube", len(files), len(files))
        needed = {file.path for file in files if file.path.split("/")[0] not in self.arrays}
        if needed & set(wrong):  # without the group's metadata and the coordinates nobody knows which row is which sample
            return
        try:
            self.reader = CubeReader(self.folder / CUBE, CubeLayout.of(self.manifest))
        except ShardError as error:
            self.add(CUBE, str(error))
            return
        self.row_of = {row.key: index for index, row in enumerate(self.reader.rows) if row.metadata is not None}
        if statuses is not None:
            self.check_keys("the cube's valid rows", [row.key for row in self.reader.rows if row.metadata is not None], statuses)

    def check_index(self, entries: Sequence[ShardEntry], records: dict[str, Samples]) -> None:
        """Whether the index says what records and cube say."""
        tables = read_tables(self.folder, self.report.problems)
        if tables is None:
            return
        self.tables = tables
        self.report.problems += differs_from_records(tables, self.manifest, entries, records)
        if self.reader is not None:
            self.report.problems += differs_from_rows(tables, self.manifest, self.reader.rows)

    def check_source(self, source: Source, statuses: dict[str, str] | None) -> Source | None:
        """Whether the archive is one that these samples can come from; None if not."""
        stated = (self.manifest["arrays"], self.manifest["normalisation"], self.manifest["normalised_by"])
        found = (source.spec.arrays(), source.spec.contracts(), dict(source.spec.normalised_by))
        if json.loads(canonical({"of": found})) != json.loads(canonical({"of": stated})):
            self.add(MANIFEST, "the source has other arrays, or other values, than this dataset: nothing was compared with it")
            return None
        for key in source.keys:
            if statuses is not None and key not in statuses:
                self.add(LEDGER, "is in the source, and not in the ledger", key)
        return source

    def read_samples(self, entries: Sequence[ShardEntry], records: dict[str, Samples], source: Source | None) -> None:
        """Reads every sample of the shards, or else of the cube, and compares it with what else there is of it."""
        done, total = 0, self.manifest["num_samples"]
        beside = Beside(self.report.problems, self.report.counts, source, self.tables, self.reader, self.row_of, self.missing)
        for entry in entries:
            if not (self.folder / entry.name).is_file():
                continue
            self.report.bytes_read += entry.size
            record = records.get(entry.name, [])
            for key, metadata, arrays in check_tar(self.folder, entry, record, self.arrays, self.report.problems):
                beside.compare(entry.name, key, metadata, arrays)
                self.progress("shards", done := done + 1, total)
        for key in () if entries else self.row_of:
            beside.compare_row(key)
            self.progress("samples", done := done + 1, total)

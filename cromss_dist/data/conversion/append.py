"""A finished dataset as something to add to: what is in it, and a copy of it made of hard links that may grow."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cromss_dist.data.conversion.ledger import Line
from cromss_dist.data.conversion.plan import Sinks
from cromss_dist.data.conversion.statistics import Statistics
from cromss_dist.data.sample import Json, SampleSpec
from cromss_dist.data.store.cube.layout import Row
from cromss_dist.data.store.cube.record import CUBE, CubeFile, read_record
from cromss_dist.data.store.cube.writer import read_rows
from cromss_dist.data.store.index_file import IndexTables
from cromss_dist.data.store.manifest import LEDGER, MANIFEST, ShardEntry, manifest_entries
from cromss_dist.data.store.stored import read_stored
from cromss_dist.errors import ConfigError, ShardError


@dataclass(frozen=True)
class Base:
    """The dataset that is appended to.

    Args:
        folder: Of it.
        manifest: Its content.
        tables: Its index.
    """

    folder: Path
    manifest: Json
    tables: IndexTables

    @classmethod
    def of(cls, folder: Path) -> "Base":
        """Opens a dataset.

        Raises:
            ShardError: the folder is none, or its manifest or its index is damaged.
        """
        stored = read_stored(folder)
        return cls(folder, stored.manifest, stored.tables)

    @property
    def num_parts(self) -> int:
        """Parts it has; the new ones come behind."""
        return int(self.manifest["parts"]["count"])

    @property
    def locations_per_part(self) -> int:
        """Locations in each of its parts, and so in the new ones."""
        return int(self.manifest["parts"]["locations_per_part"])

    @property
    def sinks(self) -> Sinks:
        """What it consists of."""
        if self.manifest["cube"] is None:
            return "shards"
        return "both" if self.manifest["shards"] else "cube"

    @property
    def shards(self) -> list[ShardEntry]:
        """Its tars."""
        return manifest_entries(self.folder, self.manifest)

    def check_takes(self, spec: SampleSpec, sinks: Sinks | None) -> None:
        """Raises ConfigError unless samples of `spec` fit in, and `sinks` are what it consists of."""
        stated = {"arrays": spec.arrays(), "normalisation": spec.contracts(), "normalised_by": spec.normalised_by}
        differing = [name for name, value in stated.items() if json.loads(json.dumps(value)) != self.manifest[name]]
        if differing:
            raise ConfigError(
                f"{self.folder} holds samples of another kind than the archive: {', '.join(differing)} differ. Only archives "
                "with equal bands, sizes, seasons, label values and normalisation can be appended; choose another folder."
            )
        if sinks not in (None, self.sinks):
            raise ConfigError(f"{self.folder} consists of {self.sinks}; append with --write {self.sinks}, not {sinks}.")

    def lines(self) -> Iterator[Line]:
        """Its ledger.

        Raises:
            ShardError: the ledger is not the one the manifest was made with.
        """
        path = self.folder / LEDGER
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != self.manifest["ledger"]["sha256"]:
            raise ShardError(f"{path} is missing or is not the ledger that {MANIFEST} was made with. Restore it.")
        yield from map(json.loads, data.splitlines())

    def pixels(self) -> dict[str, str]:
        """Digest of the pixels of each key that was written."""
        return {line["key"]: line["pixels"] for line in self.lines() if line["status"] == "written"}

    def statistics(self, spec: SampleSpec) -> Statistics:
        """Of its samples."""
        return Statistics.from_json(spec, self.manifest)

    def cube_files(self) -> tuple[CubeFile, ...]:
        """The files of its cube."""
        return read_record(self.folder, self.manifest["cube"]["record_sha256"])

    def rows(self) -> list[Row]:
        """The rows of its cube and those that are left empty up to the next part."""
        rows = list(read_rows(self.folder / CUBE))
        return rows + [Row("", None)] * (self.num_parts * self.locations_per_part - len(rows))

    def link_into(self, folder: Path) -> None:
        """Puts its files into another folder, without copying a byte where the file system has hard links.

        None of them is written into ever after: who replaces one leaves this dataset as it is.
        """
        cube = [f"{CUBE}/{file.path}" for file in self.cube_files()] if self.manifest["cube"] else []
        tars = [name for entry in self.shards for name in (entry.name, entry.record)]
        for name in (*tars, *cube):
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):
                    os.link(self.folder / name, folder / name)
                    continue
                shutil.copyfile(self.folder / name, folder / name)

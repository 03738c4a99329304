"""A dataset without its pixels: what manifest and index say, read and checked, from a folder or from anywhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json
from cromss_dist.data.store.dataset import Places
from cromss_dist.data.store.index_file import INDEX, IndexTables, parse_index
from cromss_dist.data.store.shards import MANIFEST, ShardEntry, manifest_entries, parse_manifest
from cromss_dist.errors import ShardError
from cromss_dist.schema import LABEL_ARRAY, ArraySpec, Modality, Normalisation

MAX_MANIFEST_BYTES = 2**30
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)

# Called with a file's name, the most bytes it may have and, of all but the manifest, its sha256, which need not be checked;
# returns all of it, or raises what says why it cannot.
ReadFile: TypeAlias = Callable[[str, int, str | None], bytes]


@dataclass(frozen=True)
class StoredDataset:
    """What every stored dataset has, whatever reads its pixels: all of `dataset.Dataset` but `read_into` and `fetch`.

    Args:
        origin: Folder or URL it was opened from.
        manifest: Its content, see docs/data-format.md.
        tables: Its index.
    """

    origin: str
    manifest: Json
    tables: IndexTables

    def __len__(self) -> int:
        return len(self.tables.locations)

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the manifest states: names the dataset."""
        return str(self.manifest["digest"])

    @property
    def locations(self) -> tuple[str, ...]:
        """N keys, in the order of the manifest: shard by shard."""
        return self.tables.locations

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each shard, int64 (K,)."""
        return self.tables.shard_sizes

    @property
    def places(self) -> Places:
        """Where and when the locations were taken."""
        return self.tables.places

    @property
    def entries(self) -> list[ShardEntry]:
        """What the manifest says of each tar; none where only a cube was written."""
        return manifest_entries(self.origin, self.manifest)

    @cached_property
    def shard_of(self) -> npt.NDArray[np.int32]:
        """Shard of each sample, int32 (N,)."""
        return np.repeat(np.arange(len(self.shard_sizes), dtype=np.int32), self.shard_sizes)

    @property
    def patch_px(self) -> int:
        """Side of the patches at 10 m, px."""
        return int(self.manifest["patch_px"])

    @cached_property
    def num_seasons(self) -> int:
        """Scenes a location has in each modality, and labels."""
        return int(self.manifest["arrays"][LABEL_ARRAY]["shape"][0])

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all stored arrays."""
        return tuple(self.manifest["arrays"])

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The stored image arrays."""
        return tuple(
            ArraySpec(name, tuple(spec["bands"]), int(spec["gsd_m"]) // 10, spec["modality"])
            for name, spec in self.manifest["arrays"].items()
            if spec.get("modality")
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels' values 0, 1, ... mean."""
        return tuple(self.manifest["arrays"][LABEL_ARRAY]["values"])

    def normalisation(self, modality: Modality) -> Normalisation:
        """The contract by which the stored values of a modality came from physical ones."""
        stated = dict(self.manifest["normalisation"][modality])
        digest = stated.pop("digest")
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
        contract = Normalisation(**fields)
        if contract.digest != digest:
            raise ShardError(
                f"{self.origin}: {MANIFEST} states digest {digest} for the normalisation of {modality}, which has "
                f"{contract.digest}; shard the archive again."
            )
        return contract

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array of one season; of 'label' all seasons."""
        shape = tuple(self.manifest["arrays"][name]["shape"])
        return shape if name == LABEL_ARRAY else shape[1:]

    @classmethod
    def parse(cls, origin: str, read: ReadFile) -> Self:
        """Reads manifest and index, and nothing else.

        Args:
            origin: Folder or URL of the dataset, for messages.
            read: Reads a file of it.

        Raises:
            ShardError: they are missing, damaged, malformed or do not belong together.
        """
        manifest = parse_manifest(f"{origin}/{MANIFEST}", read(MANIFEST, MAX_MANIFEST_BYTES, None))
        try:
            entries = manifest_entries(origin, manifest)
            index = read(INDEX, int(manifest["index"]["size"]), manifest["index"]["sha256"])
            tables = parse_index(f"{origin}/{INDEX}", index, manifest, entries)
        except MALFORMED as error:  # digests hold, yet the content is not ours
            raise ShardError(f"{origin}: manifest or index is malformed: {error!r}. Shard the archive again.") from error
        return cls(origin, manifest, tables)


def read_stored(folder: Path) -> StoredDataset:
    """Manifest and index of a local dataset.

    Raises:
        ShardError: see `StoredDataset.parse`.
    """

    def read(name: str, limit: int, sha256: str | None) -> bytes:
        path = folder / name
        if not path.is_file():
            what = "give a folder that tools/shard.py has written" if name == MANIFEST else "restore it"
            raise ShardError(f"{folder} has no {name}; {what}.")
        with path.open("rb") as file:
            return file.read(min(limit, path.stat().st_size) + 1)  # memory for what is there, not for what is stated

    return StoredDataset.parse(str(folder), read)

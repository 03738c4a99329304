"""A dataset without its pixels: what manifest and index say, read and checked, from a folder or from anywhere else."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, MeasureSpec, SampleSpec, ValueSpec
from cromss_dist.data.store.dataset import Places
from cromss_dist.data.store.index_file import INDEX, IndexTables, parse_index
from cromss_dist.data.store.manifest import MANIFEST, ShardEntry, canonical, manifest_entries, parse_manifest
from cromss_dist.errors import ShardError
from cromss_dist.schema import LABEL_ARRAY, MODALITIES, ArraySpec, Modality, Normalisation

MAX_MANIFEST_BYTES = 2**30
MAX_COUNT = 2**31  # of samples, parts, pixels in a row: products of two fit into int64
MAX_SAMPLE_BYTES = 2**32
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
    def archives(self) -> dict[str, Json]:
        """What the manifest says of its archive: account of its inputs, who made values uint8, the ledger's sha256, origin."""
        ledger = {name: value for name, value in self.manifest["ledger"].items() if type(value) is int}
        facts = {"ledger_sha256": self.manifest["ledger"]["sha256"], "normalised_by": self.manifest["normalised_by"]}
        return {self.digest: ledger | facts | ({"origin": self.origin_of} if self.origin_of else {})}

    @property
    def origin_of(self) -> Json | None:
        """What it was computed from, where that is no archive: digests of datasets and models, settings."""
        return self.manifest.get("origin")

    @property
    def locations(self) -> tuple[str, ...]:
        """N keys, in the order of the manifest: shard by shard."""
        return self.tables.locations

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each shard, int64 (K,)."""
        return self.tables.shard_sizes

    def check_in_range(self, sample_id: int, season: int) -> None:
        """Raises IndexError for a sample or season that is not there: negative ones would count from the end."""
        if not (0 <= sample_id < len(self) and 0 <= season < self.num_seasons):
            raise IndexError(f"sample {sample_id}, season {season} of {len(self)} samples of {self.num_seasons} seasons")

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

    @cached_property
    def spec(self) -> SampleSpec:
        """What all samples have in common."""
        return spec_of(self.manifest)

    @property
    def patch_px(self) -> int:
        """Side of the patches at 10 m, px."""
        return self.spec.patch_px

    @property
    def num_seasons(self) -> int:
        """Scenes a location has in each modality, and labels."""
        return self.spec.num_seasons

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all stored arrays."""
        return self.spec.names

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The stored image arrays."""
        return self.spec.images

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels' values 0, 1, ... mean."""
        return self.spec.values[0].values

    def normalisation(self, modality: Modality) -> Normalisation:
        """The contract by which the stored values of a modality came from physical ones."""
        return self.spec.normalisation[modality]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array of one season; of 'label' all seasons."""
        shape = self.spec.shape(name)
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
            spec_of(manifest)
            entries = manifest_entries(origin, manifest)
            index = read(INDEX, int(manifest["index"]["size"]), manifest["index"]["sha256"])
            tables = parse_index(f"{origin}/{INDEX}", index, manifest, entries)
        except MALFORMED as error:  # digests hold, yet the content is not ours
            raise ShardError(f"{origin}: manifest or index is malformed: {error!r}. Shard the archive again.") from error
        return cls(origin, manifest, tables)


def spec_of(manifest: Json) -> SampleSpec:
    """What the samples of a dataset have in common, after checking that the manifest states what the converter could have.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: it does not, though its digest holds.
    """
    arrays, parts = manifest["arrays"], manifest["parts"]
    counts = {
        "patch_px": manifest["patch_px"],
        "num_samples": manifest["num_samples"],
        "seasons": arrays[LABEL_ARRAY]["shape"][0],
    }
    counts |= {"parts": parts["count"], "locations_per_part": parts["locations_per_part"], "index": manifest["index"]["size"]}
    counts["inputs"] = manifest["ledger"]["inputs"]
    for name, count in counts.items():
        if type(count) is not int or not 0 < count <= MAX_COUNT:
            raise ValueError(f"{name} is {count!r}; allowed are whole numbers from 1 to {MAX_COUNT}")
    images = (
        # A scale of 0 would be divided by; what the text really says is compared below.
        ArraySpec(name, _texts(of["bands"]), max(1, int(of["gsd_m"]) // 10), of["modality"])
        for name, of in arrays.items()
        if "bands" in of
    )
    values = (ValueSpec(name, _texts(of["values"])) for name, of in arrays.items() if "values" in of)
    measures = (MeasureSpec(name, *_texts([of["meaning"]])) for name, of in arrays.items() if "meaning" in of)
    contracts = {modality: _contract(stated) for modality, stated in manifest["normalisation"].items()}
    of_arrays = (tuple(images), tuple(values), contracts, manifest["normalised_by"], tuple(measures))
    spec = SampleSpec(counts["patch_px"], counts["seasons"], *of_arrays)
    # The order is that of the index's columns; the digest, of sorted keys, knows nothing of it.
    if list(arrays) != list(spec.names) or spec.values[0].name != LABEL_ARRAY:
        raise ValueError(f"the arrays {list(arrays)} are not images, {LABEL_ARRAY}, other values and measures, in this order")
    if not all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in arrays):
        raise ValueError(f"the arrays {list(arrays)} are no names")
    for what, stated, said in (
        ("arrays", arrays, spec.arrays()),
        ("normalisation", manifest["normalisation"], spec.contracts()),
    ):
        if canonical({what: stated}) != canonical({what: said}):
            raise ValueError(f"the {what} contradict themselves")
    if not {image.modality for image in spec.images} <= contracts.keys() <= set(MODALITIES):
        raise ValueError(f"there are normalisations of {list(contracts)}")
    if sum(math.prod(spec.shape(name)) for name in spec.names) > MAX_SAMPLE_BYTES:
        raise ValueError(f"a sample has more than {MAX_SAMPLE_BYTES} bytes")
    return spec


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(values)


def _contract(stated: Json) -> Normalisation:
    fields = {name: value for name, value in stated.items() if name != "digest"}
    for name in ("mean", "std"):
        values = fields[name]
        if len(values) != len(fields["bands"]) or not np.all(np.isfinite(np.array(values, np.float64))):
            raise ValueError(f"the {name} of a normalisation is {values!r}")
        fields[name] = tuple(values)
    if fields.get("rule", Normalisation.rule) != Normalisation.rule:  # nothing here computes another
        raise ValueError(f"the rule of a normalisation is {fields['rule']!r}")
    return Normalisation(**{**fields, "bands": _texts(fields["bands"])})


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

"""The index of a dataset, `index.safetensors`: where every sample's bytes, place and times are, in a few arrays.

It repeats what commit records, cube and metadata say, so that opening 100,000 locations is reading one file of 20 MB, not
parsing a thousand records. The manifest has its sha256; tools/verify.py holds it against what it repeats. See
docs/data-format.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as safetensors_bytes

from cromss_dist.data.sample import Json
from cromss_dist.data.staging import write_atomically
from cromss_dist.data.store.dataset import Places
from cromss_dist.data.store.manifest import ShardEntry
from cromss_dist.data.store.shards import Checksums, Samples, block_bytes
from cromss_dist.data.store.times import to_seconds
from cromss_dist.errors import ShardError
from cromss_dist.schema import LABEL_ARRAY

INDEX = "index.safetensors"
MAX_METADATA_BYTES = 2**20  # of a sample's JSON

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TarTables:
    """Where in its tar each of N samples is, of A arrays.

    Args:
        offsets: int64 (N, A): where the first season's pixels start, bytes.
        metadata_spans: int64 (N, 3): offset, size and CRC-32C of the sample's JSON.
    """

    offsets: IntArray
    metadata_spans: IntArray


@dataclass(frozen=True)
class IndexTables:
    """Content of the index of N locations in K shards: A arrays of S seasons.

    Args:
        locations: N keys, in the order of the manifest: shard by shard.
        shard_sizes: int64 (K,): samples in each tar, or in each part of a cube that has any.
        places: Of the N locations.
        checksums: uint32 (N, A, S): CRC-32C of each season's pixels, whatever they are stored as: who decodes others has
            been given another file, or another sample of it.
        tars: None where only a cube was written.
        cube_rows: int64 (N,): position along the cube's `location`, ascending; None where there is no cube.
    """

    locations: tuple[str, ...]
    shard_sizes: IntArray
    places: Places
    checksums: npt.NDArray[np.uint32]
    tars: TarTables | None
    cube_rows: IntArray | None


def places_of(metadata: Sequence[Json], num_seasons: int) -> Places:
    """Of samples, by their metadata."""

    def degrees(axis: str) -> npt.NDArray[np.float64]:
        return np.array([np.nan if of.get(axis) is None else of[axis] for of in metadata], np.float64)

    def seconds(name: str) -> IntArray:
        times = [to_seconds(season.get(name)) for of in metadata for season in of["seasons"]]
        return np.array(times, np.int64).reshape(len(metadata), num_seasons)

    return Places(degrees("lon"), degrees("lat"), seconds("s1_time"), seconds("s2_time"))


def checksum_table(arrays: dict[str, Json], samples: Sequence[Checksums]) -> npt.NDArray[np.uint32]:
    """`IndexTables.checksums` of some samples, by the manifest's `arrays`."""
    rows = [[of[name] for name in arrays] for of in samples]
    return np.array(rows, np.uint32).reshape(len(samples), len(arrays), arrays[LABEL_ARRAY]["shape"][0])


def recorded_checksums(record: Samples) -> list[Checksums]:
    """Of the samples of a tar, by its commit record."""
    return [{member.name.removesuffix(".npy"): member.season_crc32c for member in members} for _, members in record]


def tar_tables(arrays: dict[str, Json], record: Samples) -> TarTables:
    """Of one tar, from its commit record and the manifest's `arrays`.

    Raises:
        KeyError, ValueError: they do not fit each other.
    """
    num_seasons = arrays[LABEL_ARRAY]["shape"][0]
    pixels = {f"{name}.npy": num_seasons * block_bytes(spec) for name, spec in arrays.items()}
    offsets, spans = [], []
    for _, members in record:
        by_name = {member.name: member for member in members}
        of_arrays = [by_name[name] for name in pixels]
        offsets.append([m.offset + m.size - size for m, size in zip(of_arrays, pixels.values(), strict=True)])
        spans.append((by_name["json"].offset, by_name["json"].size, by_name["json"].crc32c))
    return TarTables(
        np.array(offsets, np.int64).reshape(len(record), len(arrays)),
        np.array(spans, np.int64).reshape(len(record), 3),
    )


def join(parts: Sequence[IndexTables]) -> IndexTables:
    """The index of a dataset from those of its parts, in order; all of them have tars, a cube or both."""
    columns = [_arrays(part) for part in parts]
    joined = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    return _tables(tuple(key for part in parts for key in part.locations), joined)


def write_index(folder: Path, tables: IndexTables) -> Json:
    """Writes the index: the same bytes for the same content.

    Returns:
        The manifest's `index` section: name, size, sha256.
    """
    keys = [key.encode(errors="surrogatepass") for key in tables.locations]  # file names may be no UTF-8
    ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    blob = np.frombuffer(b"".join(keys), np.uint8)
    data = safetensors_bytes({**_arrays(tables), "keys": blob, "key_offsets": ends})
    write_atomically(folder / INDEX, data)
    return {"name": INDEX, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def parse_index(where: str, data: bytes, manifest: Json, entries: Sequence[ShardEntry]) -> IndexTables:
    """The index in `data`, after checking that it is the manifest's and that all it points to can be there.

    Args:
        where: File or URL it was read from, for messages.
        data: Its bytes.
        manifest: Of the dataset.
        entries: The manifest's shards.

    Raises:
        ShardError: it is not what the manifest was made with.
        KeyError, TypeError, ValueError: digests hold, yet it is no index of such a dataset.
    """
    stated = manifest["index"]
    if len(data) != stated["size"] or hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise ShardError(f"{where} is not the index that the manifest was made with. Restore it or shard the archive again.")
    try:
        found = parse_safetensors(data)
    except SafetensorError as error:
        raise ValueError(f"{where} is no safetensors file: {error}") from error
    _check_shapes(found, manifest, entries)
    keys, ends = found.pop("keys").tobytes(), found.pop("key_offsets").tolist()
    if ends[0] != 0 or ends[-1] != len(keys) or np.any(np.diff(ends) < 0):
        raise ValueError("key_offsets do not divide the keys")
    tables = _tables(tuple(keys[start:end].decode(errors="surrogatepass") for start, end in pairwise(ends)), found)
    _check_values(tables, manifest, entries)
    return tables


def _arrays(tables: IndexTables) -> dict[str, npt.NDArray[Any]]:
    """All but the keys, by the names they have in the file."""
    arrays: dict[str, npt.NDArray[Any]] = {"shard_sizes": tables.shard_sizes, **vars(tables.places)}
    arrays["checksums"] = tables.checksums
    if tables.tars is not None:
        arrays |= vars(tables.tars)
    if tables.cube_rows is not None:
        arrays["cube_rows"] = tables.cube_rows
    return arrays


def _tables(locations: tuple[str, ...], arrays: dict[str, npt.NDArray[Any]]) -> IndexTables:
    """Inverse of `_arrays`."""
    places = Places(**{name: arrays[name] for name in Places.__dataclass_fields__})
    tars = TarTables(**{name: arrays[name] for name in TarTables.__dataclass_fields__}) if "offsets" in arrays else None
    return IndexTables(locations, arrays["shard_sizes"], places, arrays["checksums"], tars, arrays.get("cube_rows"))


def _check_shapes(found: dict[str, npt.NDArray[Any]], manifest: Json, entries: Sequence[ShardEntry]) -> None:
    """Raises ValueError unless arrays, types and shapes are those of an index of such a dataset."""
    num, seasons, arrays = manifest["num_samples"], manifest["arrays"][LABEL_ARRAY]["shape"][0], len(manifest["arrays"])
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "keys": ("uint8", found["keys"].shape[:1]),
        "key_offsets": ("int64", (num + 1,)),
        "shard_sizes": ("int64", (len(entries),) if entries else found["shard_sizes"].shape[:1]),
        "lon": ("float64", (num,)),
        "lat": ("float64", (num,)),
        "s1_time": ("int64", (num, seasons)),
        "s2_time": ("int64", (num, seasons)),
        "checksums": ("uint32", (num, arrays, seasons)),
    }
    if entries:
        expected["offsets"] = ("int64", (num, arrays))
        expected["metadata_spans"] = ("int64", (num, 3))
    if manifest["cube"] is not None:
        expected["cube_rows"] = ("int64", (num,))
    is_there = {name: (array.dtype.name, array.shape) for name, array in found.items()}
    if is_there != expected:
        differing = sorted(name for name, _ in is_there.items() ^ expected.items())
        raise ValueError(f"{INDEX} does not fit the manifest: {', '.join(dict.fromkeys(differing))}")


def _check_values(tables: IndexTables, manifest: Json, entries: Sequence[ShardEntry]) -> None:
    """Raises ValueError where something is said to lie outside its tar or cube."""
    sizes = tables.shard_sizes
    if sizes.min() < 1 or sizes.max() > len(tables.locations) or sizes.sum() != len(tables.locations):
        raise ValueError(f"the shards of {INDEX} do not add up to {len(tables.locations)} samples")
    if tables.cube_rows is not None:
        parts = manifest["parts"]
        rows = np.concatenate([[-1], tables.cube_rows, [parts["count"] * parts["locations_per_part"]]])
        if np.any(rows[1:] <= rows[:-1]):
            raise ValueError(f"the cube_rows of {INDEX} are not ascending rows of the cube")
    if tables.tars is None:
        return
    if sizes.tolist() != [entry.samples for entry in entries]:
        raise ValueError(f"{INDEX} has other numbers of samples in the shards than the manifest")
    tar_bytes = np.repeat(np.array([entry.size for entry in entries], np.int64), sizes)[:, None]
    shapes = [(spec["shape"][0], block_bytes(spec)) for spec in manifest["arrays"].values()]
    pixels = np.array([seasons * size for seasons, size in shapes], np.int64)
    offsets = tables.tars.offsets
    if min(pixels) < 0 or np.any((offsets < 0) | (offsets > tar_bytes - pixels)):
        raise ValueError(f"{INDEX} has pixels that do not lie inside the tar")
    start, size = tables.tars.metadata_spans[:, :1], tables.tars.metadata_spans[:, 1:2]
    if np.any((start < 0) | (size < 0) | (size > MAX_METADATA_BYTES) | (start > tar_bytes - size)):
        raise ValueError(f"{INDEX} has metadata that does not lie inside the tar")
